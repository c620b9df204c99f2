"""What decides the result of a training run, besides the footage."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

LEARNING_RATE_OF = {"fidelity": 4e-4, "adversarial": 3e-4}
FRESH_LEARNING_RATE = 2e-3
"""Of untrained weights: what 250 steps of Muon taught `compact` was most at 4e-3; 1e-2 was too much."""
OPTIMIZER_OF = {"fidelity": "muon", "adversarial": "adam"}
PIXEL_LOSS_OF = {"fidelity": "mixed", "adversarial": "charbonnier"}
TEMPORAL_WEIGHT_OF = {"fidelity": 0.0, "adversarial": 5.0}


def default_lr(objective: str, fresh: bool) -> float:
    """Peak learning rate, of weights that are ``fresh`` or not."""
    return FRESH_LEARNING_RATE if fresh and objective == "fidelity" else LEARNING_RATE_OF[objective]


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides the result, besides the footage and the machine."""

    widths: str = "pruned"
    steps: int = 20_000
    minutes: float | None = None
    """Wall time the run may take, over all its resumed parts: it ends with these or with the steps, whichever
    comes first, and everything that follows a schedule follows the one that is nearer its end."""
    batch: int = 12
    patch: int = 192
    """Hr pixels a side."""
    photo_share: float = 0.4
    """Of the windows, drawn from stills."""
    optimizer: str = "muon"
    """Or "adam", see ``optimizer.OPTIMIZERS``."""
    lr: float = 4e-4
    final_lr: float = 1e-6
    warmup: int = 500
    """Steps over which the learning rate rises."""
    decay_share: float = 0.4
    """The learning rate is constant, then falls along a half cosine over this last share of the run."""
    objective: str = "fidelity"
    """Or "adversarial": that, a perceptual loss and a discriminator, from weights trained for fidelity."""
    pixel_loss: str = "mixed"
    """Between an answer and the truth, and the teacher's answer; see ``losses.PIXEL_LOSSES``."""
    flow_weight: float = 0.1
    """Of the flow's losses, for widths that have a learned flow."""
    flow_smoothness: float = 0.05
    motion_weight: float = 0.1
    """Of the known motion of photos, beside the warp loss."""
    teacher_weight: float = 1.0
    """Of the distance to the teacher's answer, beside the distance to the truth; used with a teacher."""
    hint_weight: float = 0.01
    """Of the distance to the teacher's features, within what is learned from it: its answer counts."""
    turned_teacher: bool = False
    """The teacher sees windows turned at random, see ``imitation.Imitation``; it then gives no features."""
    temporal_weight: float = 0.0
    """Of the temporal loss, see ``losses.temporal_loss``; above 0, crops are five frames long."""
    perceptual_weight: float = 20.0
    """Of the perceptual distance to the truth, 0.02 for bicubic; used with the adversarial objective."""
    adversarial_weight: float = 0.01
    """Of the discriminator's score; used with the adversarial objective."""
    discriminator_lr: float = 1.0
    """Learning rate of the discriminator over that of the generator."""
    clip_norm: float = 0.5
    ema: float = 0.999
    seed: int = 0
    bf16: bool = field(default_factory=torch.cuda.is_available)
    """Arithmetic of convolutions: faster on a GPU, and on a CPU that has instructions for it."""
    compile: bool = False
    """By ``torch.compile``: minutes at the start, for less time per step."""
    hold: bool = True
    """On a GPU, hold all footage in its memory, and where it can be, record a step and replay it."""
    validate_every: int = 1000
    validation_segments: int = 1
