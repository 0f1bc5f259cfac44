"""Watches folders, seals arriving images into an encrypted vault, deletes the plaintext."""

__version__ = "0.1.0"
