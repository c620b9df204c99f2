"""How many frames each queue of a run may hold, so that all of them fit into one budget of memory."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from .frames.tiles import Grid
from .frames.windows import Size

DEFAULT_PART = 4  # a run takes one of so many parts of the machine's memory
FRAMES_AHEAD = 4  # decoded, or waiting for the encoder: enough to even out the stages' pace

NO_ENCODER = ""  # the library's frames go to whoever asked for them
# RGB frames' worth of memory that an encoder takes for itself: measured with 30 frames of 2560x1440 on two
# cores (h264 28, hevc 53, av1 48, ffv1 28). Nothing here can make it take less.
ENCODER_FRAMES = {"libx264": 28, "libx265": 54, "libsvtav1": 48, "ffv1": 28, "prores_ks": 8, NO_ENCODER: 0}
ENCODER_FRAMES_ELSEWHERE = 4


@dataclass(frozen=True)
class Plan:
    """How many items each queue may hold; at least one."""

    lr_frames: int
    """Decoded frames that wait for their windows."""
    windows: int
    """Tiles of windows with the servers, and answers that wait for their turn."""
    hr_frames: int
    """Frames that wait for the encoder."""
    bytes: int
    """What all of it takes, the encoder's own memory among it."""


def plan_queues(
    budget: int,
    padded: Size,
    grid: Grid,
    window: int,
    scale: int,
    in_flight: int,
    encoder: str,
    answers: int = 1,
) -> Plan:
    """Share a budget out over the queues of a run.

    Args:
        budget: Bytes.
        padded: (height, width) of the decoded frames.
        grid: Their tiles.
        window: Frames of a window, or of a sequence.
        scale: hr side / lr side.
        in_flight: Tiles that keep all servers busy.
        encoder: FFmpeg's name of it, or NO_ENCODER.
        answers: hr frames that one window or sequence gives.

    Returns:
        The plan; with one item in each queue if even that is more than the budget.
    """
    lr = 3 * math.prod(padded)
    hr = lr * scale**2
    lr_tile = window * 3 * math.prod(grid.tile)
    hr_tile = answers * 3 * math.prod(grid.tile) * scale**2
    # Beside the queues: the window being cut and the frame before it, the frame put together from its tiles,
    # the one that is encoded, and the encoder.
    joined = 3 if grid.count > 1 else 1
    fixed = (2 * window + 2) * lr + grid.count * hr_tile + (joined + 2) * hr
    fixed += ENCODER_FRAMES.get(encoder, ENCODER_FRAMES_ELSEWHERE) * hr
    # A tile under way lies in the session, and once more in gRPC or in shared memory, with its answer.
    under_way, waiting = lr_tile + hr_tile + max(lr_tile, hr_tile), max(lr_tile, hr_tile)
    spare = budget - fixed - lr - under_way - hr

    def take(most: int, each: int) -> int:
        nonlocal spare
        count = max(0, min(most, spare // each))
        spare -= count * each
        return count

    lr_frames = 1 + take(FRAMES_AHEAD - 1, lr)  # first what costs least, then what keeps the servers busy
    windows = 1 + take(in_flight - 1, under_way)
    hr_frames = 1 + take(FRAMES_AHEAD - 1, hr)
    windows += take(in_flight, waiting) if windows == in_flight else 0
    return Plan(lr_frames, windows, hr_frames, budget - spare)


def default_budget() -> int:
    """A part of what this process may use: of the machine's memory, or of what its control group is given."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *control_group_limits()]) // DEFAULT_PART


def control_group_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Limits in bytes on the memory of this process, of its group and of those around it.

    Args:
        root: Where control groups are mounted, version 2 or 1.
        own: Which groups this process is in, as ``cgroups(7)`` has it.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        # Inside a container the group may be named as the host has it, while its files are at the top.
        folder = top / group.lstrip("/")
        for place in {top, folder, *(one for one in folder.parents if one.is_relative_to(top))}:
            try:
                limits.append(int((place / name).read_text()))
            except (OSError, ValueError):  # no such file, or "max"
                continue
    return limits
