"""Which weights a server has: what it publishes about them, and its answer to one fixed small window."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig

from ..frames.windows import Image

DIGEST, NAME, PRECISION, VERSION = "weights_digest", "weights_name", "precision", "version"
IDENTITY_PARAMETERS = (DIGEST, NAME, PRECISION, VERSION)  # of the ensemble; servers of old exports have none
MUST_AGREE = (DIGEST, PRECISION)  # the others are for people

# Gray levels: a GPU that starts again may choose other kernels, and rounds a last bit differently.
TOLERANCE = 1
SAMPLE_STEP = 13  # shares no factor with 3 channels or 4x4 sub-pixels, so the sample has all of them
SHOWN_DIGITS = 12  # of a digest; all of them are in the manifest and in the ensemble's config


@dataclass(frozen=True, eq=False)
class Identity:
    """What tells one server's weights and arithmetic from another's."""

    published: Mapping[str, str]
    """Those of ``IDENTITY_PARAMETERS`` that the ensemble's config has."""
    sample: Image
    """Every ``SAMPLE_STEP``-th value of the answer to the probe, (N,) uint8."""

    def difference(self, other: Identity) -> str | None:
        """Say how another server's weights differ from these, or None if they are the same."""
        for name in MUST_AGREE:
            one, two = self.published.get(name), other.published.get(name)
            if one and two and one != two:
                return f"{name} {one[:SHOWN_DIGITS]} and {two[:SHOWN_DIGITS]}"
        if self.sample.shape != other.sample.shape:
            return "answers of different sizes to one probe"
        levels = int(np.abs(self.sample.astype(np.int16) - other.sample).max(initial=0))
        return f"answers to one probe {levels} gray levels apart" if levels > TOLERANCE else None

    def __str__(self) -> str:
        """Name the weights for a message."""
        name, precision = self.published.get(NAME, "weights"), self.published.get(PRECISION, "")
        digest = self.published.get(DIGEST)
        known_by = (
            f"digest {digest[:SHOWN_DIGITS]}" if digest else f"probe {zlib.crc32(self.sample.tobytes()):08x}"
        )
        return " ".join(filter(None, (name, precision, f"({known_by})")))

    def to_json(self) -> dict[str, Any]:
        """Give what a manifest keeps of it."""
        packed = base64.b64encode(zlib.compress(self.sample.tobytes(), 9)).decode()
        return {**self.published, "probe": packed}

    @classmethod
    def from_json(cls, entry: object) -> Identity | None:
        """Read what ``to_json`` gave; None: it is something else, as of another release of this client."""
        try:
            assert isinstance(entry, dict)
            sample = np.frombuffer(zlib.decompress(base64.b64decode(entry["probe"])), np.uint8)
            return cls({name: str(entry[name]) for name in IDENTITY_PARAMETERS if name in entry}, sample)
        except (AssertionError, KeyError, TypeError, ValueError, zlib.error):
            return None


def identity_of(config: ModelConfig, answer: Image) -> Identity:
    """Make the identity of a server.

    Args:
        config: Of its ensemble.
        answer: To ``probe_window``, uint8.
    """
    published = {
        name: value
        for name in IDENTITY_PARAMETERS
        if name in config.parameters and (value := config.parameters[name].string_value)
    }
    return Identity(published, np.ascontiguousarray(answer.reshape(-1)[::SAMPLE_STEP]))


def different_servers(weights: Mapping[str, Identity]) -> str | None:
    """Say which server has what if not all have the same weights; None if they have.

    Args:
        weights: By server address.
    """
    first, *others = weights.values()
    found = next(filter(None, map(first.difference, others)), None)
    if found is None:
        return None
    listed = ", ".join(f"{address} serves {identity}" for address, identity in weights.items())
    return f"{listed}: {found}"


def different_releases(weights: Mapping[str, Identity]) -> str | None:
    """Say which server was exported by which release if not all by one; None if they were, or do not say.

    Args:
        weights: By server address.
    """
    releases = {address: one.published.get(VERSION) for address, one in weights.items()}
    if len(set(filter(None, releases.values()))) < 2:
        return None
    return ", ".join(f"{address} has {release}" for address, release in releases.items() if release)


def manifest_entries(weights: Mapping[str, Identity]) -> list[dict[str, Any]]:
    """Give what a manifest keeps of the weights of all servers, the same ones once."""
    kept: list[Identity] = []
    for identity in weights.values():
        if all(map(identity.difference, kept)):
            kept.append(identity)
    return [identity.to_json() for identity in kept]


def unknown_weights(weights: Mapping[str, Identity], recorded: Iterable[object]) -> str | None:
    """Say which server has other weights than all that a manifest has recorded; None if none has.

    Args:
        weights: By server address.
        recorded: What ``manifest_entries`` gave then.
    """
    known = [Identity.from_json(entry) for entry in recorded]
    for address, identity in weights.items():
        if not any(one and one.difference(identity) is None for one in known):
            expected = " or ".join(str(one) for one in known if one) or "none that this release can read"
            return f"expected {expected}, found {identity} at {address}"
    return None
