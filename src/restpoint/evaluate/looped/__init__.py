"""Exits and starts of models that iterate a block, measured against running every step."""
