"""Training of the generator alone, resumable: for fidelity, for its flow, or after a teacher."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor

from export.checkpoint import save_checkpoint
from export.errors import ExportError
from export.network import WIDTHS, MstGan
from export.spec import SCALE
from export.training.evaluation import evaluate, mean
from export.training.footage import Clip
from export.training.losses import charbonnier, flow_loss, motion_loss
from export.training.windows import Batch, WindowSampler, downscale

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"
EMA_FILE = "ema.safetensors"
LOG_FILE = "log.csv"
LOG_EVERY = 50


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides the result, besides the footage."""

    widths: str = "pruned"
    steps: int = 20_000
    batch: int = 12
    patch: int = 192
    """Hr pixels a side."""
    photo_share: float = 0.3
    lr: float = 4e-4
    final_lr: float = 1e-6
    warmup: int = 500
    decay_share: float = 0.4
    """The learning rate is constant, then falls along a half cosine over this last share of the steps."""
    objective: str = "fidelity"
    """Or "flow": the flow alone, which is cheap and pays before the generator learns to use it."""
    flow_weight: float = 0.1
    flow_smoothness: float = 0.05
    motion_weight: float = 0.1
    """Of the known motion of photos, beside the warp loss."""
    teacher_weight: float = 1.0
    """Of the distance to the teacher's answer, beside the distance to the truth; used with a teacher."""
    flow_lr: float = 1.0
    """Learning rate of the flow over that of the generator."""
    freeze_flow: int = 0
    """Steps before the flow is trained: a good flow outlives a generator that still learns to use it."""
    clip_norm: float = 0.5
    ema: float = 0.999
    seed: int = 0
    bf16: bool = True
    validate_every: int = 1000
    validation_segments: int = 1


