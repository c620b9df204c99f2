"""Training on a GPU: video clips in its memory, and training steps as CUDA graphs.

A step of these small networks is a thousand short kernels. Launched one by one from Python they take several
times as long as they compute; a CUDA graph is captured once and replayed, and the GPU starts them by itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from export.data.clips import Clip
from export.data.windows import Sampled, WindowSampler, move_camera
from export.errors import ExportError
from export.spec import CHANNELS
from export.training.device import to_device

FOOTAGE_SHARE = 0.5  # of a GPU's free memory that clips may take; the rest is for training
WARM_UP = 3  # steps outside of a graph: cuDNN chooses its algorithms, optimizers allocate their state
MAX_WORKERS = 12
PREFETCH = 8  # batches per worker

Update = Callable[[Tensor], dict[str, Tensor]]
"""A training step on (N, L, 3, H, W) hr windows that the device does alone: nothing of it may wait for, or
depend on, a value on the host."""


class CropOffsets(NamedTuple):
    """A batch's windows as offsets into a device's memory; small, and of a few shapes only."""

    clips: Tensor
    """(N, 4) int64: the offset of a window's first value, and the strides to the next frame, row and column:
    windows that are flipped, turned or reversed start at another corner and have other strides."""
    photos: Tensor
    """(M, 4) int64: the same of the cut-outs that cameras move over."""
    cameras: Tensor
    """(M, L, 3, 3) float32, see ``windows.PhotoWindow``."""


class GpuFootage:
    """All clips and photos of a sampler in a device's memory, as uint8."""

    def __init__(self, sampler: WindowSampler, device: torch.device) -> None:
        """Copy them there.

        Raises:
            ExportError: they do not fit into the memory of ``device``.
        """
        self.sampler, self.device = sampler, device
        sources = [*sampler.clips, *sampler.photos]
        _require_room(sources, device)
        ends = np.cumsum([0, *(source.segments.size for source in sources)])
        self.starts = [int(start) for start in ends[:-1]]
        self.memory = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)
        for source, start in zip(sources, self.starts, strict=True):
            values = torch.from_numpy(np.ascontiguousarray(source.segments)).flatten()
            self.memory[start : start + len(values)] = values

    def offsets(self, sampled: Sampled, length: int) -> CropOffsets:
        """Of windows of ``length`` frames, on the host; uses no device, and so may run in other processes."""
        clips, photos = sampled
        patch, side = self.sampler.patch, self.sampler.side
        windows = []
        for c in clips:
            shape = self.sampler.clips[c.clip].segments.shape
            frame, row, column = _strides(shape)
            first = self.starts[c.clip] + (c.segment * shape[1] + c.first) * frame + c.y * row + c.x * column
            first, row, column = _turned(first, row, column, patch, c.mirrored, c.quarter_turns)
            later = frame * c.stride
            if c.is_reversed:
                first, later = first + (length - 1) * later, -later
            windows.append((first, later, row, column))
        cutouts = []
        for p in photos:
            index = len(self.sampler.clips) + p.photo
            _, row, column = _strides(self.sampler.photos[p.photo].segments.shape)
            first = self.starts[index] + p.y * row + p.x * column
            first, row, column = _turned(first, row, column, side, p.mirrored, p.quarter_turns)
            cutouts.append((first, 0, row, column))
        cameras = np.array([p.camera for p in photos], np.float32).reshape(-1, length, 3, 3)
        return CropOffsets(
            torch.tensor(windows, dtype=torch.int64).view(-1, 4),
            torch.tensor(cutouts, dtype=torch.int64).view(-1, 4),
            torch.from_numpy(cameras),
        )

    def cut(self, offsets: CropOffsets) -> Tensor:
        """The windows, (N + M, L, 3, H, W) float32 RGB, 0..1; they and ``offsets`` are on the device."""
        length = offsets.cameras.shape[1]
        windows = self._gather(offsets.clips, length, self.sampler.patch)
        if len(offsets.photos):
            images = self._gather(offsets.photos, 1, self.sampler.side)[:, 0]
            windows = torch.cat((windows, move_camera(images, offsets.cameras, self.sampler.patch)))
        return windows

    def _gather(self, offsets: Tensor, length: int, side: int) -> Tensor:
        """(N, length, 3, side, side) float32, 0..1."""
        first, later, row, column = offsets.view(-1, 4, 1, 1, 1, 1).unbind(1)
        t, channel, y, x = (torch.arange(n, device=self.device) for n in (length, CHANNELS, side, side))
        at = first + later * t.view(-1, 1, 1, 1) + channel.view(-1, 1, 1) + row * y.view(-1, 1) + column * x
        return self.memory[at].float() / 255


