"""Slots: what they carry, how u is embedded, and what they draft."""
