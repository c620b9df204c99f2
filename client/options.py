"""How the command line is read: values with units, and help in topics."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

import click

from .shard import Shard
from .video.tracks import AUDIO_CODECS

Function = TypeVar("Function", bound=Callable[..., Any])


class TopicOption(click.Option):
    """An option that is listed under a topic."""

    def __init__(self, *args: Any, topic: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.topic = topic

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Say in one line what it is; ranges and defaults are in the text where they help."""
        return f"{self.opts[0]} {self.metavar or ''}".rstrip(), self.help or ""


class TopicCommand(click.Command):
    """A command whose help lists its options by topic, in the order in which topics first come up."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the topics."""
        topics: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.params:
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, TopicOption):
                topics.setdefault(parameter.topic, []).append(record)
        names = max(len(name) for records in topics.values() for name, _ in records)
        for topic, records in topics.items():
            with formatter.section(topic):
                formatter.write_dl([(name.ljust(names), meaning) for name, meaning in records])


def topic_options(topic: str) -> Callable[..., Callable[[Function], Function]]:
    """Make a ``click.option`` whose options belong to a topic."""

    def option(*names: str, **kwargs: Any) -> Callable[[Function], Function]:
        return click.option(*names, cls=TopicOption, topic=topic, **kwargs)

    return option


def track_options(option: Callable[..., Callable[[Function], Function]]) -> Callable[[Function], Function]:
    """``--audio`` and ``--no-subtitles``, made by a topic's ``option``."""
    audio = option(
        "--audio",
        type=click.Choice(("copy", "none", *sorted(AUDIO_CODECS))),
        default="copy",
        metavar="HOW",
        help=f"copy, none, {', '.join(sorted(AUDIO_CODECS))} [copy].",
    )
    no_subtitles = option("--no-subtitles", is_flag=True, help="Leave subtitles out.")
    return lambda command: audio(no_subtitles(command))


def seconds(text: str) -> Fraction:
    """Read a time such as 90, 1:30 or 0:01:30.25, exactly."""
    if not re.fullmatch(r"(?:(?:\d+:)?\d+:)?\d+(?:\.\d+)?", text):
        raise click.BadParameter(f"expected seconds or H:MM:SS, found {text!r}")
    total = Fraction(0)
    for part in text.split(":"):
        total = total * 60 + Fraction(part)
    return total


def streams(text: str) -> tuple[frozenset[int] | None, frozenset[int]]:
    """Read numbers of streams: 0,1 keeps these alone, -2,-3 leaves these out; returns (only, without)."""
    if re.fullmatch(r"\d+(,\d+)*", text):
        return frozenset(map(int, text.split(","))), frozenset()
    if re.fullmatch(r"-\d+(,-\d+)*", text):
        return None, frozenset(-int(number) for number in text.split(","))
    raise click.BadParameter(f"expected numbers to keep, as 0,1, or to leave out, as -2, found {text!r}")


def shard(text: str) -> Shard:
    """Read a part of a clip: 3/8 is the third of eight."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
    if not found or int(found[1]) > int(found[2]):
        raise click.BadParameter(f"expected a part such as 1/8, from 1/8 to 8/8, found {text!r}")
    return Shard(int(found[1]), int(found[2]))


def byte_count(text: str) -> int:
    """Read an amount of memory such as 500M, 2G or 1.5GiB, in powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])?(?:i?B)?", text, re.IGNORECASE)
    total = int(Fraction(found[1]) * 1024 ** "_KMGT".index((found[2] or "_").upper())) if found else 0
    if not total:
        raise click.BadParameter(f"expected an amount of memory such as 500M or 2G, found {text!r}")
    return total


def host_and_port(text: str) -> tuple[str, int]:
    """Read a port such as 8003, on loopback, or 0.0.0.0:8003."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise click.BadParameter(f"expected a port such as 8003, or HOST:PORT, found {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)


def frames_per_second(text: str) -> Fraction:
    """Read a rate such as 25, 23.976 or 30000/1001."""
    if not re.fullmatch(r"[1-9]\d*(?:\.\d+|/[1-9]\d*)?", text):
        raise click.BadParameter(f"expected a rate such as 25 or 30000/1001, found {text!r}")
    return Fraction(text)


def height_and_width(text: str) -> tuple[int, int]:
    """Read a size such as 3840x2160, width first as FFmpeg has it."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise click.BadParameter(f"expected WIDTHxHEIGHT, found {text!r}")
    width, height = text.split("x")
    return int(height), int(width)
