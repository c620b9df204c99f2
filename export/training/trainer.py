"""Training of a network, resumable: for fidelity, for a teacher, against a discriminator."""

from __future__ import annotations

import json
import logging
import math
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
from export.data.windows import Batch, WindowSampler, batches_from, windowed
from export.errors import ExportError
from export.folders import written_whole
from export.network import WIDTHS, MstGan
from export.spec import CHANNELS, SCALE, WINDOW
from export.training.adversarial import Adversary
from export.training.device import find_device, placed, placed_all, warn_of_slow_bf16
from export.training.evaluation import Instruments, Score, evaluate, mean
from export.training.grow import grow
from export.training.held import HeldFootage
from export.training.imitation import Imitation, Teacher
from export.training.losses import PIXEL_LOSSES, flow_loss, motion_loss, temporal_loss
from export.training.optimizer import OPTIMIZERS, resume, set_rate
from export.training.options import TrainOptions
from export.training.perceptual import DistilledVgg
from export.training.recorded import RecordedUpdate, located_from
from export.training.run_log import RunLog
from export.training.selection import Selection, watched

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
        options: TrainOptions,
        clips: Sequence[Clip],
        photos: Sequence[Clip],
        validation: Sequence[Clip],
        out: Path,
        init: MstGan | None = None,
        teachers: Sequence[Teacher] = (),
        *,
        perceptual: DistilledVgg | None = None,
        instruments: Instruments | None = None,
    ) -> None:
        """Start afresh, from ``init``'s weights, or where ``out`` left off.

        Args:
            options: what decides the result.
            clips: footage to train on.
            photos: still images to train on, may be empty.
            validation: footage to score on.
            out: run folder, created if missing.
            init: weights to start from, of the same widths or smaller ones, see ``grow``.
            teachers: networks, of any widths, whose mean answer is learned beside the truth.
            perceptual: network of the perceptual loss, for the adversarial objective.
            instruments: what validation measures besides PSNR-Y and SSIM-Y; the adversarial objective needs
                LPIPS and tOF, to choose its best checkpoint by.

        Raises:
            ExportError: ``out`` holds a run that these options cannot go on with.
        """
        self.options, self.validation, self.out = options, validation, out
        self.instruments = instruments or Instruments()
        self.device = find_device()
        if options.bf16:
            warn_of_slow_bf16(self.device)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        # TF32 for convolutions alone: grids of the photos' known motion are products of matrices, and its
        # ten bits would misplace them by a tenth of a pixel.
        torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(options.seed)
        widths = WIDTHS[options.widths]
        self.network = placed(grow(init, widths) if init else MstGan(widths), self.device)
        self.align, self.features = self.network.flow_align.align, self.network.generator.features
        if options.compile:
            self.align, self.features = torch.compile(self.align), torch.compile(self.features)
        self.ema = placed(MstGan(widths), self.device).requires_grad_(False)
        self.ema.load_state_dict(self.network.state_dict())
        how = options.pixel_loss, options.turned_teacher
        self.imitation = placed(Imitation(teachers, widths, *how), self.device) if teachers else None
        learned = list(self.network.parameters())
        if self.imitation:
            learned += self.imitation.adapters.parameters()
        self.optimizer = OPTIMIZERS[options.optimizer](learned, options.lr)
        self.sampler = WindowSampler(
            clips, photos, patch=options.patch, photo_share=options.photo_share, seed=options.seed,
        )  # fmt: skip
        is_held = options.hold and self.device.type == "cuda"
        self.footage = HeldFootage(self.sampler, self.device) if is_held else None
        self.adversary: Adversary | None = None
        self.selection: Selection | None = None
        if options.objective == "adversarial":
            self.adversary = Adversary(options, perceptual, self.device)
            self.selection = Selection()
            self.validation = watched(validation)
        if self.instruments.lpips:
            self.instruments.lpips.to(self.device)
        self.length = LONG if options.temporal_weight > 0 or self.adversary else WINDOW
        self.step = 0
        self.spent_s = 0.0
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
        found = state.get("optimizer_name", "an older version's")
        if found != self.options.optimizer:
            raise ExportError(
                f"expected {self.out / STATE_FILE} of the optimiser {self.options.optimizer!r}, found "
                f"{found!r}; choose another --out, with --init {self.out / EMA_FILE}"
            )
        optimizers = self.optimizer.state_dict(), state["optimizer"]
        mine, theirs = (len(optimizer["param_groups"][0]["params"]) for optimizer in optimizers)
        if mine != theirs:
            raise ExportError(
                f"expected {self.out} to hold a run of {mine} trained tensors, found {theirs}: it had "
                "another teacher, or none; start it again with that, or choose another --out"
            )
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        resume(self.optimizer, state["optimizer"])
        if self.imitation:
            self.imitation.adapters.load_state_dict(state["adapters"])
        if self.adversary and self.selection:
            if "adversary" not in state:
                raise ExportError(
                    f"expected {self.out} to hold an adversarial run, found one of another objective; choose "
                    f"another --out, with --init {self.out / EMA_FILE}"
                )
            self.adversary.load_state_dict(state["adversary"])
            self.selection.load_state_dict(state["selection"])
        self.step = state["step"]
        self.spent_s = state.get("spent_s", 0.0)  # versions before it had no budget of time
        log.info("resumed %s at step %d", self.out, self.step)

    def save(self) -> None:
        """Write the state, then the averaged weights.

        Raises:
            ExportError: the disk is full, say, or a weight is no number; the previous file is intact.
        """
        weights = [weight.detach().sum() for weight in self.network.parameters()]
        self._require_finite(torch.stack(weights).sum(), "sum of weights")
        state = {
            "widths": self.options.widths,
            "step": self.step,
            "spent_s": self.spent_s,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": self.options.optimizer,
        }
        if self.imitation:
            state["adapters"] = self.imitation.adapters.state_dict()
        if self.adversary and self.selection:
            state |= {"adversary": self.adversary.state_dict(), "selection": self.selection.state_dict()}
        with self._guard():
            with written_whole(self.out / STATE_FILE) as partial:
                torch.save(state, partial)
            self._save_average(self.out / EMA_FILE)

    def _save_average(self, path: Path) -> None:
        recipe = {
            **asdict(self.options),
            "teachers": self.imitation.names if self.imitation else [],
            "step": self.step,
            "spent_s": round(self.spent_s),
            "device": self.device.type,
        }
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
        """How much of the run lies behind ``step``, now: 0..1, by steps or by time, whichever is further."""
        by_steps = step / self.options.steps
        if self.options.minutes is None:
            return by_steps
        return max(by_steps, self.spent_s / (60 * self.options.minutes))

    def learning_rate(self, step: int) -> float:
        """Warm-up, plateau, half cosine: the plateau lets a run be prolonged without a restart."""
        o = self.options
        decay = max(0.0, (self.progress(step) - (1 - o.decay_share)) / o.decay_share)
        cosine = o.final_lr + (o.lr - o.final_lr) * (1 + math.cos(math.pi * min(decay, 1.0))) / 2
        return cosine * min(1.0, (step + 1) / max(o.warmup, 1))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its parts, detached; nothing here waits for the device."""
        o = self.options
        n, length, _, h, w = batch.hr_windows.shape
        lr_size = (h // SCALE, w // SCALE)
        frames, motion_known = windowed(bi(batch.hr_windows), batch.motion)
        # In FP32: bf16 is too coarse for motion.
        flow, aligned, estimate = self.align(frames)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=o.bf16):
            features = self.features(frames, flow, aligned)
            answer = self.network.generator.finish(features, frames).float()
        truth = batch.hr_windows[:, WINDOW // 2 : length - WINDOW // 2]  # (N, L - 2, 3, H, W)
        target = F.pixel_unshuffle(truth.flatten(0, 1), SCALE)
        total = PIXEL_LOSSES[o.pixel_loss](answer, target)
        parts = {"pixel": total.detach()}
        if self.network.widths.flow:  # calculus has nothing to learn
            motion = flow_loss(estimate, o.flow_smoothness)
            motion = motion + o.motion_weight * motion_loss(estimate, motion_known, lr_size)
            total = total + o.flow_weight * motion
            parts["flow"] = motion.detach()
        if self.imitation:
            taught = self.imitation.taught(frames, o.bf16)
            distance, hints = self.imitation.distances(answer, features, taught)
            total = total + o.teacher_weight * (distance + o.hint_weight * hints)
            parts |= {"teacher": distance.detach(), "hints": hints.detach()}
        if self.length == WINDOW:
            return total, parts
        answers = F.pixel_shuffle(answer, SCALE).reshape(n, length - WINDOW + 1, CHANNELS, h, w)
        if o.temporal_weight > 0:
            temporal = temporal_loss(answers - truth, estimate.flow, aligned)
            total = total + o.temporal_weight * temporal
            parts["temporal"] = temporal.detach()
        if self.adversary:
            middle = frames.unflatten(0, (n, -1))[:, answers.shape[1] // 2, WINDOW // 2]
            verdict, more = self.adversary.judge(answers, truth, middle, self.step, self.progress(self.step))
            total = total + verdict
            parts |= more
        return total, parts

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One update; raises ExportError when the loss stops being a number."""
        set_rate(self.optimizer, self.learning_rate(self.step))
        total, parts = self.loss(batch)
        # Here a step waits for the device. Not later: the backward pass of a warp by a flow that is not a
        # number reads memory that is not its own.
        self._require_finite(total)
        reported = {name: float(value) for name, value in parts.items()}
        self._descend(total)
        if self.adversary:
            rate = self.options.discriminator_lr * self.learning_rate(self.step)
            loss = self.adversary.learn(rate)
            self._require_finite(loss)
            reported["discriminator"] = float(loss)
        self._count_step()
        return reported

    def _descend(self, total: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip_norm)
        self.optimizer.step()

    def _count_step(self) -> None:
        self.step += 1
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        averages, currents = tuple(self.ema.parameters()), tuple(self.network.parameters())
        get_ema_multi_avg_fn(decay)(averages, currents, None)

    def _update(self, batch: Batch) -> dict[str, Tensor]:
        """The part of a step that can be recorded: nothing in it looks at a number."""
        total, parts = self.loss(batch)
        self._descend(total)
        return {"total": total.detach(), **parts}

    def _steps(self) -> Generator[dict[str, float]]:
        """Take steps for ever; after each comes what is to be logged, if anything."""
        o = self.options
        if self.footage and self.can_record:
            yield from self._recorded_steps(self.footage)
        elif self.footage:
            for located in located_from(self.step, self.footage, o.batch, self.length):
                yield self.train_step(self.footage.cut(placed_all(located, self.device)))
        else:
            for batch in batches_from(self.step, self.sampler, o.batch, self.length):
                yield self.train_step(placed_all(batch, self.device))

    def _recorded_steps(self, footage: HeldFootage) -> Iterator[dict[str, float]]:
        """As ``train_step``, but the device is waited for only where a row of the log is due."""
        update, sums = RecordedUpdate(self._update, footage), dict[str, Tensor]()
        for located in located_from(self.step, footage, self.options.batch, self.length):
            set_rate(self.optimizer, self.learning_rate(self.step))
            for name, value in update(located).items():
                sums[name] = sums[name] + value if name in sums else value.clone()
            self._count_step()
            if self.step % LOG_EVERY:
                yield {}
                continue
            self._require_finite(sums.pop("total"))
            yield {name: float(value) / LOG_EVERY for name, value in sums.items()}
            sums.clear()

    @property
    def can_record(self) -> bool:
        """Whether a step can be a CUDA graph: not with a discriminator, nor where a flow is learned."""
        return not self.adversary and not self.network.widths.flow

    def _require_finite(self, value: Tensor, what: str = "loss") -> None:
        if not torch.isfinite(value):
            raise ExportError(
                f"expected a finite {what}, found {value.item()} at step {self.step}; the last good state is "
                f"in {self.out}: lower --lr and start again to resume from it"
            )

    def score(self) -> Score:
        """Scores of the averaged weights, the mean over the validation clips."""
        score = mean(evaluate(self.ema, self.validation, self.options.validation_segments, self.instruments))
        log.info(
            "step %d: PSNR-Y %.3f dB, bicubic %.3f dB, gain %+.3f dB",
            self.step, score.psnr_y_db, score.bicubic_psnr_y_db, score.gain_db,
        )  # fmt: skip
        return score

    def _watch(self) -> dict[str, float | None]:
        """Score, keep the averaged weights if they are the best so far, and tell the log's columns."""
        score = self.score()
        found = score.network
        if self.selection and self.selection.admit(found, self.step):
            with self._guard():
                self._save_average(self.out / BEST_FILE)
            log.info(
                "step %d: the best so far, LPIPS %.4f, tOF %.3f px", self.step, found.lpips, found.tof_px
            )
        return {"gain_db": score.gain_db, "lpips": found.lpips, "tof_px": found.tof_px}

    def run(self) -> None:
        """Train to the end, saving and validating on the way and when interrupted.

        Validation and saving count against the budget of time, but for those after the last step.
        """
        o = self.options
        with RunLog(self.out / LOG_FILE, self.progress(self.step)) as run_log:
            spent_before, began = self.spent_s, monotonic()
            row_step, row_s = self.step, self.spent_s
            if self.selection and not self.selection.start:
                run_log.write({"step": self.step, **self._watch()})
            steps = self._steps()
            try:
                while self.progress(self.step) < 1:
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
                    if self.step % o.validate_every == 0 or progress >= 1:
                        row |= self._watch()
                        self.save()
                        self.spent_s = spent_before + monotonic() - began
                    run_log.write(row)
                    row_step, row_s = self.step, self.spent_s
            except KeyboardInterrupt:
                log.info("interrupted at step %d; the same command goes on from here", self.step)
            finally:
                steps.close()
            self.save()
            if self.selection and not self.selection.best_step and self.progress(self.step) >= 1:
                log.warning(
                    "%s holds the weights that the run began with: none since was better by its rule, see %s",
                    self.out / BEST_FILE, self.out / LOG_FILE,
                )  # fmt: skip
