"""Decoding inside Hugging Face's ``generate`` and its pipelines."""
