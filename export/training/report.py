"""Scores as Markdown tables, with bootstrap intervals over clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from export.metrics.bootstrap import mean_interval
from export.metrics.lpips import NAME as LPIPS_NAME
from export.metrics.psnr_ssim import Channels
from export.training.evaluate import Metrics, Score, mean

Scores = Mapping[str, Sequence[Score]]
"""Per network one score per clip."""


@dataclass(frozen=True)
class Column:
    """A metric as tables have it."""

    title: str
    style: str
    of: Callable[[Metrics], float | None]


@dataclass(frozen=True)
class Difference:
    """What one network has more of a metric than another, clip by clip."""

    network: str
    reference: str
    metric: str
    mean: float
    interval: tuple[float, float] | None
    """95 % over clips, see ``bootstrap.mean_interval``; None for a single clip."""

    @property
    def is_significant(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def columns(scores: Scores, channels: Channels) -> list[Column]:
    """What was measured, in the order of the tables."""
    suffix = channels.upper()
    found = [
        Column(f"PSNR-{suffix}, dB", ".2f", lambda m: m.psnr_db),
        Column(f"SSIM-{suffix}", ".4f", lambda m: m.ssim),
        Column(LPIPS_NAME, ".3f", lambda m: m.lpips),
        Column("tOF, px", ".3f", lambda m: m.tof_px),
        Column("VMAF", ".1f", lambda m: m.vmaf),
    ]
    first = next(iter(scores.values()))[0].network
    return [column for column in found if column.of(first) is not None]


def differences(scores: Scores, channels: Channels = "y") -> list[Difference]:
    """Every network but the first against the first, by every metric."""
    reference, *others = scores
    found = []
    for name in others:
        for column in columns(scores, channels):
            pairs = zip(scores[name], scores[reference], strict=True)
            values = [(column.of(a.network) or 0.0) - (column.of(b.network) or 0.0) for a, b in pairs]
            average = sum(values) / len(values)
            found.append(Difference(name, reference, column.title, average, mean_interval(values)))
    return found


def markdown(scores: Scores, channels: Channels = "y") -> str:
    """Tables of the means, of each metric per clip, and of the differences between networks."""
    measured = columns(scores, channels)
    tables = [_means(scores, measured), _gains(scores, measured[0])]
    tables += [_per_clip(scores, column) for column in measured[1:]]
    found = differences(scores, channels)
    return "\n\n".join([*tables, _differences(found, measured)] if found else tables)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def _means(scores: Scores, measured: Sequence[Column]) -> str:
    def cells(metrics: Metrics) -> list[str]:
        return [format(column.of(metrics), column.style) for column in measured]

    clips = len(next(iter(scores.values())))
    header = [f"mean of {clips} clips" if clips > 1 else "one clip", *(column.title for column in measured)]
    means = {name: mean(rows) for name, rows in scores.items()}
    rows = [["bicubic", *cells(next(iter(means.values())).bicubic), "", ""]]
    for name, m in means.items():
        interval = mean_interval([score.gain_db for score in scores[name]])
        rows.append([name, *cells(m.network), f"{m.gain_db:+.2f}", _interval(interval, "+.2f")])
    header += ["over bicubic, dB", "95 % interval"]
    singles = [m.gain_over_single_db for m in means.values()]
    if None not in singles:
        header.append("over one frame, dB")
        for row, gain in zip(rows, ["", *(f"{gain:+.2f}" for gain in singles)], strict=True):
            row.append(gain)
    return _table(header, rows)


def _gains(scores: Scores, column: Column) -> str:
    header = ["clip", "frames", f"bicubic {column.title}", *(f"{name} over bicubic, dB" for name in scores)]
    rows = [
        [
            of_clip[0].clip,
            str(of_clip[0].frames),
            format(column.of(of_clip[0].bicubic), column.style),
            *(f"{score.gain_db:+.2f}" for score in of_clip),
        ]
        for of_clip in _by_clip(scores)
    ]
    return _table(header, rows)


def _per_clip(scores: Scores, column: Column) -> str:
    def row(of_clip: Sequence[Score]) -> list[str]:
        metrics = [of_clip[0].bicubic, *(score.network for score in of_clip)]
        return [of_clip[0].clip, *(format(column.of(m), column.style) for m in metrics)]

    return _table([column.title, "bicubic", *scores], [row(of_clip) for of_clip in _by_clip(scores)])


def _differences(found: Sequence[Difference], measured: Sequence[Column]) -> str:
    styles = {column.title: "+" + column.style for column in measured}
    rows = [
        [
            d.network,
            d.metric,
            format(d.mean, styles[d.metric]),
            _interval(d.interval, styles[d.metric]),
            "a difference" if d.is_significant else "no difference",
        ]
        for d in found
    ]
    header = [f"minus {found[0].reference}", "metric", "mean", "95 % interval over clips", "verdict"]
    return _table(header, rows)


def _interval(interval: tuple[float, float] | None, style: str) -> str:
    return f"{interval[0]:{style}} to {interval[1]:{style}}" if interval else "one clip"


def _by_clip(scores: Scores) -> list[tuple[Score, ...]]:
    """Per clip, and last for the mean, the scores of every network."""
    return list(zip(*([*rows, mean(rows)] for rows in scores.values()), strict=True))
