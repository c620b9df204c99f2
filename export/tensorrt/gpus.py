"""What NVIDIA's driver says of the GPUs here; asked directly, for torch may be a CPU build."""

from __future__ import annotations

import ctypes

MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, cuda.h


def compute_capabilities() -> list[str]:
    """Compute capability, such as ``8.9``, of every GPU that this process may use; empty without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, part = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for device in range(count.value):
        parts = []
        for attribute in (MAJOR, MINOR):
            driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
            parts.append(str(part.value))
        found.append(".".join(parts))
    return found
