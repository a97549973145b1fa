"""Who drafts for a model: drafters by name, and what they cost here."""
