"""Expected failures of the benchmarks: one line for the user, exit status 1."""

from __future__ import annotations

import logging
import os
import sys

import click


class PerfError(Exception):
    """The text says what was expected, what was found and what to do next."""


def one_line(err: Exception) -> str:
    """First and last line of a text: a server's error names itself first and ends with its last words."""
    lines = str(err).splitlines() or [type(err).__name__]
    return " ".join(dict.fromkeys((lines[0], lines[-1])))


class Command(click.Command):
    """Prints an expected error as one line and exits with 1; VSR_DEBUG=1 shows where it came from."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            return super().invoke(ctx)
        except PerfError as err:
            if os.environ.get("VSR_DEBUG"):
                raise
            click.echo(f"Error: {err}", err=True)
            sys.exit(1)
