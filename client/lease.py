"""Who is at work on an output, on any machine that sees the folder: a lease, renewed while the run lives."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from .durable import rename
from .errors import HeldError

LEASE = "lease"  # name of the file; drafts of it have a token behind it
LEASE_S = 60.0  # without renewal until another machine may take over; longer than network file systems pause
RENEWALS = 6  # in that time


@dataclass(frozen=True)
class Holder:
    """The process that has a lease."""

    host: str
    pids: str
    """What tells one space of process ids from all others: the boot of the machine, and the container."""
    pid: int
    token: str

    @classmethod
    def new(cls) -> Holder:
        """This process."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        try:
            pids = f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        except OSError:  # not Linux
            pids = ""
        return cls(socket.gethostname(), pids, os.getpid(), secrets.token_hex(8))

    def __str__(self) -> str:
        """Name it for a message."""
        return f"process {self.pid} on {self.host}"


class Lease:
    """The lease of an output's folder; ``take`` it, ``check`` that it is still ours, ``release`` it.

    File locks end with their process, but some network file systems have none, keep those of a dead
    machine, or keep them to one machine. So the holder also renews the time of change of a file, which the
    file server's clock gives: clocks of machines may differ. A holder that stood still for longer than
    ``LEASE_S`` may find that another run has taken over, and keeps nothing more. Two runs that take over
    in the same instant would write the same bytes under the same names until one of them sees the
    other's lease.

    Args:
        folder: Of the unfinished output.
        out: The output, for messages.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self._path, self._out = folder / LEASE, out
        self._me = Holder.new()
        self._draft = folder / f"{LEASE}.{self._me.token}"
        self._ended = threading.Event()
        self._file: int | None = None

    def take(self, has_lock: bool) -> None:
        """Take the lease, and renew it from now on.

        Args:
            has_lock: Whether this process has the folder's file lock, so that no other of this machine has.

        Raises:
            HeldError: Another run has it.
        """
        try:
            self._draft.write_text(json.dumps(asdict(self._me)))
            holder, age_s = self._holder()
            if holder and not self._is_over(holder, age_s, has_lock):
                raise HeldError(
                    f"another run is writing {self._out}: {holder} renewed its lease {max(0.0, age_s):.0f} s "
                    f"ago; wait for it, or stop it: {LEASE_S:g} s after its end, this command takes over"
                )
            self._file = os.open(self._draft, os.O_RDWR)
            rename(self._draft, self._path)
        finally:
            with suppress(FileNotFoundError):
                self._draft.unlink()
        threading.Thread(target=self._renew, daemon=True).start()

    def is_of_a_dead_machine(self) -> bool:
        """Whether another machine has it and no longer renews it, so that its file lock means nothing."""
        try:
            self._draft.write_text("")
            holder, age_s = self._holder()
        finally:
            with suppress(FileNotFoundError):
                self._draft.unlink()
        return bool(holder and not self._is_here(holder) and age_s > LEASE_S)

    def _holder(self) -> tuple[Holder | None, float]:
        """Who has it, and seconds since it was renewed by the clock that stamped our draft."""
        try:
            with self._path.open() as file:  # opening it makes a network file system ask the server
                text, renewed_s = file.read(), os.fstat(file.fileno()).st_mtime
            holder = Holder(**json.loads(text))
        except (FileNotFoundError, TypeError, ValueError):
            return None, 0.0
        return holder, self._draft.stat().st_mtime - renewed_s

    def _is_here(self, holder: Holder) -> bool:
        return bool(holder.pids) and (holder.host, holder.pids) == (self._me.host, self._me.pids)

    def _is_over(self, holder: Holder, age_s: float, has_lock: bool) -> bool:
        if not self._is_here(holder):
            return age_s > LEASE_S
        if has_lock:
            return True
        try:
            os.kill(holder.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def _renew(self) -> None:
        while not self._ended.wait(LEASE_S / RENEWALS):
            with suppress(OSError):  # a server that is away for a while; one that stays away is found out
                if self._file is not None:
                    os.utime(self._file)  # no times given: the file server's own

    def is_ours(self) -> bool:
        """Whether no other run has taken over."""
        try:
            return bool(json.loads(self._path.read_text())["token"] == self._me.token)
        except (OSError, LookupError, TypeError, ValueError):
            return False

    def check(self) -> None:
        """Compare the lease with ours, before something is kept.

        Raises:
            HeldError: Another run has taken over.
        """
        if not self.is_ours():
            raise HeldError(
                f"another run has taken over {self._out}, because this one stood still for more than "
                f"{LEASE_S:g} s: leave it to that one"
            )

    def release(self) -> None:
        """Let others have it at once."""
        self._ended.set()
        if self.is_ours():
            with suppress(OSError):
                self._path.unlink()
        if self._file is not None:
            os.close(self._file)
            self._file = None
