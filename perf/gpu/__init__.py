"""What a GPU makes of the network: PyTorch, the served targets and plans, beside the GPU's own ceilings."""
