"""Scores as Markdown, ready for a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from export.metrics.lpips import NAME as LPIPS_NAME
from export.training.evaluation import Measures, Score, mean

Scores = Mapping[str, Sequence[Score]]
"""Per network one score per clip."""

PERCEPTUAL = {"lpips": (LPIPS_NAME, ".3f"), "tof_px": ("tOF, px", ".3f"), "vmaf": ("VMAF", ".1f")}
"""Field of `Measures`: its heading and format."""


def markdown(scores: Scores) -> str:
    """Tables of the means, of fidelity per clip, and of what else was measured per clip."""
    tables = [_means(scores), _fidelity(scores), *(_perceptual(scores, f) for f in _measured(scores))]
    return "\n\n".join(tables)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def _measured(scores: Scores) -> list[str]:
    first = next(iter(scores.values()))[0]
    return [field for field in PERCEPTUAL if getattr(first.network, field) is not None]


def _means(scores: Scores) -> str:
    fields = _measured(scores)

    def row(name: str, measures: Measures, over_bicubic: str, over_single: str) -> list[str]:
        others = [format(getattr(measures, field), PERCEPTUAL[field][1]) for field in fields]
        return [
            name,
            f"{measures.psnr_y_db:.2f}",
            f"{measures.ssim_y:.4f}",
            *others,
            over_bicubic,
            over_single,
        ]

    means = {name: mean(rows) for name, rows in scores.items()}
    header = ["mean", "PSNR-Y, dB", "SSIM-Y", *(PERCEPTUAL[field][0] for field in fields)]
    rows = [row("bicubic", next(iter(means.values())).bicubic, "", "")]
    rows += [
        row(name, m.network, f"{m.gain_db:+.2f} dB", f"{m.network.psnr_y_db - m.single_psnr_y_db:+.2f} dB")
        for name, m in means.items()
    ]
    return _table([*header, "over bicubic", "over one frame"], rows)


def _fidelity(scores: Scores) -> str:
    header = ["clip", "frames", "bicubic PSNR-Y / SSIM-Y"]
    for name in scores:
        prefix = f"{name}: " if len(scores) > 1 else ""
        header += [f"{prefix}{column}" for column in ("PSNR-Y / SSIM-Y", "over bicubic", "over one frame")]

    def row(of_clip: Sequence[Score]) -> list[str]:
        cells = [of_clip[0].clip, str(of_clip[0].frames), _pair(of_clip[0].bicubic)]
        for s in of_clip:
            over_single = s.network.psnr_y_db - s.single_psnr_y_db
            cells += [_pair(s.network), f"{s.gain_db:+.2f} dB", f"{over_single:+.2f} dB"]
        return cells

    return _table(header, [row(of_clip) for of_clip in _by_clip(scores)])


def _perceptual(scores: Scores, field: str) -> str:
    title, style = PERCEPTUAL[field]

    def row(of_clip: Sequence[Score]) -> list[str]:
        measures = [of_clip[0].bicubic, *(s.network for s in of_clip)]
        return [of_clip[0].clip, *(format(getattr(m, field), style) for m in measures)]

    return _table([title, "bicubic", *scores], [row(of_clip) for of_clip in _by_clip(scores)])


def _pair(measures: Measures) -> str:
    return f"{measures.psnr_y_db:.2f} / {measures.ssim_y:.4f}"


def _by_clip(scores: Scores) -> list[tuple[Score, ...]]:
    """Per clip, and last for the mean, the scores of every network."""
    return list(zip(*([*rows, mean(rows)] for rows in scores.values()), strict=True))
