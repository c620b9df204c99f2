"""Decoded frames: windows of neighbors, tiles, scene cuts."""
