"""Structured pruning: takes whole inner channels out of a trained network, and leaves a smaller, plain one.

As in the papers: a phase with a sparsity regularizer, whole channels chosen by importance, then fine-tuning
(``python -m export train`` with ``--init`` the pruned and ``--teacher`` the unpruned network).

A prunable channel is produced by rows of one convolution and consumed by columns of one other; ``LINKS``
says which, and is all that penalty, importance and slicing know of the architecture. How many channels stay
follows from the shapes of the two width tables.

*Penalty.* A group lasso (Yuan and Lin 2006; on channels, Wen et al. 2016): strength * sqrt(numbers per
channel) * norm of the channel's rows and columns, applied as its proximal step after that of the optimizer.
Adam would rescale it were it part of the loss, and the importance would measure the penalty too.

*Importance.* The first-order Taylor term (Molchanov et al. 2019): |sum of weight * gradient| over a channel's
rows, plus the same over its columns. ReLU is homogeneous, so either sum is activation * gradient summed over
the feature map: the first-order change of the loss when the channel goes. In a converged network that is zero
on average and its size is noise; under the penalty a channel that matters settles where the loss pulls as
hard as the penalty, which is what makes the term tell.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.checkpoint import save_checkpoint
from export.data.clips import Clip
from export.errors import ExportError
from export.network import MstGan, Widths, count
from export.paths import atomic_write
from export.training.config import Config
from export.training.evaluate import evaluate_segments, mean
from export.training.trainer import Trainer

log = logging.getLogger(__name__)

IMPORTANCE_FILE = "importance.safetensors"
IMPORTANCE_DECAY = 0.999  # per step: what the penalty has moved since counts less
MIN_FACTOR = 0.9  # of one shrinking step: a channel at exactly zero would have no gradient to come back by


@dataclass(frozen=True)
class Link:
    """Channels produced by one convolution, and consumed by one other and by nothing else."""

    producer: str
    """Pattern of its name; a channel is ``rows`` rows (axis 0) of weight and bias."""
    consumer: str
    """Its name, from the producer's groups; a channel is one column (axis 1) of the weight."""
    rows: int = 1
    """Four where a pixel shuffle by two lies between: it folds four consecutive channels into one."""


_BOTTLENECK = r"(generator\.encoder\.layer\d+\.\d+)"
LINKS = (
    Link(_BOTTLENECK + r"\.reduce", r"\1.spatial"),
    Link(_BOTTLENECK + r"\.spatial", r"\1.expand"),
    Link(r"(generator\.(?:context|body)\.\d+)\.conv1", r"\1.conv2"),
    Link(r"(generator)\.up2", r"\1.up1", rows=4),
)


@dataclass(frozen=True)
class Group:
    """The channels of one link in a network of given widths, and how many of them stay."""

    producer: str
    consumer: str
    rows: int
    channels: int
    kept: int

    @property
    def names(self) -> tuple[str, str, str]:
        """The tied tensors: the producer's weight and bias, the consumer's weight."""
        return f"{self.producer}.weight", f"{self.producer}.bias", f"{self.consumer}.weight"

    def sums(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per channel, (channels,) each: the sum over the producer's rows and the consumer's columns."""
        weight, bias, read = (tensors[name] for name in self.names)
        made = weight.flatten(1).sum(1) + bias
        return made.view(self.channels, self.rows).sum(1), read.sum((0, 2, 3))

    def scale_(self, tensors: Mapping[str, Tensor], factors: Tensor) -> None:
        """Multiply every channel's rows and columns, in place, by its factor; factors are (channels,)."""
        weight, bias, read = (tensors[name] for name in self.names)
        per_row = factors.repeat_interleave(self.rows)
        weight.mul_(per_row[:, None, None, None])
        bias.mul_(per_row)
        read.mul_(factors[:, None, None])

    def slice(self, state: dict[str, Tensor], channels: Tensor) -> None:
        """Leave only ``channels``, (kept,) int64, in a state dict."""
        weight, bias, read = self.names
        offsets = torch.arange(self.rows, device=channels.device)
        rows = (channels[:, None] * self.rows + offsets).flatten()
        state[weight] = state[weight].index_select(0, rows)
        state[bias] = state[bias].index_select(0, rows)
        state[read] = state[read].index_select(1, channels)


def find_groups(wide: Widths, narrow: Widths) -> list[Group]:
    """The channels to choose among on the way from one width table to another, in network order.

    Raises:
        ExportError: no channel would go, or the tables differ in more than prunable channels.
    """
    with torch.device("meta"):  # shapes are all that is wanted
        before, after = MstGan(wide).state_dict(), MstGan(narrow).state_dict()
    groups = []
    for name, weight in before.items():
        for link in LINKS:
            match = re.fullmatch(link.producer + r"\.weight", name)
            if match and name in after and len(after[name]) < len(weight):
                channels, kept = len(weight) // link.rows, len(after[name]) // link.rows
                groups.append(
                    Group(
                        name.removesuffix(".weight"), match.expand(link.consumer), link.rows, channels, kept
                    )
                )
    for group in groups:
        group.slice(before, torch.arange(group.kept, device="meta"))
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (before, after)]
    if not groups or shapes[0] != shapes[1]:
        raise ExportError(
            f"expected a checkpoint that holds more inner channels than the {narrow.name!r} widths and is "
            f"otherwise equal, found the {wide.name!r} widths; pass the unpruned network"
        )
    return groups


