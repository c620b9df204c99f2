"""A part of a clip that one of many machines upscales, and the file it is kept in until all are joined."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UpscaleError
from .resume import MADE_BY, ResumeState
from .stages import stage

MANIFEST = "shard.json"
SUFFIX = ".shard"


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``; numbers count from 1."""

    number: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether it goes on to the end of the clip."""
        return self.number == self.count

    def frames(self, expected: int, segment_frames: int) -> tuple[int, int]:
        """First frame, and the frame after the last, in a clip of so many frames; cut where segments end.

        The last shard goes on to the clip's end, however many frames that is.
        """
        segments = -(-expected // segment_frames)
        first, end = (segments * number // self.count for number in (self.number - 1, self.number))
        return first * segment_frames, end * segment_frames

    def path(self, out: Path) -> Path:
        """Where it is kept until the clip ``out`` is joined."""
        return out.with_name(f"{out.name}.{self.number}-of-{self.count}{SUFFIX}")

    def __str__(self) -> str:
        """Give the text that the option takes."""
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class ShardFile:
    """What a finished shard says of itself."""

    path: Path
    shard: Shard
    identity: dict[str, Any]
    """Of the run; the same for all shards of a clip."""
    weights: list[Any]
    """As ``manifest_entries`` gives them."""
    first: int
    """Number of its first frame in the clip."""
    frames: int
    last_duration: int
    """How long the last frame that was read is shown, in ticks of the clip."""
    is_whole: bool
    """Whether all shards together are the whole clip."""

    def write(self, part: ResumeState) -> None:
        """Pack the finished segments of a run, unchanged, into the file it is to give."""
        facts = {
            **MADE_BY,
            "shard": [self.shard.number, self.shard.count],
            "identity": self.identity,
            "weights": self.weights,
            "first": self.first,
            "frames": self.frames,
            "last duration": self.last_duration,
            "is whole": self.is_whole,
        }
        with zipfile.ZipFile(part.joined, "w") as archive:
            archive.writestr(MANIFEST, json.dumps(facts, indent=2))
            for segment in part.segments():
                archive.write(segment, segment.name)
                archive.write(part.record_of(segment), part.record_of(segment).name)

    @classmethod
    def read(cls, path: Path) -> ShardFile:
        """Read what a shard says of itself.

        Raises:
            UpscaleError: It is no shard, or damaged.
        """
        with _reading(path), zipfile.ZipFile(path) as archive:
            facts = json.loads(archive.read(MANIFEST))
            return cls(
                path,
                Shard(*facts["shard"]),
                facts["identity"],
                facts["weights"],
                facts["first"],
                facts["frames"],
                facts["last duration"],
                facts["is whole"],
            )

    def segments(self) -> Iterator[tuple[bytes, str]]:
        """Bytes and record of each segment, in order; their checksums are compared.

        Raises:
            UpscaleError: It is damaged.
        """
        with _reading(self.path), zipfile.ZipFile(self.path) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".segment")):
                yield archive.read(name), archive.read(str(Path(name).with_suffix(".record"))).decode()


def _reading(path: Path) -> Any:
    kinds = (zipfile.BadZipFile, OSError, LookupError, TypeError, ValueError)
    return stage(f"cannot read the shard {path}", "delete it, and upscale that shard again", kinds)


def shards_of(out: Path) -> list[ShardFile]:
    """All shards of a clip in order, which fit together.

    Args:
        out: The clip they are to give.

    Raises:
        UpscaleError: One is missing, damaged, or of another run.
    """
    pattern = re.compile(rf"{re.escape(out.name)}\.(\d+)-of-(\d+){re.escape(SUFFIX)}")
    names = sorted(path.name for path in out.parent.glob("*" + SUFFIX) if path.is_file())
    found = [Shard(int(match[1]), int(match[2])) for name in names if (match := pattern.fullmatch(name))]
    counts = sorted({shard.count for shard in found})
    if len(counts) != 1:
        what = " and ".join(f"shards of {count}" for count in counts) or "none"
        raise UpscaleError(
            f"expected the shards of one division at {Shard(1, 2).path(out)} and so on, found {what}: "
            "upscale with --shard 1/N to N/N first, and delete those of another N"
        )
    wanted = [Shard(number, counts[0]) for number in range(1, counts[0] + 1)]
    missing = [str(shard) for shard in wanted if shard not in found]
    if missing:
        raise UpscaleError(
            f"expected {counts[0]} shards of {out}, found none for {', '.join(missing)}: upscale with "
            f"--shard {missing[0]}"
        )
    files = [ShardFile.read(shard.path(out)) for shard in wanted]
    total = 0
    for file in files:
        for key, value in files[0].identity.items():
            if file.identity.get(key) != value:
                raise UpscaleError(
                    f"expected shards of one run, found another {key} in {file.path} "
                    f"({file.identity.get(key)}) than in {files[0].path} ({value}): upscale one of them again"
                )
        if file.frames and file.first != total:
            raise UpscaleError(
                f"expected frame {total + 1} at the start of {file.path}, found frame {file.first + 1}: "
                "upscale this shard and the one before it again"
            )
        total += file.frames
    if not total:
        raise UpscaleError(f"expected frames in the shards of {out}, found none: check the range")
    return files
