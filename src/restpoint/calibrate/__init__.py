"""Calibration of early exits: fit what they read, choose where to look, and certify what they may cost."""