def taylor(group: Group, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """First-order change of the loss without each channel, (channels,), in the loss's unit, times two."""
    made, read = group.sums({name: weights[name] * gradients[name] for name in group.names})
    return made.abs() + read.abs()


def shrink_(group: Group, weights: Mapping[str, Tensor], amount: float) -> None:
    """One proximal step of the group lasso, in place.

    Args:
        group: whose channels to shrink.
        weights: by name.
        amount: by which the root mean square of a channel's numbers falls.
    """
    made, read = group.sums({name: weights[name].square() for name in group.names})
    norms = (made + read).sqrt()
    size = sum(weights[name].numel() for name in group.names) / group.channels
    factors = 1 - amount * math.sqrt(size) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
    # A bottleneck's 3x3 layer belongs to two groups, and is shrunk by each in turn.
    group.scale_(weights, factors.clamp_min(MIN_FACTOR))


class SparseTrainer(Trainer):
    """Continues training under the sparsity penalty, and accumulates the importance of channels."""

    def __init__(
        self,
        groups: Sequence[Group],
        config: Config,
        clips: Sequence[Clip],
        photos: Sequence[Clip],
        validation: Sequence[Clip],
        out: Path,
        init: MstGan,
    ) -> None:
        """As ``Trainer``.

        Args:
            groups: channels to shrink and to measure the importance of, see ``find_groups``.
            config: its ``sparsity`` is what the root mean square of a channel's numbers loses per step, over
                the learning rate, a share of Adam's step; else as for ``Trainer``, and so are the others.
            clips: video clips to train on.
            photos: photos and line art to train on, may be empty.
            validation: clips to score on.
            out: run folder.
            init: the trained network.

        Raises:
            ExportError: ``out`` holds a run without importance, or of other widths.
        """
        super().__init__(config, clips, photos, validation, out, init)
        self.groups = groups
        self.weights = dict(self.network.named_parameters())
        self.importance = {g.producer: torch.zeros(g.channels, device=self.device) for g in groups}
        if self.step:
            self._resume_importance()
        # Before the update: gradients belong to the weights as they are now.
        self.optimizer.register_step_pre_hook(lambda *_: self._accumulate_importance())
        self.optimizer.register_step_post_hook(lambda *_: self._shrink())

    @property
    def can_use_graph(self) -> bool:
        """No: how much channels shrink is a number of the host, a different one in each step."""
        return False

    def _resume_importance(self) -> None:
        path = self.out / IMPORTANCE_FILE
        found = load_file(path, device=str(self.device)) if path.exists() else {}
        if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in self.importance.items()}:
            raise ExportError(
                f"expected the channels' importance in {path}, found none that fits; {self.out} holds "
                "another run: choose another --out"
            )
        self.importance = found

    @torch.no_grad()
    def _accumulate_importance(self) -> None:
        # Clipped gradients, in all layers: an outlier among the batches counts no more than others.
        gradients = {name: w.grad for name, w in self.weights.items() if w.grad is not None}
        for group in self.groups:
            if gradients.keys() >= set(group.names):
                now = taylor(group, self.weights, gradients)
                self.importance[group.producer].lerp_(now, 1 - IMPORTANCE_DECAY)

    @torch.no_grad()
    def _shrink(self) -> None:
        for group in self.groups:
            shrink_(group, self.weights, self.config.sparsity * self.learning_rate(self.step))

    def save(self) -> None:
        """As ``Trainer.save``, then the importance; one that is a few steps older does no harm."""
        super().save()
        try:
            with atomic_write(self.out / IMPORTANCE_FILE) as partial:
                save_file(self.importance, partial)
        except (OSError, SafetensorError) as err:
            raise ExportError(
                f"expected to save the importance to {self.out}, found {err}; what was saved before is "
                "intact: make room and start again to resume from it"
            ) from err


