"""A teacher that sees every window flipped and turned at random."""

import pytest
import torch
from tiny_network import LIGHT, frames_of, shake

from export.network import MstGan
from export.training.distillation import Distillation

pytestmark = pytest.mark.usefixtures("tiny_widths")


def test_the_answer_of_an_augmented_teacher_is_transformed_back() -> None:
    """Untrained it answers bicubic, which does not depend on the view."""
    distillation, frames = Distillation(MstGan(LIGHT), LIGHT, augmented=True), frames_of(16)
    plain, features = Distillation(MstGan(LIGHT), LIGHT).targets(frames, bf16=False)
    answer, none = distillation.targets(frames, bf16=False)
    assert features is not None
    assert none is None
    assert torch.allclose(answer, plain, atol=1e-4)
    assert distillation.losses(plain, features, (answer, none))[1] == 0


def test_an_augmented_teacher_sees_all_views() -> None:
    torch.manual_seed(0)
    distillation = Distillation(shake(MstGan(LIGHT)), LIGHT, augmented=True)
    answers, _ = distillation.targets(frames_of(1).expand(160, -1, -1, -1, -1), bf16=False)
    views: list[torch.Tensor] = []
    for answer in answers:
        if all((answer - view).abs().max() > 1e-4 for view in views):
            views.append(answer)
    assert len(views) == 16
