"""Solvers of f(z) = z for batches of independent rows: one method per file, one driver for all."""
