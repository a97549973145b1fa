"""Bounded-error early exit."""
