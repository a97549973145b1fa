"""What the verbs show: tables and progress on the terminal, JSON for other programs."""
