"""Comparing what was exported with what it was exported from."""
