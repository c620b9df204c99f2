"""Training of a network, resumable: for fidelity, by distillation, against a discriminator."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from export.checkpoint import save_checkpoint
from export.data.clips import Clip
from export.data.degradations import bi
from export.data.windows import WindowSampler, batches_from, windowed
from export.errors import ExportError
from export.network import WIDTHS, MstGan
from export.paths import atomic_write
from export.spec import CHANNELS, SCALE, WINDOW
from export.training.best_checkpoint import BestCheckpoint, validation_crops
from export.training.config import Config
from export.training.device import find_device, to_channels_last, to_device, warn_of_slow_bf16
from export.training.distillation import Distillation
from export.training.evaluate import MetricConfig, Score, evaluate_segments, mean
from export.training.gan import AdversarialLoss
from export.training.gpu import CudaGraphUpdate, GpuFootage, offsets_from
from export.training.grow import grow
from export.training.interrupt import Interrupt, deferred_interrupt
from export.training.losses import PIXEL_LOSSES, temporal_loss
from export.training.optimizer import OPTIMIZERS, resume, scheduled_rate, set_rate
from export.training.perceptual import DistilledVgg
from export.training.run_log import RunLog

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"
EMA_FILE = "ema.safetensors"
BEST_FILE = "best.safetensors"
LOG_FILE = "log.csv"
LOG_EVERY = 50
LONG = 5  # frames of a crop that holds three consecutive windows, and so three consecutive answers


class Trainer:
    """Trains one network; its folder holds all that a later run needs to go on."""

    def __init__(
        self,
        config: Config,
        clips: Sequence[Clip],
        photos: Sequence[Clip],
        validation: Sequence[Clip],
        out: Path,
        init: MstGan | None = None,
        teacher: MstGan | None = None,
        *,
        perceptual: DistilledVgg | None = None,
        metrics: MetricConfig | None = None,
    ) -> None:
        """Start a run, from ``init``'s weights if given, or resume the one in ``out``.

        Args:
            config: what decides the result.
            clips: video clips to train on.
            photos: photos and line art to train on, may be empty.
            validation: clips to score on.
            out: run folder, created if missing.
            init: weights to start from, of the same widths or smaller ones, see ``grow``.
            teacher: network, of any widths, whose answers are learned beside the truth.
            perceptual: network of the perceptual loss, for the adversarial objective.
            metrics: what validation measures besides PSNR-Y and SSIM-Y; the adversarial objective needs
                LPIPS and tOF, to choose its best checkpoint by.

        Raises:
            ExportError: ``out`` holds a run that cannot be resumed with this configuration.
        """
        self.config, self.validation, self.out = config, validation, out
        self.metrics = metrics or MetricConfig()
        self.device = find_device()
        if config.bf16:
            warn_of_slow_bf16(self.device)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        # TF32 for convolutions alone: the sampling grids of cameras over photos are products of matrices, and
        # its ten bits would misplace them by a tenth of a pixel.
        torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(config.seed)
        widths = WIDTHS[config.widths]
        self.network = to_channels_last(grow(init, widths) if init else MstGan(widths), self.device)
        self.align, self.features = self.network.flow_align.align, self.network.generator.features
        if config.compile:
            self.align, self.features = torch.compile(self.align), torch.compile(self.features)
        self.ema = to_channels_last(MstGan(widths), self.device).requires_grad_(False)
        self.ema.load_state_dict(self.network.state_dict())
        self.distillation: Distillation | None = None
        trained = list(self.network.parameters())
        if teacher:
            distillation = Distillation(teacher, widths, config.pixel_loss, config.augmented_teacher)
            self.distillation = to_channels_last(distillation, self.device)
            trained += self.distillation.adapters.parameters()
        self.optimizer = OPTIMIZERS[config.optimizer](trained, config.lr)
        self.sampler = WindowSampler(
            clips, photos, patch=config.patch, photo_share=config.photo_share, seed=config.seed,
        )  # fmt: skip
        on_gpu = config.gpu_footage and self.device.type == "cuda"
        self.gpu_footage = GpuFootage(self.sampler, self.device) if on_gpu else None
        self.adversarial: AdversarialLoss | None = None
        self.best: BestCheckpoint | None = None
        if config.objective == "adversarial":
            self.adversarial = AdversarialLoss(config, perceptual, self.device)
            self.best = BestCheckpoint()
            self.validation = validation_crops(validation)
        if self.metrics.lpips:
            self.metrics.lpips.to(self.device)
        self.length = LONG if config.temporal_weight > 0 or self.adversarial else WINDOW
        self.step = 0
        self.spent_s = 0.0
        out.mkdir(parents=True, exist_ok=True)
        if (out / STATE_FILE).exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.out / STATE_FILE, map_location=self.device, weights_only=True)
        if state["widths"] != self.config.widths:
            raise ExportError(
                f"expected {self.out} to hold a run of the {self.config.widths!r} widths, "
                f"found {state['widths']!r}; choose another --out"
            )
        found = state.get("optimizer_name", "an older version's")
        if found != self.config.optimizer:
            raise ExportError(
                f"expected {self.out / STATE_FILE} of the optimizer {self.config.optimizer!r}, found "
                f"{found!r}; choose another --out, with --init {self.out / EMA_FILE}"
            )
        optimizers = self.optimizer.state_dict(), state["optimizer"]
        mine, theirs = (len(optimizer["param_groups"][0]["params"]) for optimizer in optimizers)
        if mine != theirs:
            raise ExportError(
                f"expected {self.out} to hold a run of {mine} trained tensors, found {theirs}: it had "
                "another teacher, or none; pass that one, or choose another --out"
            )
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        resume(self.optimizer, state["optimizer"])
        if self.distillation:
            self.distillation.adapters.load_state_dict(state["adapters"])
        if self.adversarial and self.best:
            if "adversarial" not in state:
                raise ExportError(
                    f"expected {self.out} to hold an adversarial run, found one of another objective; choose "
                    f"another --out, with --init {self.out / EMA_FILE}"
                )
            self.adversarial.load_state_dict(state["adversarial"])
            self.best.load_state_dict(state["best"])
        self.step = state["step"]
        self.spent_s = state["spent_s"]
        log.info("resumed %s at step %d", self.out, self.step)

    def save(self) -> None:
        """Write the state, then the averaged weights.

        Raises:
            ExportError: the disk is full, say, or a weight is no number; the previous file is intact.
        """
        weights = [weight.detach().sum() for weight in self.network.parameters()]
        self._require_finite(torch.stack(weights).sum(), "sum of weights")
        state = {
            "widths": self.config.widths,
            "step": self.step,
            "spent_s": self.spent_s,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": self.config.optimizer,
        }
        if self.distillation:
            state["adapters"] = self.distillation.adapters.state_dict()
        if self.adversarial and self.best:
            state |= {"adversarial": self.adversarial.state_dict(), "best": self.best.state_dict()}
        with self._guard():
            with atomic_write(self.out / STATE_FILE) as partial:
                torch.save(state, partial)
            self._save_average(self.out / EMA_FILE)

    def _save_average(self, path: Path) -> None:
        ran = {"step": self.step, "spent_s": round(self.spent_s), "device": self.device.type}
        recipe = {**asdict(self.config), **ran}
        save_checkpoint(self.ema, path, {"recipe": json.dumps(recipe)})

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn a failed write into one line."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as err:  # torch reports a full disk as RuntimeError
            raise ExportError(
                f"expected to save step {self.step} to {self.out}, found {str(err).partition(chr(10))[0]}; "
                "what was saved before is intact: make room and start again to resume from it"
            ) from err

    def progress(self, step: int) -> float:
        """Share of the run that is done at ``step``, 0..1: by steps or by time, whichever is further."""
        by_steps = step / self.config.steps
        if self.config.minutes is None:
            return by_steps
        return max(by_steps, self.spent_s / (60 * self.config.minutes))

    def learning_rate(self, step: int) -> float:
        """Of the generator at ``step``, now."""
        return scheduled_rate(self.config, step, self.progress(step))

    def loss(self, hr_windows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its parts, detached; nothing here waits for the device.

        Args:
            hr_windows: (N, L, 3, H, W) float32 RGB, 0..1, on the device; L is ``length``.
        """
        o = self.config
        n, length, _, h, w = hr_windows.shape
        frames = windowed(bi(hr_windows))
        # In FP32: bf16 is too coarse for motion.
        flow, aligned, half_flow = self.align(frames)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=o.bf16):
            features = self.features(frames, flow, aligned)
            answer = self.network.generator.finish(features, frames).float()
        truth = hr_windows[:, WINDOW // 2 : length - WINDOW // 2]  # (N, L - 2, 3, H, W)
        target = F.pixel_unshuffle(truth.flatten(0, 1), SCALE)
        total = PIXEL_LOSSES[o.pixel_loss](answer, target)
        parts = {"pixel": total.detach()}
        if self.distillation:
            targets = self.distillation.targets(frames, o.bf16)
            distance, of_features = self.distillation.losses(answer, features, targets)
            total = total + o.teacher_weight * (distance + o.feature_weight * of_features)
            parts |= {"teacher": distance.detach(), "features": of_features.detach()}
        if self.length == WINDOW:
            return total, parts
        answers = F.pixel_shuffle(answer, SCALE).reshape(n, length - WINDOW + 1, CHANNELS, h, w)
        if o.temporal_weight > 0:
            temporal = temporal_loss(answers - truth, half_flow, aligned)
            total = total + o.temporal_weight * temporal
            parts["temporal"] = temporal.detach()
        if self.adversarial:
            middle = frames.unflatten(0, (n, -1))[:, answers.shape[1] // 2, WINDOW // 2]
            progress = self.progress(self.step)
            loss, more = self.adversarial.generator_loss(answers, truth, middle, self.step, progress)
            total = total + loss
            parts |= more
        return total, parts

    def train_step(self, hr_windows: Tensor) -> dict[str, float]:
        """One update; raises ExportError when the loss stops being a number."""
        set_rate(self.optimizer, self.learning_rate(self.step))
        total, parts = self.loss(hr_windows)
        # Before the backward pass: that of a warp by a flow of NaN reads memory out of bounds.
        self._require_finite(total)
        reported = {name: float(value) for name, value in parts.items()}
        self._update_weights(total)
        if self.adversarial:
            rate = self.config.discriminator_lr * self.learning_rate(self.step)
            loss = self.adversarial.discriminator_step(rate)
            self._require_finite(loss)
            reported["discriminator"] = float(loss)
        self._count_step()
        return reported

    def _update_weights(self, total: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        self.optimizer.step()

    def _count_step(self) -> None:
        self.step += 1
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        averages, currents = tuple(self.ema.parameters()), tuple(self.network.parameters())
        get_ema_multi_avg_fn(decay)(averages, currents, None)

    def _update(self, hr_windows: Tensor) -> dict[str, Tensor]:
        """The part of a step that a CUDA graph can hold: nothing in it reads a value on the host."""
        total, parts = self.loss(hr_windows)
        self._update_weights(total)
        return {"total": total.detach(), **parts}

    def _steps(self) -> Generator[dict[str, float]]:
        """Take steps without end; yields after each what is to be logged, if anything."""
        o = self.config
        if self.gpu_footage and self.can_use_graph:
            yield from self._graph_steps(self.gpu_footage)
        elif self.gpu_footage:
            for offsets in offsets_from(self.step, self.gpu_footage, o.batch, self.length):
                yield self.train_step(self.gpu_footage.cut(to_device(offsets, self.device)))
        else:
            for batch in batches_from(self.step, self.sampler, o.batch, self.length):
                yield self.train_step(batch.to(self.device))

    def _graph_steps(self, footage: GpuFootage) -> Iterator[dict[str, float]]:
        """As ``train_step``, but the device is waited for only where a row of the log is due."""
        update, sums = CudaGraphUpdate(self._update, footage), dict[str, Tensor]()
        for offsets in offsets_from(self.step, footage, self.config.batch, self.length):
            set_rate(self.optimizer, self.learning_rate(self.step))
            for name, value in update(offsets).items():
                sums[name] = sums[name] + value if name in sums else value.clone()
            self._count_step()
            if self.step % LOG_EVERY:
                yield {}
                continue
            self._require_finite(sums.pop("total"))
            yield {name: float(value) / LOG_EVERY for name, value in sums.items()}
            sums.clear()

    @property
    def can_use_graph(self) -> bool:
        """Whether a step can be a CUDA graph: not with a discriminator."""
        return not self.adversarial

    def _require_finite(self, value: Tensor, what: str = "loss") -> None:
        if not torch.isfinite(value):
            raise ExportError(
                f"expected a finite {what}, found {value.item()} at step {self.step}; the last good state is "
                f"in {self.out}: lower --lr and start again to resume from it"
            )

    def score(self) -> Score:
        """Scores of the averaged weights, the mean over the validation clips."""
        segments = self.config.validation_segments
        score = mean(evaluate_segments(self.ema, self.validation, segments, self.metrics))
        log.info(
            "step %d: PSNR-Y %.3f dB, bicubic %.3f dB, gain %+.3f dB",
            self.step, score.network.psnr_db, score.bicubic.psnr_db, score.gain_db,
        )  # fmt: skip
        return score

    def _validate(self) -> dict[str, float | None]:
        """Score, save the averaged weights if they are the best so far, and return the log's columns."""
        score = self.score()
        found = score.network
        if self.best and self.best.is_best(found, self.step):
            with self._guard():
                self._save_average(self.out / BEST_FILE)
            log.info(
                "step %d: the best so far, LPIPS %.4f, tOF %.3f px", self.step, found.lpips, found.tof_px
            )
        return {"gain_db": score.gain_db, "lpips": found.lpips, "tof_px": found.tof_px}

    def run(self) -> None:
        """Train to the end, saving and validating on the way and when interrupted.

        Ctrl-C and SIGTERM end the run after the step under way; a second one ends it at once, without saving.
        Validation and saving count against the budget of time, but for those after the last step.
        """
        with RunLog(self.out / LOG_FILE, self.progress(self.step)) as run_log, deferred_interrupt() as stop:
            if self.best and not self.best.start:
                run_log.write({"step": self.step, **self._validate()})
            steps = self._steps()
            try:
                self._run_steps(steps, run_log, stop)
            finally:
                steps.close()
            self.save()
        progress = self.progress(self.step)
        if progress < 1:
            log.info("interrupted at step %d; run the same command again to resume", self.step)
        elif self.best and not self.best.step:
            log.warning(
                "%s holds the weights that the run began with: none since was better by its rule, see %s",
                self.out / BEST_FILE, self.out / LOG_FILE,
            )  # fmt: skip

    def _run_steps(self, steps: Iterator[dict[str, float]], run_log: RunLog, interrupt: Interrupt) -> None:
        """Take steps to the end of the run, or until it is interrupted."""
        spent_before, began = self.spent_s, monotonic()
        row_step, row_s = self.step, self.spent_s
        # Between steps alone: in the middle of one, weights would be half updated.
        while self.progress(self.step) < 1 and not interrupt.requested:
            parts = next(steps)
            self.spent_s = spent_before + monotonic() - began
            progress = self.progress(self.step)
            if parts:
                run_log.add(parts, progress)
            if self.step % LOG_EVERY and progress < 1:
                continue
            row: dict[str, float | None] = {
                "step": self.step,
                "lr": self.learning_rate(self.step),
                "step_s": (self.spent_s - row_s) / (self.step - row_step),
            }
            if self.step % self.config.validate_every == 0 or progress >= 1:
                row |= self._validate()
                self.save()
                self.spent_s = spent_before + monotonic() - began
            run_log.write(row)
            row_step, row_s = self.step, self.spent_s
