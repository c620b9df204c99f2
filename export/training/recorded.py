"""Training steps as CUDA graphs: recorded once, replayed ever after.

A step of these small networks is a thousand short kernels. Launched one by one from Python they take several
times as long as they compute; replayed, the GPU starts them by itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from export.data.windows import Batch
from export.training.device import placed_all
from export.training.held import HeldFootage, Located

WARM_UP = 3  # steps outside of a graph: cuDNN makes its choices, and optimisers their state
MAX_WORKERS = 12
AHEAD = 8  # batches per worker

Update = Callable[[Batch], dict[str, Tensor]]
"""An update whose work the device does alone: nothing of it may wait, or depend on a value, on the host."""


class RecordedUpdate:
    """An update that is recorded for each set of shapes, and then replayed."""

    def __init__(self, update: Update, footage: HeldFootage) -> None:
        """``update`` gets what ``footage`` cuts out."""
        self.update, self.footage = update, footage
        self.stream = torch.cuda.Stream()
        self.warm = 0
        self.records: dict[object, tuple[torch.cuda.CUDAGraph, Located, dict[str, Tensor]]] = {}

    def __call__(self, located: Located) -> Mapping[str, Tensor]:
        """One update on what lies at ``located``, on the host.

        Returns:
            What the update returned; the next call overwrites it.
        """
        if self.warm < WARM_UP:
            self.warm += 1
            return self._unrecorded(located)
        shapes = tuple(part.shape for part in located)
        if shapes not in self.records:
            self.records[shapes] = self._record(located)
        graph, inputs, answers = self.records[shapes]
        for mine, theirs in zip(inputs, located, strict=True):
            mine.copy_(theirs.pin_memory(), non_blocking=True)
        graph.replay()
        return answers

    def _unrecorded(self, located: Located) -> dict[str, Tensor]:
        # Beside the stream that everything else runs on, as torch asks of what is recorded later.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            answers = self.update(self.footage.cut(placed_all(located, self.footage.device)))
        torch.cuda.current_stream().wait_stream(self.stream)
        return answers

    def _record(self, located: Located) -> tuple[torch.cuda.CUDAGraph, Located, dict[str, Tensor]]:
        inputs = placed_all(located, self.footage.device)
        graph = torch.cuda.CUDAGraph()
        pools = [record[0].pool() for record in self.records.values()]
        with torch.cuda.graph(graph, pool=pools[0] if pools else None):
            answers = self.update(self.footage.cut(inputs))
        return graph, inputs, answers


class _Steps(Dataset[tuple[NDArray[Any], ...]]):
    """What is drawn in each step, for workers that are forked; arrays, which travel faster than tensors."""

    def __init__(self, footage: HeldFootage, size: int, length: int) -> None:
        self.footage, self.size, self.length = footage, size, length

    def __getitem__(self, step: int) -> tuple[NDArray[Any], ...]:
        drawn = self.footage.sampler.draw(step, self.size, self.length)
        return tuple(part.numpy() for part in self.footage.locate(drawn, self.length))


def located_from(step: int, footage: HeldFootage, size: int, length: int) -> Iterator[Located]:
    """What is drawn from ``step`` on, by processes of their own: drawing takes longer than learning."""
    loader = DataLoader(
        _Steps(footage, size, length),
        batch_size=None,
        sampler=count(step),  # type: ignore[arg-type]  # any iterable will do
        num_workers=min(MAX_WORKERS, max(1, (os.cpu_count() or 1) - 2)),
        prefetch_factor=AHEAD,
        collate_fn=tuple,
        multiprocessing_context="fork",  # the footage is not copied
    )
    for parts in loader:
        yield Located(*map(torch.from_numpy, parts))