@dataclass(frozen=True)
class LayerReport:
    """How many of one layer's channels stay."""

    layer: str
    consumer: str
    channels: int
    kept: int
    kept_importance: float
    """Share of the layer's importance, 0..1; kept / channels if importance were even."""
    removed_importance: float


def prune(
    network: MstGan, target: Widths, importance: Mapping[str, Tensor]
) -> tuple[MstGan, list[LayerReport]]:
    """Cut a network down to the most important channels of each layer.

    Args:
        network: of the wider widths; it is left as it is.
        target: widths of the answer.
        importance: per group's producer, (channels,), >= 0.

    Returns:
        The pruned network in evaluation mode on the CPU, and a report per pruned layer.

    Raises:
        ExportError: as ``find_groups``.
    """
    state = {name: value.detach().cpu() for name, value in network.state_dict().items()}
    report, unknown = [], []
    for group in find_groups(network.widths, target):
        values = importance[group.producer].detach().double().cpu()
        chosen = values.topk(group.kept).indices.sort().values
        group.slice(state, chosen)
        total = values.sum().item()
        if not total:
            unknown.append(group.producer)
        kept = values[chosen].sum().item() / total if total else 1.0  # nothing is lost where there is nothing
        report.append(LayerReport(group.producer, group.consumer, group.channels, group.kept, kept, 1 - kept))
    if unknown:
        log.warning(
            "%d layers, as %s, have no importance for the loss: which of their channels stay is arbitrary",
            len(unknown), unknown[0],
        )  # fmt: skip
    pruned = MstGan(target)
    pruned.load_state_dict(state)
    return pruned.eval().requires_grad_(False), report


def finish(trainer: SparseTrainer, target: Widths, out: Path) -> str:
    """Prune what was trained; write the checkpoint, and ``.json`` and ``.csv`` beside it.

    Returns:
        A summary of one line.

    Raises:
        ExportError: training was stopped early, or the disk is full.
    """
    config = trainer.config
    if (progress := trainer.progress(trainer.step)) < 1:
        raise ExportError(
            f"expected the whole run before channels go, found {progress:.0%} of it, {trainer.step} steps: "
            "run the same command again to resume"
        )
    pruned, layers = prune(trainer.ema, target, trainer.importance)
    scores = {}
    for stage, network in (
        ("before_pruning_db", trainer.ema),
        ("after_pruning_db", pruned.to(trainer.device)),
    ):
        scored = evaluate_segments(network, trainer.validation, config.validation_segments)
        scores[stage] = mean(scored).gain_db
    recipe = {
        **asdict(config),
        "pruned_from": trainer.network.widths.name,
        "step": trainer.step,
        "device": trainer.device.type,
        "kept_importance": {layer.layer: round(layer.kept_importance, 4) for layer in layers},
    }
    report = {
        "widths": target.name,
        "recipe": recipe,
        "psnr_y_gain": scores,
        "layers": [*map(asdict, layers)],
    }
    try:
        save_checkpoint(pruned, out, {"recipe": json.dumps(recipe)})
        out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        with out.with_suffix(".csv").open("w", newline="") as file:
            rows = csv.DictWriter(file, list(asdict(layers[0])))
            rows.writeheader()
            rows.writerows(map(asdict, layers))
    except (OSError, SafetensorError) as err:
        raise ExportError(
            f"expected to write {out} and its report, found {err}; make room, and the same command writes "
            f"them from {trainer.out}"
        ) from err
    (params, flops), (pruned_params, pruned_flops) = count(trainer.network.widths), count(target)
    worst = min(layers, key=lambda layer: layer.kept_importance)
    return (
        f"{out}: {params / 1e6:.1f} -> {pruned_params / 1e6:.1f} M parameters, {flops / 1e9:.0f} -> "
        f"{pruned_flops / 1e9:.0f} GFLOPs at 1280x720; {worst.layer} keeps the least of its importance, "
        f"{worst.kept_importance:.0%}; PSNR-Y over bicubic {scores['before_pruning_db']:+.2f} -> "
        f"{scores['after_pruning_db']:+.2f} dB before fine-tuning"
    )
