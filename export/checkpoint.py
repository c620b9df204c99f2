"""Checkpoints: FP16 safetensors whose header names the width table they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from export.errors import ExportError
from export.network import WIDTHS, MstGan
from export.network.stream import STREAM_WIDTHS, StreamNetwork
from export.paths import atomic_write

FOLDER = Path(__file__).parent / "checkpoints"
DEFAULT = FOLDER / "mst_gan_pruned.safetensors"
DEFAULT_STREAM = FOLDER / "unfinished" / "stream.safetensors"

RENAMED = {"full": "stem", "join": "fuse", "detail": "body", "tail": "head"}
"""Parts of the generator that had other names in files of release 0.1, which are still read: old -> new."""


Network = TypeVar("Network", MstGan, StreamNetwork)


def save_checkpoint(network: MstGan | StreamNetwork, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the weights as FP16; ``path`` changes only once the whole file is there.

    Raises:
        OSError, SafetensorError: it cannot be written; half a file does not stay.
    """
    state = {name: value.detach().half().contiguous().cpu() for name, value in network.state_dict().items()}
    with atomic_write(path) as partial:
        save_file(state, partial, {"widths": network.widths.name, **metadata})


def load_checkpoint(path: Path) -> MstGan:
    """Read a checkpoint into an FP32 network in evaluation mode.

    Raises:
        ExportError: no such file, not safetensors, unknown widths, keys and shapes that do not fit them, or
            weights that are not finite numbers.
    """
    widths, state = _read(path, WIDTHS)
    return _fill(MstGan(WIDTHS[widths]), {_current_name(name): value for name, value in state.items()}, path)


def load_stream_checkpoint(path: Path) -> StreamNetwork:
    """Read a recurrent network's checkpoint, as ``load_checkpoint`` does a window network's."""
    widths, state = _read(path, STREAM_WIDTHS)
    return _fill(StreamNetwork(STREAM_WIDTHS[widths]), state, path)


def _read(path: Path, tables: Mapping[str, object]) -> tuple[str, dict[str, Tensor]]:
    """Name of the widths, one of ``tables``, and all tensors as FP32."""
    if not path.is_file():
        raise ExportError(f"expected a checkpoint at {path}, found no file; pass --checkpoint, or train one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as err:
        raise ExportError(f"expected {path} to be a safetensors file, found something else ({err})") from err
    widths = metadata.get("widths", "")
    if widths not in tables:
        raise ExportError(
            f"expected 'widths' in the header of {path} to be one of {', '.join(tables)}, found {widths!r}; "
            "save it with export.checkpoint.save_checkpoint"
        )
    return widths, state


def _fill(network: Network, state: dict[str, Tensor], path: Path) -> Network:
    """Put checked weights into a network."""
    widths = network.widths.name
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ExportError(
                f"{path}: expected {name} with shape {expected.get(name, 'none: no such key')}, "
                f"found {found.get(name, 'no such key')}; is it a checkpoint of the {widths!r} widths?"
            )
    for name, value in state.items():
        if not value.isfinite().all():
            raise ExportError(
                f"{path}: expected finite weights, found others in {name}; the training run that wrote "
                "it has failed: pass an older checkpoint of it"
            )
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def _current_name(name: str) -> str:
    """The name that a tensor of a checkpoint has today."""
    module, _, rest = name.partition(".")
    part, dot, end = rest.partition(".")
    return f"{module}.{RENAMED.get(part, part)}{dot}{end}" if module == "generator" else name
