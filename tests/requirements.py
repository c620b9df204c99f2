"""What a test needs beyond Python packages: without it the test is skipped, or fails where it is required."""

import os
from typing import NoReturn

import pytest


def missing(what: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where ``REQUIRE_<what>`` is set.

    Args:
        what: Upper case, such as ``BROWSER`` or ``PERF``.
        reason: What was looked for and not found.
    """
    if os.environ.get(f"REQUIRE_{what}"):
        pytest.fail(f"{reason}, and REQUIRE_{what} is set")
    pytest.skip(reason)
