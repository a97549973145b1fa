"""Fit a profile to a model: record, solve, measure, choose."""
