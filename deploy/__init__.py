"""Ways to start a Triton server on the model repository."""
