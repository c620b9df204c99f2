"""One sequence on its way through a server that keeps a state: frame by frame, each after the last answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from tritonclient.utils import InferenceServerException

from ..frames.sequences import FrameSequence
from ..frames.windows import Image
from .faults import Fault, fault_of
from .trail import Tag, new_sequence_id

Done = Callable[["Image | None", "InferenceServerException | None"], None]
Cancel = Callable[[], None]
LOST_STATE = "START"  # in what Triton and its backends say of a sequence that they do not know


class SequenceCall:
    """Sends the frames of a sequence, and hands on its answers, or the first error.

    Triton sends the requests of a sequence to one instance in the order in which they come, and two of them
    may overtake each other on their way there: so there is one at a time, and many sequences keep a server
    busy. A sequence fails as a whole, and is begun again under another id.

    Args:
        ask: Sends one frame, as ``Server.ask`` does.
        sequence: The frames.
        done: Called once, with ((T - skip, H * scale, W * scale, 3) uint8 RGB, None) or (None, error).
        tag: What goes with it; ids of requests end with the frame's number in the sequence, from 0.
    """

    def __init__(
        self, ask: Callable[[Image, Done, Tag], Cancel], sequence: FrameSequence, done: Done, tag: Tag
    ) -> None:
        self._ask, self._sequence, self._done, self._tag = ask, sequence, done, tag
        self._id = new_sequence_id()
        self._answers: list[Image] = []
        self._sent = 0
        self._is_given_up = threading.Event()

    def begin(self) -> Cancel:
        """Send the first frame; returns what gives the sequence up."""
        self._send()
        return self._is_given_up.set

    def _send(self) -> None:
        """Send the next frame: the last one if the sequence is given up, for the server to forget it."""
        index, frames = self._sent, self._sequence.frames
        self._sent += 1
        is_end = self._sent == len(frames) or self._is_given_up.is_set()
        tag = replace(
            self._tag,
            request_id=f"{self._tag.request_id}-{index}",
            sequence=self._id,
            is_start=index == 0,
            is_end=is_end,
        )
        self._ask(frames[index : index + 1], lambda hr, error: self._answered(hr, error, index, is_end), tag)

    def _answered(
        self, hr: Image | None, error: InferenceServerException | None, index: int, is_end: bool
    ) -> None:
        if error is not None:
            if index and LOST_STATE in (error.message() or ""):
                # It was started again, or has freed the state: to be looked after, and begun anew.
                error = InferenceServerException(error.message(), status="StatusCode.UNAVAILABLE")
            self._finish(None, error)
            if not is_end and fault_of(error) is not Fault.LOST:
                self._is_given_up.set()
                self._send()
            return
        if index >= self._sequence.skip:
            assert hr is not None
            self._answers.append(hr)
        if not is_end:
            self._send()
        elif self._sent < len(self._sequence.frames):
            self._finish(None, InferenceServerException("given up", status="StatusCode.CANCELLED"))
        elif self._answers:
            self._finish(np.stack(self._answers), None)

    def _finish(self, hr: Image | None, error: InferenceServerException | None) -> None:
        """Tell who asked, once."""
        done, self._done = self._done, _nobody
        done(hr, error)


def _nobody(hr: Image | None, error: InferenceServerException | None) -> None:
    pass
