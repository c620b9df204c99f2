"""Training on sequences of frames; of a recurrent network with back-propagation through time. Resumable."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from time import monotonic

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.checkpoint import save_checkpoint
from export.data.sequences import Sequences, SequenceSampler
from export.errors import ExportError
from export.network import WIDTHS, MstGan
from export.network.stream import STREAM_WIDTHS, Aligned, StreamNetwork
from export.paths import atomic_write
from export.spec import SCALE
from export.training.interrupt import deferred_interrupt
from export.training.losses import PIXEL_LOSSES
from export.training.optimizer import OPTIMIZERS, set_rate

log = logging.getLogger(__name__)

STATE_FILE = "state.pt"
EMA_FILE = "ema.safetensors"
LOG_FILE = "log.csv"
LOG_EVERY = 20
LENGTHS = (8, 9, 10, 11, 12)  # frames with gradients
BURN_IN = (0, 0, 0, 1, 2, 3, 4, 4, 12)  # frames before them without, that give a state of some age
GROUPS = {"bbb": 0.15, "simpl": 0.04, "intel": 0.06, "mdn": 0.2}
"""Shares of clips that resemble each other."""
KEPT = ("all", "features", "detail", "none")


@dataclass(frozen=True)
class SequenceOptions:
    """What decides the result of a run, besides clips and machine."""

    widths: str = "stream"
    """A recurrent network's; or a window network's, the control: the same frames and loss."""
    batch: int = 2
    """Sequences of 40x64 lr pixels."""
    lr: float = 5e-4
    """Of Muon, the learning rate after ``warmup``."""
    until: int = 5_000_000_000
    """Lr pixels with gradients, after which the run ends."""
    decay_share: float = 0.0
    """Share of the run, its end, in which the learning rate falls to nothing (half a cosine)."""
    warmup: int = 100
    """Steps."""
    ema: float = 0.998
    optimizer: str = "muon"
    pixel_loss: str = "charbonnier_luma"
    clip_norm: float = 1.0
    kept: str = "all"
    """What of the generator's state is handed on, one of ``KEPT``: for ablations."""
    seed: int = 0


