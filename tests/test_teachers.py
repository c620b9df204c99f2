"""Single-image networks of any make as teachers, alone and beside networks of ours."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_network import LIGHT, TINY, export_single_image, frames_of, shake
from torch import Tensor, nn

from export.checkpoint import save_checkpoint
from export.errors import ExportError
from export.network import MstGan
from export.training.imitation import Imitation, SingleImageTeacher, load_teacher

pytestmark = pytest.mark.usefixtures("tiny_widths")


class Nearest(nn.Module):
    def forward(self, frames: Tensor) -> Tensor:
        return F.interpolate(frames, scale_factor=4.0)


class Twice(nn.Module):
    def forward(self, frames: Tensor) -> Tensor:
        return F.interpolate(frames, scale_factor=2.0)


@pytest.fixture
def nearest(tmp_path: Path) -> SingleImageTeacher:
    teacher = load_teacher(export_single_image(Nearest(), tmp_path / "nearest.pt2"))
    assert isinstance(teacher, SingleImageTeacher)
    return teacher


@pytest.mark.parametrize("turned", [False, True])
def test_it_sees_the_middle_frame_alone(nearest: SingleImageTeacher, turned: bool) -> None:
    """However a window is turned: what repeats pixels does not depend on the view."""
    frames = frames_of(8)
    answer, features = Imitation([nearest], LIGHT, turned=turned).taught(frames, bf16=False)
    assert features is None
    assert torch.equal(answer, frames[:, 1].repeat_interleave(16, dim=1))


def test_several_teachers_answer_with_their_mean(nearest: SingleImageTeacher, tmp_path: Path) -> None:
    save_checkpoint(shake(MstGan(LIGHT)), tmp_path / "ours.safetensors", {})
    ours = load_teacher(tmp_path / "ours.safetensors")
    frames = frames_of(2)
    alone = [Imitation([one], TINY).taught(frames, bf16=False)[0] for one in (ours, nearest)]
    imitation = Imitation([ours, nearest], TINY)
    answer, features = imitation.taught(frames, bf16=False)
    assert torch.allclose(answer, (alone[0] + alone[1]) / 2, atol=1e-6)
    assert imitation.names == ["light", "nearest"]
    assert features is None
    assert not imitation.adapters


def test_nothing_of_it_is_trained(nearest: SingleImageTeacher, tmp_path: Path) -> None:
    wide = export_single_image(
        nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4)), tmp_path / "c.pt2"
    )
    imitation = Imitation([SingleImageTeacher(wide)], LIGHT)
    assert [parameter.requires_grad for parameter in imitation.parameters()] == [False, False]
    assert not imitation.taught(frames_of(1), bf16=True)[0].requires_grad


def test_what_is_no_such_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("weights")
    export_single_image(Twice(), tmp_path / "twice.pt2")
    torch.export.save(torch.export.export(Nearest(), (torch.rand(2, 3, 16, 24),)), tmp_path / "static.pt2")
    for name, complaint in (
        ("none", "it cannot be read"),
        ("text", "it cannot be read"),
        ("twice", r"found \(2, 3, 32, 48\) from \(2, 3, 16, 24\)"),
        ("static", r"it refused \(3, 3, 48, 48\)"),
    ):
        with pytest.raises(ExportError, match=rf"^expected .*{name}\.pt2 to hold .*{complaint}") as caught:
            load_teacher(tmp_path / f"{name}.pt2")
        assert "\n" not in str(caught.value)
