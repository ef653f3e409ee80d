"""Stored completions of a teacher, and their data module."""
