"""Benchmarks: commands that measure and print figures; they are not tests."""
