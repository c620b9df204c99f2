"""What the user, or a program, is told while clips are upscaled."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)
from rich.text import Text

from .pipeline import Result
from .video.source import PIPE

LINE_EVERY_S = 10.0
DRAWN_PER_S = 2  # drawing takes processor time, which a server beside us needs
EVENT_EVERY_S = 1.0


def echo(text: str, err: bool = False) -> None:
    """Print a line; bytes of file names that are no text are shown as such."""
    click.echo(text.encode("utf-8", "backslashreplace").decode(), err=err)


class _Fps(ProgressColumn):
    """Frames per second of late."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} fps")


class Progress:
    """Says nothing but what went wrong; the others build on it."""

    frames = 0
    """Written so far, of all clips."""
    _done = _done_before = 0
    _started_s = 0.0

    def started(self, dst: Path, total: int, done: int) -> None:
        """A clip begins.

        Args:
            dst: What is being made.
            total: Frames expected; 0 if nobody knows.
            done: Frames that an earlier run finished.
        """
        self._title, self._total, self._done, self._done_before = dst.name, total, done, done
        self._started_s = time.monotonic()

    def advanced(self) -> None:
        """One more frame is written."""
        self._done += 1
        self.frames += 1

    def finished(self, dst: Path, result: Result) -> None:
        """A clip is done."""

    def skipped(self, dst: Path, reason: str = "is there already") -> None:
        """A clip of many was done before, or another run is at work on it."""

    def failed(self, src: Path, reason: str) -> None:
        """A clip of many could not be done."""
        echo(f"{src}: {reason}", err=True)

    def close(self) -> None:
        """The clip has ended, well or not."""

    def fps(self) -> float:
        """Frames written per second since the clip began; 0 before the first."""
        return (self._done - self._done_before) / max(time.monotonic() - self._started_s, 1e-9)

    def _left_s(self) -> float | None:
        fps = self.fps()
        return max(0, self._total - self._done) / fps if self._total and fps else None


class ConsoleProgress(Progress):
    """A bar on a terminal, a line now and then elsewhere; on stderr, but for the results."""

    _bar: Bar | None = None

    def started(self, dst: Path, total: int, done: int) -> None:
        """Begin a bar, or count from here."""
        super().started(dst, total, done)
        self._next_line_s = self._started_s + LINE_EVERY_S
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _Fps(),
            )
            left = TimeRemainingColumn(elapsed_when_finished=True)
            self._bar = Bar(*columns, left, console=console, refresh_per_second=DRAWN_PER_S)
            self._task = self._bar.add_task(self._title, total=total or None, completed=done)
            self._bar.start()

    def advanced(self) -> None:
        """Draw."""
        super().advanced()
        if self._bar:
            self._bar.advance(self._task)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            of_total = f"/{self._total}" if self._total else ""
            left_s = self._left_s()
            left = f", {left_s:.0f} s left" if left_s else ""
            echo(f"{self._title}: frame {self._done}{of_total}, {self.fps():.1f} fps{left}", err=True)

    def finished(self, dst: Path, result: Result) -> None:
        """One line that names the bottleneck."""
        stages = ", ".join(f"{stage} {busy_s:.1f} s" for stage, busy_s in result.stages_s.items())
        slowest = max(result.stages_s, key=lambda stage: result.stages_s[stage])
        damaged = f" ({result.damaged_frames} damaged in the file)" if result.damaged_frames else ""
        cuts = f", {len(result.cuts_s)} scene cut{'s' * (len(result.cuts_s) > 1)}" if result.cuts_s else ""
        (lr_height, lr_width), (hr_height, hr_width) = result.lr_size, result.hr_size
        sizes = f"{lr_width}x{lr_height} -> {hr_width}x{hr_height}"
        echo(
            f"{dst}: {result.frames} frames{damaged}{cuts}, {sizes}, "
            f"{result.fps:.1f} fps; slowest stage: {slowest} ({stages})",
            err=dst == PIPE,
        )

    def skipped(self, dst: Path, reason: str = "is there already") -> None:
        """One line."""
        echo(f"{dst}: {reason}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()
            self._bar = None


class JsonProgress(Progress):
    """One JSON object a line on stdout."""

    def started(self, dst: Path, total: int, done: int) -> None:
        """Event ``started``."""
        super().started(dst, total, done)
        self._next_event_s = self._started_s + EVENT_EVERY_S
        self._say("started", output=str(dst), frames=total or None, frames_done=done)

    def advanced(self) -> None:
        """Event ``progress``, once in a while."""
        super().advanced()
        if time.monotonic() >= self._next_event_s:
            self._next_event_s = time.monotonic() + EVENT_EVERY_S
            self._say("progress", frames_done=self._done, fps=self.fps(), left_s=self._left_s())

    def finished(self, dst: Path, result: Result) -> None:
        """Event ``finished``."""
        self._say("finished", output=str(dst), fps=result.fps, **asdict(result))

    def skipped(self, dst: Path, reason: str = "is there already") -> None:
        """Event ``skipped``."""
        self._say("skipped", output=str(dst), reason=reason)

    def failed(self, src: Path, reason: str) -> None:
        """Event ``failed``."""
        self._say("failed", input=str(src), reason=reason)

    @staticmethod
    def _say(event: str, **facts: object) -> None:
        echo(json.dumps({"event": event, **facts}))
