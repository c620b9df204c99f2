"""Measures the served models and their peers; learns names and shapes from what the server is given."""
