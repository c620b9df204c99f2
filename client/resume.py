"""The folder beside an unfinished output: finished segments, and what run they belong to."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from .durable import flush, rename
from .errors import HeldError, UpscaleError
from .lease import LEASE, Lease
from .record import Record
from .serving.identity import Identity, manifest_entries, unknown_weights

WEIGHTS = "weights"  # key of the manifest
MADE_BY = {"made by": "mst-gan-upscale"}  # first entry of the manifest, which tells our folders from others
DAMAGED_START = '{\n  "made by"'

LOCK, MANIFEST, DRAFT = "lock", "manifest.json", "manifest.draft"
JOINED = "joined"
TOKEN = r"(\.[0-9a-f]{16})?"  # releases up to 0.2 had none
OURS = re.compile(
    rf"{LOCK}|{re.escape(MANIFEST)}|{re.escape(DRAFT)}|{LEASE}(\.[0-9a-f]+)?|{JOINED}(-[0-9a-f]{{16}})?(\.\w+)?"
    rf"|(\d{{6,}}|rehearsal){TOKEN}\.(segment|unfinished|record|draft)"
)
"""Names that are ever deleted."""
LOCKED = (errno.EWOULDBLOCK, errno.EACCES)  # what flock answers where another process has the lock

log = logging.getLogger(__name__)


class ResumeState:
    """The unfinished state of one output, ``OUT.part/``, held by one process at a time.

    A segment is finished when its file and its record have their final names; ``manifest.json`` says for
    which input, model and settings, and is never changed. So no crash can leave them contradicting each
    other. A folder without such a manifest belongs to somebody else and is refused; in ours, only files
    with the names that we give are ever deleted.

    Args:
        out: The output file the run is to give.
        identity: All that decides what the frames look like, JSON-able.
        weights: Of every server, by its address.
        restart: Throw away what another run left, whatever it was.

    Raises:
        UpscaleError: The folder is not ours, held by another run, or belongs to a run of another identity.
    """

    def __init__(
        self, out: Path, identity: dict[str, Any], weights: Mapping[str, Identity], restart: bool = False
    ) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".part")
        self.joined = self.folder / f"{JOINED}-{secrets.token_hex(8)}{out.suffix}"
        """Where the output is put together. No other run has it open, be it one that was taken for dead."""
        self._lease = Lease(self.folder, out)
        self._lock = self._hold()
        try:
            if restart:
                self._remove_ours(keep=(LOCK, LEASE))
            self._claim(identity, weights)
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> ResumeState:
        """Return the held folder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let other processes have it; finished segments stay."""
        if self.folder.exists() and self._lease.is_ours() and not self.segments():
            self._clear_up()
        self._let_go()

    def _let_go(self) -> None:
        self._lease.release()
        os.close(self._lock)

    def _hold(self) -> int:
        """Make or take over the folder, and lock it; returns the lock's file descriptor."""
        while True:
            try:
                self.folder.mkdir()
                flush(self.folder.parent)
            except FileExistsError:
                self._check_ours()
            except OSError as err:
                if not self.out.parent.is_dir():
                    raise UpscaleError(
                        f"cannot write {self.out}: expected a folder {self.out.parent}; create it"
                    ) from err
                raise self._cannot_write(err) from err
            try:
                lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as err:
                raise self._cannot_write(err) from err
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                has_lock = True
            except OSError as err:
                has_lock = False  # on a file system without file locks the lease has to do
                if err.errno in LOCKED:
                    os.close(lock)
                    if self._is_of_a_dead_machine():
                        (self.folder / LOCK).unlink(missing_ok=True)
                        continue
                    raise HeldError(f"another run is writing {self.out}: wait for it, or stop it") from err
            try:
                if os.path.samestat(os.fstat(lock), os.stat(self.folder / LOCK)):
                    self._lease.take(has_lock)
                    return lock
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # another run ended meanwhile, and took its folder along

    def _is_of_a_dead_machine(self) -> bool:
        try:
            return self._lease.is_of_a_dead_machine()
        except OSError:  # the other run has just ended, and took its folder along
            return False

    def _cannot_write(self, err: OSError) -> UpscaleError:
        return UpscaleError(f"cannot write {self.out} ({err.strerror}): name an output you may write")

    def _check_ours(self) -> None:
        """Refuse a folder that none of our runs has made.

        Ours has our manifest; or, of a run that ended before it had one, an empty lock at most.
        """
        if not self.folder.is_dir():
            raise UpscaleError(
                f"expected a folder or nothing at {self.folder}, found a file: move it away, or name "
                "another output"
            )
        names = {path.name for path in self.folder.iterdir()}
        if MANIFEST in names:
            try:
                manifest = self._manifest()
            except UpscaleError:  # ours and damaged, which is for the one that reads it to say
                return
            is_ours = isinstance(manifest, dict) and MADE_BY.items() <= manifest.items()
        else:
            others = {name for name in names if name.partition(".")[0] != LEASE} - {LOCK, DRAFT}
            is_ours = not others and (LOCK not in names or not self._size_of(LOCK))
        if not is_ours:
            what = ", ".join(sorted(names)[:3]) + ", ..." * (len(names) > 3)
            raise UpscaleError(
                f"expected the folder of an unfinished run at {self.folder}, found one that this program "
                f"did not make ({what}): move it away, or name another output"
            )

    def _size_of(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def _manifest(self) -> object:
        """What the manifest says; None: it is none of ours.

        Raises:
            FileNotFoundError: There is none.
            UpscaleError: It is ours, but damaged.
        """
        manifest = self.folder / MANIFEST
        try:
            text = manifest.read_text(encoding="utf-8")
        except UnicodeError:
            return None
        try:
            return json.loads(text)
        except ValueError as err:
            if text.startswith(DAMAGED_START):
                raise UpscaleError(f"{manifest} is damaged: start over with --restart") from err
            return None

    def _claim(self, identity: dict[str, Any], weights: Mapping[str, Identity]) -> None:
        """Write the manifest, or see that the one there is says the same."""
        try:
            left = self._manifest()
        except FileNotFoundError:
            ours = MADE_BY | identity | {WEIGHTS: manifest_entries(weights)}
            draft = self.folder / DRAFT
            draft.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
            rename(draft, self.folder / MANIFEST)
            return
        assert isinstance(left, dict)
        recorded = left.pop(WEIGHTS, [])
        for key in sorted({*identity, *left} - {*MADE_BY}):
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
        while (path := self.segment(len(found))).exists() and self.record_of(path).exists():
            found.append(path)
        return found

    def record(self) -> Record:
        """What is known of the frames in finished segments."""
        return Record.from_json(self.record_of(path).read_text() for path in self.segments())

    def keep(self, segment: Path, record: Record) -> None:
        """Count a written segment as finished, with what is known of its frames.

        Raises:
            HeldError: Another run has taken over the folder.
        """
        self._lease.check()
        draft = segment.with_suffix(".draft")
        draft.write_text(record.to_json())
        rename(draft, self.record_of(segment))

    @staticmethod
    def record_of(segment: Path) -> Path:
        """Where the record of a segment lies."""
        return segment.with_suffix(".record")

    def segment(self, index: int) -> Path:
        """Where a segment lies once it is finished."""
        return self.folder / f"{index:06d}.segment"

    def check(self) -> None:
        """Return if the folder is still this run's.

        Raises:
            HeldError: Another run has taken over the folder.
        """
        self._lease.check()

    def finish(self) -> None:
        """Give the joined file its final name, or the files in a joined folder; then clear up.

        Raises:
            OSError: The output could not be written; all segments are still there.
            HeldError: Another run has taken over the folder.
        """
        self._lease.check()
        if self.joined.is_dir() and self.out.is_dir():
            for path in self.joined.iterdir():
                flush(path)
            for path in self.joined.iterdir():
                os.replace(path, self.out / path.name)
            flush(self.out)
        else:
            rename(self.joined, self.out)
        self._clear_up()

    def _clear_up(self) -> None:
        """Delete what is ours, and the folder if nothing else is in it."""
        self._remove_ours()
        foreign = sorted(path.name for path in self.folder.iterdir())
        if foreign:
            log.warning("left %s in %s, which this program did not make", ", ".join(foreign), self.folder)
        elif not self.folder.is_symlink():
            with suppress(OSError):  # a run that was taken for dead has just left something
                self.folder.rmdir()

    def _remove_ours(self, keep: tuple[str, ...] = ()) -> None:
        """Delete our files, segments from the last to the first: what a crash leaves has no gap."""
        for path in sorted(self.folder.iterdir(), reverse=True):
            if not OURS.fullmatch(path.name) or path.name in (*keep, MANIFEST, LOCK, LEASE):
                continue
            if path.name.startswith(JOINED) and path.is_dir() and not path.is_symlink():
                for image in path.glob("*.png"):
                    image.unlink()
                if not any(path.iterdir()):
                    path.rmdir()
            elif not path.is_dir():
                path.unlink()
        for name in (MANIFEST, LEASE, LOCK):  # last: without them, what is left would count as another's
            if name not in keep:
                (self.folder / name).unlink(missing_ok=True)