class SequenceTrainer:
    """One run; its folder holds all that a later process needs to continue it."""

    def __init__(
        self,
        options: SequenceOptions,
        sampler: SequenceSampler,
        out: Path,
        init: StreamNetwork | MstGan | None = None,
    ) -> None:
        """Start from ``init``'s weights, or where ``out`` left off.

        Raises:
            ExportError: ``out`` holds a run of other widths.
        """
        self.options, self.sampler, self.out = options, sampler, out
        torch.manual_seed(options.seed)
        self.network = init or _new(options.widths)
        self.network.requires_grad_(True).train()
        self.ema = _new(options.widths).requires_grad_(False)
        self.ema.load_state_dict(self.network.state_dict())
        self.optimizer = OPTIMIZERS[options.optimizer](self.network.parameters(), options.lr)
        self.step, self.lr_pixels, self.burn_in_pixels, self.spent_s = 0, 0, 0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        if (out / STATE_FILE).exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.out / STATE_FILE, map_location="cpu", weights_only=True)
        if state["widths"] != self.options.widths:
            raise ExportError(
                f"expected {self.out} to hold a run of the {self.options.widths!r} widths, found "
                f"{state['widths']!r}; choose another --out"
            )
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.lr_pixels, self.spent_s = state["step"], state["lr_pixels"], state["spent_s"]
        self.burn_in_pixels = state["burnt_pixels"]
        torch.set_rng_state(state["rng"])
        log.info("resumed %s at step %d, %.1f M lr pixels", self.out, self.step, self.lr_pixels / 1e6)

    def save(self) -> None:
        """Write the state, then the averaged weights; each appears whole or not at all."""
        state = {
            "widths": self.options.widths,
            "options": asdict(self.options),
            "step": self.step,
            "lr_pixels": self.lr_pixels,
            "burnt_pixels": self.burn_in_pixels,
            "spent_s": self.spent_s,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        recipe = {**asdict(self.options), "step": self.step, "lr_pixels": self.lr_pixels}
        try:
            with atomic_write(self.out / STATE_FILE) as partial:
                torch.save(state, partial)
            save_checkpoint(self.ema, self.out / EMA_FILE, {"recipe": json.dumps(recipe)})
        except (OSError, RuntimeError) as err:  # torch reports a full disk as RuntimeError
            raise ExportError(
                f"expected to save step {self.step} to {self.out}, found {str(err).partition(chr(10))[0]}; "
                "what was saved before is intact: make room and start again to resume from it"
            ) from err

    def draw(self, step: int) -> tuple[Sequences, int]:
        """The batch of a step, and how many of its first frames have no gradients."""
        rng = np.random.default_rng((self.options.seed, step, 1))
        burn_in, length = int(rng.choice(BURN_IN)), int(rng.choice(LENGTHS))
        return self.sampler.batch(step, self.options.batch, burn_in + length), burn_in

    def loss(self, batch: Sequences, burn_in: int) -> Tensor:
        """Mean over the frames with gradients."""
        frames, target = batch.lr, F.pixel_unshuffle(batch.hr, SCALE)
        previous = torch.cat((frames[:, :1], frames[:, :-1]), dim=1)
        previous = torch.where(batch.starts[:, :, None, None, None] > 0, frames, previous)
        distance = PIXEL_LOSSES[self.options.pixel_loss]
        if isinstance(self.network, MstGan):
            answers = _window_answers(self.network, frames, previous, batch.starts, burn_in)
            return distance(answers, target[:, burn_in:].flatten(0, 1))
        return self._sequence_loss(self.network, frames, previous, batch.starts, target, burn_in)

    def _sequence_loss(
        self, network: StreamNetwork, frames: Tensor, previous: Tensor, starts: Tensor, target: Tensor,
        burn_in: int,
    ) -> Tensor:  # fmt: skip
        n, length = frames.shape[:2]
        with torch.no_grad():
            aligned = network.stream_align.align(frames.flatten(0, 1), previous.flatten(0, 1))
        flow, image = (tensor.unflatten(0, (n, length)) for tensor in aligned)
        generator, distance = network.stream_generator, PIXEL_LOSSES[self.options.pixel_loss]
        state, total = generator.start(n, frames), frames.new_zeros(())
        for t in range(length):
            with torch.set_grad_enabled(t >= burn_in):
                answer, state = generator.step(Aligned(flow[:, t], image[:, t]), state, starts[:, t : t + 1])
                if self.options.kept in ("none", "detail"):
                    state = state._replace(features=torch.zeros_like(state.features))
                if self.options.kept in ("none", "features"):
                    state = state._replace(detail=torch.zeros_like(state.detail))
                if t >= burn_in:
                    total = total + distance(answer, target[:, t])
        return total / (length - burn_in)

    def learn(self, batch: Sequences, burn_in: int) -> float:
        """One update; returns the loss before it.

        Raises:
            ExportError: the loss or its gradient is not finite.
        """
        started = monotonic()
        loss = self.loss(batch, burn_in)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        value = float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip_norm)
        if not (np.isfinite(value) and bool(norm.isfinite())):
            raise ExportError(
                f"expected a finite loss and gradient at step {self.step}, found a loss of {value}; resume "
                "from the last checkpoint with a lower --lr"
            )
        set_rate(self.optimizer, self._rate())
        self.optimizer.step()
        # A short average first, so that it forgets the beginning.
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, new in zip(self.ema.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
        n, length, _, h, w = batch.hr.shape
        of_frame = n * (h // SCALE) * (w // SCALE)
        self.step += 1
        self.lr_pixels += of_frame * (length - burn_in)
        self.burn_in_pixels += of_frame * burn_in
        self.spent_s += monotonic() - started
        return value

    def _rate(self) -> float:
        rises = min(1.0, (self.step + 1) / max(1, self.options.warmup))
        left = max(0.0, 1 - self.lr_pixels / self.options.until)
        falls = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / max(self.options.decay_share, 1e-9)))
        return self.options.lr * rises * falls

    def run(self, save_every_s: float) -> None:
        """Train to the end of the run, or Ctrl-C or SIGTERM; saves at the end."""
        losses: list[float] = []
        saved = monotonic()
        with deferred_interrupt() as interrupt:
            for batch, burn_in in self._batches():
                losses.append(self.learn(batch, burn_in))
                if self.step % LOG_EVERY == 0:
                    self._log(float(np.mean(losses)))
                    losses.clear()
                done = interrupt.requested or self.lr_pixels >= self.options.until
                if done or monotonic() - saved > save_every_s:
                    self.save()
                    saved = monotonic()
                if done:
                    return

    def _batches(self) -> Iterator[tuple[Sequences, int]]:
        """Each is made while the one before is learned from."""
        with ThreadPoolExecutor(1) as loader:
            pending = loader.submit(self.draw, self.step)
            for later in count(self.step + 1):
                batch = pending.result()
                pending = loader.submit(self.draw, later)
                yield batch

    def _log(self, loss: float) -> None:
        path = self.out / LOG_FILE
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(("step", "lr_pixels", "burn_in_pixels", "spent_s", "loss"))
            row = self.step, self.lr_pixels, self.burn_in_pixels, round(self.spent_s, 1), f"{loss:.6f}"
            writer.writerow(row)


def _new(widths: str) -> StreamNetwork | MstGan:
    return StreamNetwork(STREAM_WIDTHS[widths]) if widths in STREAM_WIDTHS else MstGan(WIDTHS[widths])


def _window_answers(
    network: MstGan, frames: Tensor, previous: Tensor, starts: Tensor, burn_in: int
) -> Tensor:
    """Sub-pixels (N * (T - burn_in), 48, h, w) of windows; sequences repeat their first and last frame."""
    following = torch.cat((frames[:, 1:], frames[:, -1:]), dim=1)
    ends = torch.cat((starts[:, 1:], starts.new_ones(len(starts), 1)), dim=1)
    following = torch.where(ends[:, :, None, None, None] > 0, frames, following)
    windows = torch.stack((previous, frames, following), dim=2)[:, burn_in:].flatten(0, 1)
    with torch.no_grad():
        flow, aligned, _ = network.flow_align.align(windows)
    return network.generator.generate(windows, flow, aligned)
