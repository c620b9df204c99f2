"""The ladder: from the baseline in PyTorch to the fastest thing served, one rung at a time."""
