"""Token series that are not text, and their data module."""
