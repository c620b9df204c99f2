"""Footage in the memory of a device gives the same batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_up_footage import noise_clip

from export.data.windows import WindowSampler
from export.errors import ExportError
from export.training.gpu import GpuFootage


def test_batches_are_the_same() -> None:
    """Mirrored, turned, reversed, at both strides, and photos under a camera: all by where to look."""
    clips, photos = [noise_clip("a", 7, 80), noise_clip("bb", 7, 96)], [noise_clip("p", 1, 160)]
    sampler = WindowSampler(clips, photos, patch=64, photo_share=0.3, seed=3)
    on_device = GpuFootage(sampler, torch.device("cpu"))
    for length in (3, 5):
        for step in range(12):
            offsets = on_device.offsets(sampler.sample(step, 7, length), length)
            torch.testing.assert_close(sampler.batch(step, 7, length), on_device.cut(offsets))


@pytest.mark.parametrize(("share", "counts"), [(0, {0}), (0.3, {2, 3}), (1, {7})])
def test_offsets_have_few_shapes(share: float, counts: set[int]) -> None:
    """A CUDA graph is captured for each."""
    sampler = WindowSampler(
        [noise_clip("a", 7, 80)], [noise_clip("p", 1, 160)], patch=64, photo_share=share, seed=3
    )
    on_device = GpuFootage(sampler, torch.device("cpu"))
    found = [on_device.offsets(sampler.sample(step, 7), 3) for step in range(50)]
    assert {len(offsets.photos) for offsets in found} == counts
    assert np.mean([len(offsets.photos) for offsets in found]) == pytest.approx(7 * share, abs=0.3)
    assert on_device.cut(found[0]).shape == (7, 3, 3, 64, 64)


def test_footage_larger_than_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    sampler = WindowSampler([noise_clip("a", 7, 80)], [], patch=64, photo_share=0, seed=0)
    with pytest.raises(ExportError, match=r"expected footage of at most 0\.0 GB to keep on cuda, found"):
        GpuFootage(sampler, torch.device("cuda"))