class Trainer:
    """Trains one network; its folder holds all that a later run needs to go on."""

    def __init__(
        self,
        options: TrainOptions,
        clips: Sequence[Clip],
        photos: Sequence[Clip],
        validation: Sequence[Clip],
        out: Path,
        init: MstGan | None = None,
        teacher: MstGan | None = None,
    ) -> None:
        """Start afresh, from ``init``'s weights, or where ``out`` left off.

        Args:
            options: what decides the result.
            clips: footage to train on.
            photos: still images to train on, may be empty.
            validation: footage to score on.
            out: run folder, created if missing.
            init: weights to start from, of the same widths.
            teacher: a network, of any widths, whose answers are learned beside the truth.

        Raises:
            ExportError: ``out`` holds a run that these options cannot go on with.
        """
        self.options, self.validation, self.out = options, validation, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        self.network = MstGan(WIDTHS[options.widths]).to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
        if init:
            self.network.load_state_dict(init.state_dict())
        self.ema = MstGan(self.network.widths).to(self.device)
        self.ema.load_state_dict(self.network.state_dict())
        self.teacher = teacher.to(self.device).eval().requires_grad_(False) if teacher else None
        groups = [
            {"params": list(self.network.flow_align.parameters()), "scale": options.flow_lr},
            {"params": list(self.network.generator.parameters()), "scale": 1.0},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=options.lr, betas=(0.9, 0.99), fused=True)
        self.sampler = WindowSampler(
            clips, photos, patch=options.patch, photo_share=options.photo_share, seed=options.seed
        )
        self.step = 0
        out.mkdir(parents=True, exist_ok=True)
        if (out / STATE_FILE).exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.out / STATE_FILE, map_location=self.device, weights_only=True)
        if state["widths"] != self.options.widths:
            raise ExportError(
                f"expected {self.out} to hold a run of the {self.options.widths!r} widths, "
                f"found {state['widths']!r}; choose another --out"
            )
        found = len(state["optimizer"]["param_groups"])
        if found != len(self.optimizer.param_groups):
            raise ExportError(
                f"expected {self.out / STATE_FILE} with {len(self.optimizer.param_groups)} learning rates, "
                f"found {found}: an older version wrote it; choose another --out, with --init "
                f"{self.out / EMA_FILE}"
            )
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        # The options of this run count, as for the learning rate itself.
        self.optimizer.param_groups[0]["scale"] = self.options.flow_lr
        self.step = state["step"]
        log.info("resumed %s at step %d", self.out, self.step)

    def save(self) -> None:
        """Write the state, then the averaged weights.

        Raises:
            ExportError: the disk is full, say; the previous file is intact.
        """
        partial = self.out / f"{STATE_FILE}.part"
        state = {
            "widths": self.options.widths,
            "step": self.step,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        recipe = {
            **asdict(self.options),
            "teacher": self.teacher.widths.name if self.teacher else None,
            "step": self.step,
            "device": self.device.type,
        }
        try:
            torch.save(state, partial)
            os.replace(partial, self.out / STATE_FILE)
            save_checkpoint(self.ema, self.out / EMA_FILE, {"recipe": json.dumps(recipe)})
        except (OSError, RuntimeError, SafetensorError) as err:  # torch reports a full disk as RuntimeError
            partial.unlink(missing_ok=True)
            raise ExportError(
                f"expected to save step {self.step} to {self.out}, found {str(err).partition(chr(10))[0]}; "
                "what was saved before is intact: make room and start again to resume from it"
            ) from err

    def learning_rate(self, step: int) -> float:
        """Warm-up, plateau, half cosine: the plateau lets a run be prolonged without a restart."""
        o = self.options
        decay_steps = o.steps * o.decay_share
        progress = max(0.0, (step - (o.steps - decay_steps)) / decay_steps)
        cosine = o.final_lr + (o.lr - o.final_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        return cosine * min(1.0, (step + 1) / o.warmup)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Total loss and its parts."""
        n, t, c, h, w = batch.hr_windows.shape
        lr_size = (h // SCALE, w // SCALE)
        frames = downscale(batch.hr_windows.reshape(n * t, c, h, w)).reshape(n, t, c, *lr_size)
        # In FP32: bf16 is too coarse for motion.
        flow, aligned, estimates = self.network.flow_align.align(frames)
        motion = flow_loss(estimates, self.options.flow_smoothness)
        motion = motion + self.options.motion_weight * motion_loss(estimates, batch.motion, lr_size)
        if self.options.objective == "flow":
            return motion, {"flow": motion.item()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            subpixels = self.network.generator.generate(frames, flow, aligned)
        answer = subpixels.float()
        pixel = charbonnier(answer, F.pixel_unshuffle(batch.hr_windows[:, t // 2], SCALE))
        total = pixel + self.options.flow_weight * motion
        parts = {"pixel": pixel.item(), "flow": motion.item()}
        if self.teacher:
            imitation = charbonnier(answer, self._taught(self.teacher, frames))
            total = total + self.options.teacher_weight * imitation
            parts["teacher"] = imitation.item()
        return total, parts

    @torch.no_grad()
    def _taught(self, teacher: MstGan, frames: Tensor) -> Tensor:
        """The teacher's sub-pixels, (N, 48, h, w) float32, in the arithmetic of the student."""
        flow, aligned, _ = teacher.flow_align.align(frames)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            return teacher.generator.generate(frames, flow, aligned).float()

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One update; raises ExportError when the loss stops being a number."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.learning_rate(self.step)
        # Without gradients Adam leaves the parameters and their moments alone, and the step is cheaper.
        self.network.flow_align.requires_grad_(self.step >= self.options.freeze_flow)
        self.optimizer.zero_grad(set_to_none=True)
        total, parts = self.loss(batch)
        if not torch.isfinite(total):
            raise ExportError(
                f"expected a finite loss, found {total.item()} at step {self.step}; the last good state is "
                f"in {self.out}: lower --lr and start again to resume from it"
            )
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip_norm)
        self.optimizer.step()
        self.step += 1
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, current in zip(self.ema.parameters(), self.network.parameters(), strict=True):
                average.lerp_(current, 1 - decay)
        return parts

    def validate(self) -> float:
        """Mean PSNR-Y gain over bicubic, in dB, of the averaged weights."""
        score = mean(evaluate(self.ema, self.validation, self.options.validation_segments))
        log.info(
            "step %d: PSNR-Y %.3f dB, bicubic %.3f dB, gain %+.3f dB",
            self.step, score.psnr_y_db, score.bicubic_psnr_y_db, score.gain_db,
        )  # fmt: skip
        return score.gain_db

    def run(self) -> None:
        """Train to the last step, saving and validating on the way and when interrupted."""
        o = self.options
        log_path = self.out / LOG_FILE
        fields = ["step", "pixel", "teacher", "flow", "lr", "step_s", "gain_db"]
        is_new = not log_path.exists()
        if not is_new:
            with log_path.open(newline="") as log_file:
                fields = next(csv.reader(log_file), fields)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            log_path.open("a", newline="") as log_file,
            ThreadPoolExecutor(1) as loader,
            Progress(*columns) as progress,
        ):
            rows = csv.DictWriter(log_file, fields, extrasaction="ignore")
            if is_new:
                rows.writeheader()
            task = progress.add_task("training", total=o.steps, completed=self.step)
            pending = loader.submit(self.sampler.batch, self.step, o.batch)
            sums: dict[str, float] = defaultdict(float)
            started = time.perf_counter()
            try:
                while self.step < o.steps:
                    batch = Batch(*(tensor.to(self.device) for tensor in pending.result()))
                    pending = loader.submit(self.sampler.batch, self.step + 1, o.batch)
                    for name, value in self.train_step(batch).items():
                        sums[name] += value / LOG_EVERY
                    progress.advance(task)
                    if self.step % LOG_EVERY:
                        continue
                    step_s = (time.perf_counter() - started) / LOG_EVERY
                    described = "  ".join(f"{name} {value:.5f}" for name, value in sums.items())
                    progress.update(task, description=described)
                    row: dict[str, object] = {
                        "step": self.step,
                        "lr": self.learning_rate(self.step),
                        "step_s": step_s,
                    }
                    row |= sums
                    if self.step % o.validate_every == 0 or self.step == o.steps:
                        row["gain_db"] = self.validate()
                        self.save()
                    rows.writerow(row)
                    log_file.flush()
                    sums.clear()
                    started = time.perf_counter()
            except KeyboardInterrupt:
                log.info("interrupted at step %d; the same command goes on from here", self.step)
            self.save()
