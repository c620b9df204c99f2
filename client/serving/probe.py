"""What tells one server from others: the answer to one fixed small window, and whether it speaks HTTP."""

from __future__ import annotations

import http.client
import math
import urllib.error
import urllib.request

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


def speaks_http(address: str) -> bool:
    """Whether a plain web server answers at ``host:port``."""
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/live", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # an error page is an answer too
    except (OSError, ValueError, http.client.HTTPException):  # closed, or speaks something else
        return False
