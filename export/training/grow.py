"""Growing: a network's weights in a larger network, which at first computes the same function."""

from __future__ import annotations

from export.errors import ExportError
from export.network import MstGan, Widths


def grow(small: MstGan, widths: Widths) -> MstGan:
    """The same function in wider layers, more blocks, or beside a pyramid (Net2Net, Chen et al. 2016).

    Old channels come first, with zero weights from new ones; new blocks begin as the identity; other new
    weights are initialized as in an untrained network. Of equal widths, a copy.

    Args:
        small: any network.
        widths: of the larger network: nowhere less than those of ``small``.

    Raises:
        ExportError: ``small`` has a layer that the larger network lacks, or has narrower.
    """
    large = MstGan(widths)
    state = large.state_dict()
    for name, old in small.state_dict().items():
        new = state.get(name)
        if new is None or any(a < b for a, b in zip(new.shape, old.shape, strict=True)):
            raise ExportError(
                f"expected a checkpoint that fits into the {widths.name!r} widths, found the "
                f"{small.widths.name!r} widths, whose {name} is {tuple(old.shape)} and not at most "
                f"{'nothing' if new is None else tuple(new.shape)}"
            )
        new[: len(old)] = 0
        new[tuple(map(slice, old.shape))] = old
    large.load_state_dict(state)
    return large
