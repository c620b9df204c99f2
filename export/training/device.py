"""Where training runs."""

from __future__ import annotations

import logging
from typing import NamedTuple, TypeVar

import torch
from torch import nn

log = logging.getLogger(__name__)

_Network = TypeVar("_Network", bound=nn.Module)
_Tensors = TypeVar("_Tensors", bound=NamedTuple)


def find_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def warn_of_slow_bf16(device: torch.device) -> None:
    """Warn where bf16 only costs time; with AVX-512 or AMX it saves some."""
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        log.warning("bf16 makes steps several times slower on this processor: pass --fp32")


def to_channels_last(network: _Network, device: torch.device) -> _Network:
    """On the device, in the memory format its convolutions are fastest in."""
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    return network


def to_device(tensors: _Tensors, device: torch.device) -> _Tensors:
    """A named tuple of tensors, on the device."""
    return type(tensors)(*(tensor.to(device) for tensor in tensors))
