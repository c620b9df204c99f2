"""The folder beside an unfinished output: finished segments, and what run they belong to."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import UpscaleError
from .serving.identity import Identity, manifest_entries, unknown_weights

WEIGHTS = "weights"  # key of the manifest


class ResumeState:
    """The unfinished state of one output, ``OUT.part/``, held by one process at a time.

    A segment is finished when its file has its final name; ``manifest.json`` says for which input,
    model and settings, and is never changed. So no crash can leave the two contradicting each other.

    Args:
        out: The output file the run is to give.
        identity: All that decides what the frames look like, JSON-able.
        weights: Of every server, by its address.
        restart: Throw away what another run left, whatever it was.
    """

    def __init__(
        self, out: Path, identity: dict[str, Any], weights: Mapping[str, Identity], restart: bool = False
    ) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".part")
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        except OSError as err:
            if not out.parent.is_dir():
                raise UpscaleError(f"cannot write {out}: expected a folder {out.parent}; create it") from err
            raise UpscaleError(f"cannot write {out} ({err.strerror}): name an output you may write") from err
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            self._lock.close()
            raise UpscaleError(f"another run is writing {out}: wait for it, or stop it") from err
        try:
            if restart:
                for path in self.folder.iterdir():
                    if path.name != "lock":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._claim(identity, weights)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> ResumeState:
        """Return the held folder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let other processes have it; what was written stays."""
        if self.folder.exists() and not any(self.folder.glob("0*")):
            shutil.rmtree(self.folder)
        self._lock.close()

    def _claim(self, identity: dict[str, Any], weights: Mapping[str, Identity]) -> None:
        manifest = self.folder / "manifest.json"
        try:
            left: dict[str, Any] = json.loads(manifest.read_text())
        except FileNotFoundError:
            draft = manifest.with_suffix(".draft")
            ours = identity | {WEIGHTS: manifest_entries(weights)}
            draft.write_text(json.dumps(ours, indent=2) + "\n")
            os.replace(draft, manifest)
            return
        except ValueError as err:
            raise UpscaleError(f"{manifest} is damaged: start over with --restart") from err
        recorded = left.pop(WEIGHTS, [])
        for key in sorted({*identity, *left}):
            if left.get(key) != identity.get(key):
                raise UpscaleError(
                    f"{self.folder} holds an unfinished run with another {key}: expected "
                    f"{identity.get(key)}, found {left.get(key)}; start over with --restart, or run as before"
                )
        # Servers may have left or come back elsewhere; what counts is that none brings other weights.
        unknown = unknown_weights(weights, recorded)
        if unknown:
            raise UpscaleError(
                f"{self.folder} holds an unfinished run with other weights: {unknown}; start over with "
                "--restart, or serve the model of that run"
            )

    def segments(self) -> list[Path]:
        """Finished segments without a gap, in order."""
        found: list[Path] = []
        while (path := self.segment(len(found))).exists():
            found.append(path)
        return found

    def segment(self, index: int) -> Path:
        """Where a segment lies once it is finished."""
        return self.folder / f"{index:06d}.segment"

    @property
    def joined(self) -> Path:
        """Where the output is put together; its suffix is the output's."""
        return self.folder / f"joined{self.out.suffix}"

    def finish(self) -> None:
        """Give the joined file its final name, or the files in a joined folder, and clear up."""
        if self.joined.is_dir():
            self.out.mkdir(exist_ok=True)
            for path in self.joined.iterdir():
                os.replace(path, self.out / path.name)
        else:
            os.replace(self.joined, self.out)
        shutil.rmtree(self.folder)
