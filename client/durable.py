"""Files that survive a power cut: their bytes are flushed before they get their name, and then the name."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What file systems answer that cannot open or flush a folder; PostgreSQL leaves the same ones out.
NO_FOLDER_FLUSH = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOTSUP)


def flush(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, written to the disk.

    Raises:
        OSError: They could not be written. A folder on a file system that has no such call is left as it is.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as err:
        if not (is_folder and err.errno in NO_FOLDER_FLUSH):
            raise


def rename(draft: Path, target: Path) -> None:
    """Give a finished file, or a folder of files, its name: after a power cut it has all of it or none.

    Whatever the file was made from may be deleted once this has returned.

    Raises:
        OSError: The file could not be written or renamed.
    """
    if draft.is_dir():
        for path in draft.iterdir():
            flush(path)
    flush(draft)
    os.replace(draft, target)
    flush(target.parent)


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Write a file under another name beside it; it gets its name if the block ends well.

    Yields:
        Where to write. A device or a pipe is written to as it is, for renaming would replace it.

    Raises:
        OSError: The file could not be written or renamed.
    """
    target = Path(os.path.realpath(target))  # the file that a link means, not the link
    if target.exists() and not target.is_file():
        yield target
        return
    draft = target.with_name(f".{secrets.token_hex(4)}.{target.name}")
    try:
        yield draft
        rename(draft, target)
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()
