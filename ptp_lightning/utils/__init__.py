"""Utilities without any knowledge of the method: files, locks, errors, seeds, names, pretrained folders."""
