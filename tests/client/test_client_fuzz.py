"""Damaged files of every container: each ends in a file or in one line, and the process lives."""

from __future__ import annotations

import pytest
from fuzz import KINDS, TAGGED, fuzz

pytestmark = pytest.mark.slow

FILES = 4 * len((*KINDS, *TAGGED))
SEED = 7


def test_damaged_files(tmp_path, matrix_cell):
    record = matrix_cell("Damaged files", f"seed {SEED}", "all kinds")
    endings = fuzz(SEED, FILES, tmp_path)
    assert set(endings) <= {"done", "refused"}, endings
    assert sum(endings.values()) == FILES
    assert endings["done"] and endings["refused"]
    record(", ".join(f"{count} {how}" for how, count in sorted(endings.items())))
