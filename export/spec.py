"""The contract: what passes between client, server and the three stages of MST-GAN.

ONNX names, TensorRT profiles and every ``config.pbtxt`` are computed from this file; nothing else
writes a tensor name, a scale or a batch size by hand. Standard library only, so that every tool can
import it. Clients do not import it: they read the same facts from the served ensemble's config.
"""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int]  # (height, width)

SCALE = 4  # hr side / lr side
WINDOW = 3  # consecutive lr frames of one request; odd, the center frame is the one upscaled
CHANNELS = 3  # RGB
MULTIPLE_OF = 4  # both lr sides; the flow lives at 1/4 resolution, deeper levels round up on their own
BATCHES = (1, 4, 4)  # windows per execution: min, opt, max of a plan's profile
MAX_BATCH = BATCHES[-1]
LR_SIZES: tuple[Size, Size, Size] = ((16, 16), (360, 640), (720, 1280))  # min, opt, max of a plan's profile
FLOW_STRIDE = 4  # lr pixels per flow pixel
INSTANCE_GROUPS = ("stream_0", "stream_1")
"""The papers' two streams: copies of each stage in flight. On two cores 9 and 26 % more frames than one, in
two runs, 2026-11-25 and 26 (sweep ``instances`` in perf/REPORT.md)."""
MAX_QUEUE_DELAY_US = 0
"""How long a batcher holds an incomplete batch. Not at all: what arrives while both instances are busy makes
batches by itself; no wait from 1 to 20 ms gained frames, and all cost latency, 2026-11-25 (sweep
``queue_delay`` in perf/REPORT.md)."""
LIVE, BATCH = 1, 2
"""Priority levels of every stage's queue; the lower goes first. Requests that name none are ``BATCH``."""
QUEUE_TIMEOUTS_US = {LIVE: 10_000_000, BATCH: 300_000_000}
"""How long a request may wait in the queue of a stage. Then Triton refuses it, and the client sends fewer at
a time: a live frame is of no use later, and a batch's sender has given up by then."""
MAX_QUEUE_SIZE = 64
"""Requests of one priority that may wait for a stage: those of four clients, which have 16 in flight each.
At 1280x720 a request that waits for the generator holds 43 MB."""
OPSET = 18  # not above: TensorRT 10.13 computes GridSample of opset 20 wrongly (NVIDIA/TensorRT#4646)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on a model boundary, batch axis first."""

    name: str
    dtype: str
    """Triton's name: ``UINT8``, ``FP16`` or ``FP32``."""
    dims: tuple[int, ...]
    """Without the batch axis; -1 = free, in (height, width) order."""
    scale: int = 1
    """Pixels of this tensor per lr pixel."""
    stride: int = 1
    """Lr pixels per pixel of this tensor."""

    def shape(self, batch: int, lr_size: Size) -> tuple[int, ...]:
        """Full shape for one batch and lr size: each -1 becomes the next side."""
        sides = iter(lr_size)
        return (batch, *(next(sides) * self.scale // self.stride if d == -1 else d for d in self.dims))


LR_WINDOW = TensorSpec("lr_window", "UINT8", (WINDOW, -1, -1, CHANNELS))
"""Frames t-1, t, t+1 as decoders give them: RGB, 0..255. Clip ends repeat their edge frame."""

FLOW = TensorSpec("flow", "FP32", (2 * (WINDOW - 1), -1, -1), stride=FLOW_STRIDE)
"""Displacement in pixels of its own resolution: t->t-1 (x, y), then t->t+1 (x, y)."""

PHASES = SCALE**2  # places within a pixel of the center frame where a neighbor's sample may lie
ALIGNED = TensorSpec("aligned", "UINT8", (CHANNELS + (WINDOW - 1) * (1 + PHASES), -1, -1))
"""t, RGB; t-1 and t+1 warped to t, gray; 0..255. Then the neighbor residuals of t-1 and of t+1,
``NEUTRAL`` = 0, see ``network.align.neighbor_residual``."""

NEUTRAL = 128  # of 0..255: the byte that stands for zero where a tensor holds signed values

SUBPIXELS = TensorSpec("subpixels", "UINT8", (CHANNELS * SCALE**2, -1, -1))
"""The hr frame before the pixel shuffle, bicubic skip included; 0..255, rounded: a quarter of the bytes."""

HR_FRAME = TensorSpec("hr_frame", "UINT8", (-1, -1, CHANNELS), scale=SCALE)
"""The upscaled frame t, RGB, 0..255."""


@dataclass(frozen=True)
class ModelSpec:
    """One composing model of the ensemble."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def graph_inputs(self) -> tuple[TensorSpec, ...]:
        """What its ONNX graph takes."""
        return self.inputs

    @property
    def graph_outputs(self) -> tuple[TensorSpec, ...]:
        """What its ONNX graph gives."""
        return self.outputs


FLOW_ALIGN = ModelSpec("flow_align", (LR_WINDOW,), (FLOW, ALIGNED))
GENERATOR = ModelSpec("generator", (LR_WINDOW, FLOW, ALIGNED), (SUBPIXELS,))
PIXEL_SHUFFLE = ModelSpec("pixel_shuffle", (SUBPIXELS,), (HR_FRAME,))

STAGES = (FLOW_ALIGN, GENERATOR, PIXEL_SHUFFLE)
ENSEMBLE = ModelSpec("mst_gan", (LR_WINDOW,), (HR_FRAME,))

PARAMETERS = {
    "scale": str(SCALE),
    "window": str(WINDOW),
    "multiple_of": str(MULTIPLE_OF),
    "min_size": "{}x{}".format(*LR_SIZES[0]),
    "max_size": "{}x{}".format(*LR_SIZES[-1]),
}
"""What the ensemble's config publishes for clients; sizes are HEIGHTxWIDTH of the lr frame."""

WEIGHTS_DIGEST, WEIGHTS_NAME, PRECISION, RELEASE = "weights_digest", "weights_name", "precision", "version"
IDENTITY = (WEIGHTS_DIGEST, WEIGHTS_NAME, PRECISION, RELEASE)
"""Further parameters of the ensemble, which ``make export`` writes, so that clients can tell servers with
different weights apart; absent where a repository was exported by release 0.1.

- ``weights_digest``: SHA-256 of the checkpoint file, 64 hex digits, as ``sha256sum`` prints it.
- ``weights_name``: the checkpoint's file name without suffix, such as ``mst_gan_pruned``.
- ``precision``: of the generator that this config serves: ``fp32``, ``fp16`` or ``int8``.
- ``version``: release of this project that exported it, such as ``0.2.0``.
"""

# The recurrent network: one frame and the state in, one frame and the state out.

LR_FRAME = TensorSpec("lr_frame", "UINT8", (-1, -1, CHANNELS))
"""The next frame of a sequence, RGB, 0..255."""
STREAM_FLOW = TensorSpec("flow", "FP32", (2, -1, -1), stride=2)
"""Displacement t->t-1 (x, y) in pixels of its own resolution."""
STREAM_ALIGNED = TensorSpec("aligned", "UINT8", (CHANNELS + 1 + PHASES, -1, -1))
"""t, RGB; t-1 warped to t, gray; 0..255. Then the neighbor residual of t-1, ``NEUTRAL`` = 0."""
START_ROWS = TensorSpec("start_rows", "FP32", (-1,))
"""1 where a sequence starts, else 0, as often as the state has rows; with ``START_COLUMNS``, its size.

Triton's batcher compares the shapes of inputs, but not of states (core: ``SetConfiguredScheduler`` of
``TritonModel`` collects ``config.input()``, ``InferenceRequest::LoadInputStates`` adds states only when a
batch is executed), and NVIDIA's ONNX Runtime backend takes all of a batch to have the shapes of its first
request (``ModelInstanceState::SetInputTensors``). A sequence that starts has a state of one pixel. In one
batch with running sequences it would spoil their states, so these two keep states of other sizes apart.
"""
START_COLUMNS = TensorSpec("start_columns", "FP32", (-1,))
"""See ``START_ROWS``."""
START = TensorSpec("start", "FP32", (1,))
"""Triton's START flag, as its sequence batcher hands it to a model."""


@dataclass(frozen=True)
class StateSpec:
    """What Triton keeps of a sequence from one request to the next (implicit state), one tensor per model."""

    input: TensorSpec
    output: TensorSpec
    """Of the same type and dims."""


@dataclass(frozen=True, kw_only=True)
class StreamSpec(ModelSpec):
    """A composing model with a state. A sequence starts with a state of zeros, of one pixel."""

    state: StateSpec
    max_batch: int
    starts: bool
    """Whether the batcher hands it ``START``."""

    @property
    def graph_inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, the state, and ``START`` where it is handed that."""
        return (*self.inputs, self.state.input, *((START,) if self.starts else ()))

    @property
    def graph_outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, and the next state."""
        return (*self.outputs, self.state.output)


def _state(name: str, dims: tuple[int, ...]) -> StateSpec:
    return StateSpec(TensorSpec(name, "UINT8", dims), TensorSpec(f"next_{name}", "UINT8", dims))


STATE_CHANNELS = 16 + PHASES  # features of the body, and the luma detail of the previous answer

STREAM_ALIGN = StreamSpec(
    "stream_align",
    (LR_FRAME,),
    (STREAM_FLOW, STREAM_ALIGNED, START_ROWS, START_COLUMNS),
    state=_state("previous", (-1, -1, CHANNELS)),
    max_batch=1,  # what it is given does not tell the state's size, so no two may meet
    starts=True,
)
STREAM_GENERATOR = StreamSpec(
    "stream_generator",
    (STREAM_FLOW, STREAM_ALIGNED, START_ROWS, START_COLUMNS),
    (SUBPIXELS,),
    state=_state("state", (STATE_CHANNELS, -1, -1)),
    max_batch=MAX_BATCH,
    starts=False,  # it learns of starts from `stream_align`
)
STREAM_STAGES = (STREAM_ALIGN, STREAM_GENERATOR)
"""Before ``PIXEL_SHUFFLE``, which windows and streams share."""
STREAM_ENSEMBLE = ModelSpec("mst_gan_stream", (LR_FRAME,), (HR_FRAME,))

MAX_IDLE_US = 60_000_000
"""After so long without a frame Triton ends a sequence and frees its state."""
SEQUENCES_PER_INSTANCE = 8
"""States that an instance holds, of up to 32 MB each at 1280x720; further sequences wait."""
STREAM_PARAMETERS = {
    **{name: value for name, value in PARAMETERS.items() if name != "window"},
    "lookahead": "0",
    "warmup": "8",
    "max_sequences": str(SEQUENCES_PER_INSTANCE * len(INSTANCE_GROUPS)),
}
"""What the streaming ensemble publishes.

- ``lookahead``: frames after t that its answer needs.
- ``warmup``: frames of a sequence after which its answers have their full quality.
- ``max_sequences``: how many are held at a time.
"""
