"""Utilities that know nothing of the method: files, locks, errors, seeds, pretrained folders."""
