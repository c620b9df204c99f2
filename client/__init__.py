"""Client of a Triton server that serves the MST-GAN ensemble: video in, video four times as large out."""

from __future__ import annotations
