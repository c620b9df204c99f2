"""Training of the generator: footage in, checkpoints and their scores out."""
