"""One fixed small window, whose answer tells the weights and the arithmetic of a server from others."""

from __future__ import annotations

import math

import numpy as np

from ..frames.windows import Image, fitted_size
from .contract import Contract

PROBE_ID = "probe"  # of the request, for the server's log
KNUTH = 2654435761  # 2^32 / golden ratio: neighboring multiples of it share no high bits


def probe_window(contract: Contract) -> Image:
    """Make the smallest window a model takes, filled with the same noise on every machine.

    Returns:
        (T, H, W, 3) uint8, 0..255.
    """
    shape = (contract.window, *fitted_size(contract.min_size, contract.multiple_of, contract.min_size), 3)
    # Integer arithmetic: unlike those of a generator of random numbers, its values are the same forever.
    noise = np.arange(math.prod(shape), dtype=np.uint64) * KNUTH % 2**32 >> 24
    return noise.astype(np.uint8).reshape(shape)
