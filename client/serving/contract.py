"""What a served ensemble takes and gives, read from its own model config."""

from __future__ import annotations

from dataclasses import dataclass

from tritonclient.grpc.model_config_pb2 import TYPE_UINT8, ModelConfig, ModelInstanceGroup, ModelParameter

from ..errors import UpscaleError
from ..frames.windows import Size
from .identity import IDENTITY_PARAMETERS

WARMUP = "warmup"  # the parameter that recurrent models have, and only they


@dataclass(frozen=True)
class Contract:
    """What a served ensemble takes and gives."""

    model: str
    input_name: str
    output_name: str
    scale: int
    """hr side / lr side."""
    window: int
    """lr frames of one request."""
    warmup: int | None
    """Frames until a recurrent model has its full quality; None: a model of windows, without a state."""
    multiple_of: int
    """Both lr sides."""
    min_size: Size
    max_size: Size
    parameters: tuple[tuple[str, str], ...]
    """All that the ensemble publishes about itself but its weights, sorted by name."""

    @property
    def is_recurrent(self) -> bool:
        """Whether it takes sequences and keeps a state, and not windows."""
        return self.warmup is not None

    @property
    def reach(self) -> int:
        """Frames before one that its answer depends on, or is to."""
        return self.window // 2 if self.warmup is None else self.warmup


def contract_from_config(config: ModelConfig, where: str) -> Contract:
    """Read the contract of an ensemble, or say how it differs from a video upscaler's.

    Args:
        config: The ensemble's config as the server gives it.
        where: The server's address, for messages.
    """

    def refuse(expected: str, found: str) -> UpscaleError:
        return UpscaleError(
            f"model {config.name!r} at {where} is no video upscaler: expected {expected}, found {found}; "
            "name the right ensemble with --model"
        )

    def parameter(name: str) -> str:
        value = config.parameters.get(name, ModelParameter()).string_value
        if not value:
            raise refuse(f"a parameter {name!r}", "none")
        return str(value)

    def number(name: str) -> int:
        text = parameter(name)
        if not text.isdecimal() or int(text) < 1:
            raise refuse(f"a whole number in parameter {name!r}", repr(text))
        return int(text)

    def size(name: str) -> Size:
        text = parameter(name)
        height, _, width = text.partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise refuse(f"HEIGHTxWIDTH in parameter {name!r}", repr(text))
        return int(height), int(width)

    is_recurrent = WARMUP in config.parameters
    window = 1 if is_recurrent else number("window")
    if window % 2 == 0:
        raise refuse("an odd window", str(window))
    for tensors, dims, what in (
        (config.input, [-1, -1, 3] if is_recurrent else [window, -1, -1, 3], "input"),
        (config.output, [-1, -1, 3], "output"),
    ):
        found = ", ".join(f"{t.name} type {t.data_type} {list(t.dims)}" for t in tensors)
        if len(tensors) != 1 or tensors[0].data_type != TYPE_UINT8 or list(tensors[0].dims) != dims:
            raise refuse(f"one UINT8 {what} of shape {dims}", found or "none")
    return Contract(
        model=config.name,
        input_name=config.input[0].name,
        output_name=config.output[0].name,
        scale=number("scale"),
        window=window,
        warmup=number(WARMUP) if is_recurrent else None,
        multiple_of=number("multiple_of"),
        min_size=size("min_size"),
        max_size=size("max_size"),
        parameters=tuple(
            sorted(
                (name, parameter.string_value)
                for name, parameter in config.parameters.items()
                if name not in IDENTITY_PARAMETERS
            )
        ),
    )


def instance_count(config: ModelConfig) -> int:
    """Copies of a composing model that run side by side."""
    return sum(
        group.count * (len(group.gpus) if group.kind == ModelInstanceGroup.KIND_GPU and group.gpus else 1)
        for group in config.instance_group
    )
