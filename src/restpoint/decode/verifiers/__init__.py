"""Which drafted tokens stand when sampling: every verifier leaves the law of the output exactly the target's."""
