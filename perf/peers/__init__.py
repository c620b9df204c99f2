"""The networks that the papers compare MST-GAN with, written from their papers, on the same bench.

Names of weights are those of the published checkpoints, so that who has one can load it: ``layers.load``.
Every network takes (N, T, 3, H, W) float frames, 0..1 RGB, and gives (N, T', 3, 4H, 4W): all frames of the
clip where it is recurrent, the centre frame where it looks through a window.
"""