class CudaGraphUpdate:
    """An update that is captured for each set of shapes, and then replayed."""

    def __init__(self, update: Update, footage: GpuFootage) -> None:
        """``update`` gets the windows that ``footage`` cuts."""
        self.update, self.footage = update, footage
        self.stream = torch.cuda.Stream()
        self.warm = 0
        self.graphs: dict[object, tuple[torch.cuda.CUDAGraph, CropOffsets, dict[str, Tensor]]] = {}

    def __call__(self, offsets: CropOffsets) -> Mapping[str, Tensor]:
        """One update on the windows at ``offsets``, which are on the host.

        Returns:
            What the update returned; the next call overwrites it.
        """
        if self.warm < WARM_UP:
            self.warm += 1
            return self._run_eagerly(offsets)
        shapes = tuple(part.shape for part in offsets)
        if shapes not in self.graphs:
            self.graphs[shapes] = self._capture(offsets)
        graph, inputs, answers = self.graphs[shapes]
        for mine, theirs in zip(inputs, offsets, strict=True):
            mine.copy_(theirs.pin_memory(), non_blocking=True)
        graph.replay()
        return answers

    def _run_eagerly(self, offsets: CropOffsets) -> dict[str, Tensor]:
        # On a side stream, as torch asks of what is captured later.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            answers = self.update(self.footage.cut(to_device(offsets, self.footage.device)))
        torch.cuda.current_stream().wait_stream(self.stream)
        return answers

    def _capture(self, offsets: CropOffsets) -> tuple[torch.cuda.CUDAGraph, CropOffsets, dict[str, Tensor]]:
        inputs = to_device(offsets, self.footage.device)
        graph = torch.cuda.CUDAGraph()
        pools = [captured[0].pool() for captured in self.graphs.values()]
        with torch.cuda.graph(graph, pool=pools[0] if pools else None):
            answers = self.update(self.footage.cut(inputs))
        return graph, inputs, answers


def offsets_from(step: int, footage: GpuFootage, size: int, length: int) -> Iterator[CropOffsets]:
    """Crop offsets of the batches from ``step`` on, sampled by other processes: it takes longer than a step.

    Args:
        step: of the first batch.
        footage: that they are cut from.
        size: windows per batch.
        length: frames per window.
    """
    loader = DataLoader(
        _Batches(footage, size, length),
        batch_size=None,
        sampler=count(step),  # type: ignore[arg-type]  # any iterable will do
        num_workers=min(MAX_WORKERS, max(1, (os.cpu_count() or 1) - 2)),
        prefetch_factor=PREFETCH,
        collate_fn=tuple,
        multiprocessing_context="fork",  # the footage is not copied
        worker_init_fn=_reset_signals,
    )
    for parts in loader:
        yield CropOffsets(*map(torch.from_numpy, parts))


def _reset_signals(worker: int) -> None:
    """Ctrl-C is for the process that trains, whose handlers a forked worker has inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Batches(Dataset[tuple[NDArray[Any], ...]]):
    """Crop offsets by step, for forked workers; as arrays, which travel faster than tensors."""

    def __init__(self, footage: GpuFootage, size: int, length: int) -> None:
        self.footage, self.size, self.length = footage, size, length

    def __getitem__(self, step: int) -> tuple[NDArray[Any], ...]:
        sampled = self.footage.sampler.sample(step, self.size, self.length)
        return tuple(part.numpy() for part in self.footage.offsets(sampled, self.length))


def _strides(shape: Sequence[int]) -> tuple[int, int, int]:
    """From a value to the same one of the next frame, row and column, in segments of ``shape``."""
    _, _, height, width, channels = shape
    return height * width * channels, width * channels, channels


def _turned(
    first: int, row: int, column: int, side: int, mirrored: bool, quarter_turns: int
) -> tuple[int, int, int]:
    """Offset and strides of a square once it is mirrored, then turned."""
    if mirrored:
        first, column = first + (side - 1) * column, -column
    for _ in range(quarter_turns):
        first, row, column = first + (side - 1) * column, -column, row
    return first, row, column


def _require_room(sources: Sequence[Clip], device: torch.device) -> None:
    """Refuse footage that would fill the memory of a GPU; the CPU's may be swapped."""
    if device.type != "cuda":
        return
    needed, (free, _) = sum(source.segments.nbytes for source in sources), torch.cuda.mem_get_info(device)
    if needed > FOOTAGE_SHARE * free:
        raise ExportError(
            f"expected footage of at most {FOOTAGE_SHARE * free / 1e9:.1f} GB to keep on {device}, found "
            f"{needed / 1e9:.1f} GB; use fewer clips, or pass --no-gpu-footage"
        )
