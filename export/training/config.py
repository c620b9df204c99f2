"""Settings of a training run: a recipe's TOML file, overridden by the command line."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from export.errors import ExportError

RECIPES = Path(__file__).parent / "recipes"
OBJECTIVES = ("fidelity", "adversarial")
OPTIMIZERS = ("muon", "adam")
PIXEL_LOSSES = ("charbonnier", "charbonnier_mse", "mse", "charbonnier_luma")

INIT_LR = 4e-4
"""Of a fidelity run that starts from trained weights."""
ADVERSARIAL = {"optimizer": "adam", "pixel_loss": "charbonnier", "temporal_weight": 5.0, "lr": 3e-4}
"""What an adversarial run has in place of the defaults."""


def setting(
    default: object,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A field with its description, and the values that are allowed."""
    limits = {"choices": choices, "least": least, "above": above, "most": most}
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a training run, besides the clips and the machine."""

    widths: str = setting("pruned", "Width table.")
    objective: str = setting(
        "fidelity", "adversarial: after fidelity, with a discriminator.", choices=OBJECTIVES
    )
    init: str | None = setting(None, "Checkpoint to start from, of these widths or smaller.")
    teacher: str | None = setting(None, "Checkpoint whose answers are learned too.")
    prune_to: str | None = setting(None, "Width table to prune to, after training under a sparsity penalty.")

    steps: int = setting(20_000, "Steps, unless --minutes ends the run before.", least=1)
    minutes: float | None = setting(None, "Wall time, resumed parts together.", above=0)
    batch: int = setting(12, "Crops per step.", least=1)
    patch: int = setting(192, "Hr pixels a side of a crop.", least=1)
    photo_share: float = setting(0.4, "Share of crops from photos and line art.", least=0, most=1)
    line_art: int = setting(2048, "Synthetic drawings of lines, letters and shapes, used as photos.", least=0)
    seed: int = setting(0, "Seed of weights and batches.", least=0)

    optimizer: str = setting("muon", "Optimizer.", choices=OPTIMIZERS)
    lr: float = setting(2e-3, "Peak learning rate.", least=0)
    final_lr: float = setting(1e-6, "Learning rate at the end.", least=0)
    warmup: int = setting(500, "Steps over which the learning rate rises.", least=0)
    decay_share: float = setting(
        0.4, "Share of the run, its end, in which the learning rate falls (half a cosine).", above=0, most=1
    )
    clip_norm: float = setting(0.5, "Largest norm of the gradient.", above=0)
    ema: float = setting(
        0.999, "Decay of the weights' moving average, which is what is saved.", least=0, most=1
    )

    pixel_loss: str = setting(
        "charbonnier_mse",
        "Distance of an answer from the truth, or from the teacher's.",
        choices=PIXEL_LOSSES,
    )
    teacher_weight: float = setting(1.0, "Weight of the distance to the teacher's answer.", least=0)
    feature_weight: float = setting(0.01, "Weight of its features, within the teacher's weight.", least=0)
    augmented_teacher: bool = setting(
        False, "The teacher sees crops flipped and turned at random; no features are compared."
    )
    temporal_weight: float = setting(
        0.0, "Weight of flicker between consecutive answers; above 0, crops have five frames.", least=0
    )
    perceptual_weight: float = setting(20.0, "Weight of the perceptual loss (adversarial).", least=0)
    adversarial_weight: float = setting(0.01, "Weight of the discriminator's score (adversarial).", least=0)
    discriminator_lr: float = setting(1.0, "Discriminator's learning rate over the generator's.", least=0)
    sparsity: float = setting(
        0.1, "Sparsity penalty: what a channel's RMS loses per step, over the learning rate (prune).", least=0
    )

    bf16: bool = setting(False, "Convolutions in bf16; on a GPU by default.")
    compile: bool = setting(False, "Use torch.compile: slower to start.")
    gpu_footage: bool = setting(True, "On a GPU, keep all clips in its memory, and use CUDA graphs.")
    validate_every: int = setting(1000, "Steps between validations; each also saves.", least=1)
    validation_segments: int = setting(1, "Segments of seven frames, per validation clip.", least=1)


FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(Config)}


def make_config(*layers: Mapping[str, object], source: str = "the settings") -> Config:
    """A configuration from layers of settings, of which later ones override earlier ones.

    What no layer sets has its default; the defaults of an adversarial run are ``ADVERSARIAL``, and a fidelity
    run with ``init`` has a learning rate of ``INIT_LR``.

    Args:
        layers: settings by field name.
        source: where they come from, for the error.

    Raises:
        ExportError: a setting is unknown, of another type, or out of range.
    """
    merged = {name: value for layer in layers for name, value in layer.items()}
    checked = {name: _checked(name, value, source) for name, value in merged.items()}
    defaults: dict[str, object] = {}
    if checked.get("objective") == "adversarial":
        defaults = dict(ADVERSARIAL)
    elif checked.get("init"):
        defaults = {"lr": INIT_LR}
    config = Config(**{**defaults, **checked})  # type: ignore[arg-type]  # checked above
    if config.augmented_teacher and not config.teacher:
        raise ExportError(
            f"expected a teacher with augmented_teacher in {source}, found none; pass --teacher"
        )
    return config


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe.

    Args:
        name: of a committed one, as ``student``, or the path of a TOML file.

    Raises:
        ExportError: there is no such file, or it is not TOML.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise ExportError(f"expected a recipe at {path}, found no file; pass a path, or one of {known}")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ExportError(f"expected {path} to be TOML, found something else: {err}") from err


def kind_of(name: str) -> tuple[type, bool]:
    """Type of a field, and whether it may be None."""
    hint = get_type_hints(Config)[name]
    options = [option for option in get_args(hint) if option is not type(None)]
    return (options[0], True) if options else (hint, False)


def default_of(name: str) -> object:
    """Default of a field."""
    default = FIELDS[name].default
    assert default is not MISSING
    return default


def _checked(name: str, value: object, source: str) -> object:
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, 1, cutoff=0.75)
        hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(FIELDS)}"
        raise ExportError(f"expected settings of a training run in {source}, found {name!r}; {hint}")
    kind, is_optional = kind_of(name)
    if value is None and is_optional:
        return None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ExportError(
            f"expected {name} in {source} to be {_TYPE_NAMES[kind]}, found {value!r}; correct its value"
        )
    meta = FIELDS[name].metadata
    if meta["choices"] and value not in meta["choices"]:
        raise ExportError(
            f"expected {name} in {source} to be one of {', '.join(meta['choices'])}, found {value!r}"
        )
    for limit, text, is_wrong in (
        ("least", "at least", lambda limit: value < limit),
        ("above", "above", lambda limit: value <= limit),
        ("most", "at most", lambda limit: value > limit),
    ):
        if meta[limit] is not None and is_wrong(meta[limit]):
            raise ExportError(f"expected {name} in {source} to be {text} {meta[limit]:g}, found {value!r}")
    return value


_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
