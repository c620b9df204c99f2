"""Checkpoints: FP16 safetensors whose header names the width table they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from export.errors import ExportError
from export.folders import written_whole
from export.network import WIDTHS, MstGan

FOLDER = Path(__file__).parent / "checkpoints"
DEFAULT = FOLDER / "mst_gan_pruned.safetensors"


def save_checkpoint(network: MstGan, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the weights as FP16; ``path`` changes only once the whole file is there.

    Raises:
        OSError, SafetensorError: it cannot be written; half a file does not stay.
    """
    state = {name: value.detach().half().contiguous().cpu() for name, value in network.state_dict().items()}
    with written_whole(path) as partial:
        save_file(state, partial, {"widths": network.widths.name, **metadata})


def load_checkpoint(path: Path) -> MstGan:
    """Read a checkpoint into an FP32 network in evaluation mode.

    Raises:
        ExportError: no such file, not safetensors, unknown widths, or keys and shapes that do not fit them.
    """
    if not path.is_file():
        raise ExportError(f"expected a checkpoint at {path}, found no file; pass --checkpoint, or train one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as err:
        raise ExportError(f"expected {path} to be a safetensors file, found something else ({err})") from err
    widths = metadata.get("widths", "")
    if widths not in WIDTHS:
        raise ExportError(
            f"expected 'widths' in the header of {path} to be one of {', '.join(WIDTHS)}, found {widths!r}; "
            "save it with export.checkpoint.save_checkpoint"
        )
    network = MstGan(WIDTHS[widths])
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ExportError(
                f"{path}: expected {name} with shape {expected.get(name, 'none: no such key')}, "
                f"found {found.get(name, 'no such key')}; is it a checkpoint of the {widths!r} widths?"
            )
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
