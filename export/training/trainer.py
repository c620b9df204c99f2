"""Stage 1 of the papers' training, fidelity: the generator alone, pixel and flow losses, resumable."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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
    ) -> None:
        """Start afresh, from ``init``'s weights, or where ``out`` left off."""
        self.options, self.validation, self.out = options, validation, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        self.network = MstGan(WIDTHS[options.widths]).to(self.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
        if init:
            self.network.load_state_dict(init.state_dict())
        self.ema = MstGan(self.network.widths).to(self.device)
        self.ema.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=options.lr, betas=(0.9, 0.99), fused=True
        )
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
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        log.info("resumed %s at step %d", self.out, self.step)

    def save(self) -> None:
        """Write the state, then the averaged weights; a full disk leaves the previous ones."""
        partial = self.out / f"{STATE_FILE}.part"
        torch.save(
            {
                "widths": self.options.widths,
                "step": self.step,
                "network": self.network.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            partial,
        )
        os.replace(partial, self.out / STATE_FILE)
        recipe = json.dumps({**asdict(self.options), "step": self.step, "device": self.device.type})
        save_checkpoint(self.ema, self.out / EMA_FILE, {"recipe": recipe})

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
        pixel = charbonnier(subpixels.float(), F.pixel_unshuffle(batch.hr_windows[:, t // 2], SCALE))
        return pixel + self.options.flow_weight * motion, {"pixel": pixel.item(), "flow": motion.item()}

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One update; raises ExportError when the loss stops being a number."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
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
        fields = ["step", "pixel", "flow", "lr", "step_s", "gain_db"]
        is_new = not log_path.exists()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            log_path.open("a", newline="") as log_file,
            ThreadPoolExecutor(1) as loader,
            Progress(*columns) as progress,
        ):
            rows = csv.DictWriter(log_file, fields)
            if is_new:
                rows.writeheader()
            task = progress.add_task("training", total=o.steps, completed=self.step)
            pending = loader.submit(self.sampler.batch, self.step, o.batch)
            sums: dict[str, float] = {"pixel": 0.0, "flow": 0.0}
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
                    progress.update(task, description=f"pixel {sums['pixel']:.5f}  flow {sums['flow']:.5f}")
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
                    sums = dict.fromkeys(sums, 0.0)
                    started = time.perf_counter()
            except KeyboardInterrupt:
                log.info("interrupted at step %d; the same command goes on from here", self.step)
            self.save()
