"""Triton servers: their contract, requests in flight, transports, security."""
