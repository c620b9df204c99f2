"""Training of the generator: clips in, checkpoints and their scores out."""
