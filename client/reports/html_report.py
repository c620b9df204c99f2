"""One run as one HTML file that needs nothing else: samples to compare, timings, cuts, settings, scores."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from string import Template

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc

from ..durable import atomic_write
from ..errors import UpscaleError
from ..frames.windows import Image
from ..pipeline import Options, Result, shapes_of
from ..serving.contract import Contract
from ..video.color import BT470BG, Color, frame_from_rgb
from ..video.decode import Video
from ..video.deinterlace import OFF
from ..video.picture import Range
from ..video.source import Source
from .compare import lr_and_hr, most_changed, resized, sample_numbers, upright, upright_size
from .scores import luma, psnr_db, ssim

JFIF = Color(BT470BG, True, ColorPrimaries.UNSPECIFIED, ColorTrc.UNSPECIFIED)
JPEG_QUANTIZER = 2  # of 31; the finest that every viewer takes

PAGE = Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ours: #2a8; --faint: #8884 }
body { font: 16px/1.5 system-ui, sans-serif; margin: 3rem auto; max-width: 1100px; padding: 0 1.25rem }
h1 { margin: 0; font-size: 2rem; overflow-wrap: anywhere }
h2 { margin: 3rem 0 1rem; font-size: 1.15rem }
p, figcaption, th, .bars { color: color-mix(in srgb, currentColor 72%, transparent) }
.slide { --at: 50%; position: relative; margin: 2.5rem 0 .75rem; border-radius: 10px; overflow: hidden }
.slide img { display: block; width: 100% }
.slide img + img { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--at)) 0 0) }
.slide i { position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; background: #fff }
.slide i { margin-left: -1px; box-shadow: 0 0 4px #0008; pointer-events: none }
.slide i::after { content: "\\2039\\2002\\203a"; position: absolute; top: 50%; left: 1px; color: #333 }
.slide i::after { font: 600 18px/36px system-ui; width: 36px; text-align: center; border-radius: 50% }
.slide i::after { background: #fff; transform: translate(-50%, -50%); box-shadow: 0 1px 5px #0006 }
.slide b { position: absolute; bottom: 12px; padding: 1px 10px; border-radius: 99px; background: #000a }
.slide b { color: #fff; font: 13px/1.7 system-ui; pointer-events: none }
.slide b:nth-of-type(1) { left: 12px }
.slide b:nth-of-type(2) { right: 12px }
.slide input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0 }
.slide input { opacity: 0; cursor: ew-resize }
.slide:focus-within { outline: 3px solid var(--ours) }
.details { display: flex; gap: .75rem }
.details figure { margin: 0; flex: 1; max-width: 260px }
.details img { display: block; width: 100%; image-rendering: pixelated; border-radius: 6px }
figcaption { font-size: .85rem }
table { border-collapse: collapse; width: 100% }
th, td { padding: .35rem 1.5rem .35rem 0; text-align: left; vertical-align: top }
th { font-weight: 400; width: 11rem }
tr + tr > * { border-top: 1px solid var(--faint) }
td { overflow-wrap: anywhere }
.bar { height: .7rem; margin-top: .45rem; border-radius: 4px; background: var(--ours) }
</style>
<h1>$title</h1>
<p>$subtitle</p>
$samples
<h2>Result</h2><table>$facts</table>
<h2>Where the time went</h2><table>$stages</table>
<h2>Settings</h2><table>$settings</table>
</html>
"""
)


@dataclass(frozen=True)
class Sample:
    """One frame that stands for the clip."""

    caption: str
    versions: dict[str, Image]
    """By name: bicubic, ours and, if it is known, the truth."""


def check_reference(reference: Path, source: Source, contract: Contract, options: Options) -> None:
    """Refuse a reference of another size than the clip will have as players show it, before the work.

    Raises:
        UpscaleError: It does not fit, or one of the two is not readable.
    """
    with lr_and_hr(source, options, reference) as (lr, truth):
        hr = shapes_of(lr.picture, contract, options.final_size, options.square_pixels).hr
        height, width = upright_size(hr)
        found_height, found_width = upright_size(truth.picture)
    if (found_height, found_width) != (height, width):
        raise UpscaleError(
            f"expected a reference of {width}x{height}, found {found_width}x{found_height}: {reference}"
        )


def write_page(
    target: Path,
    source: Source,
    options: Options,
    upscaled: Path,
    result: Result,
    server: str,
    reference: Path | None,
) -> None:
    """Write the page.

    Args:
        target: The HTML file.
        source: The lr clip.
        options: How it was upscaled.
        upscaled: The hr clip.
        result: What the run did.
        server: Which model did it, and where.
        reference: The truth, for PSNR and SSIM: a clip as large as the upscaled one and as long as the lr
            clip, of which the same part is taken.

    Raises:
        UpscaleError: The reference does not have as many frames.
        OSError, av.FFmpegError: A clip cannot be read, or the page cannot be written.
    """
    samples, scores = _look(source, options, upscaled, reference, sample_numbers(result.frames))
    (lr_height, lr_width), (hr_height, hr_width) = result.lr_size, result.hr_size
    facts = {
        "Input": source.path,
        "Output": upscaled,
        "Frames": result.frames,
        "Size": f"{lr_width} x {lr_height} to {hr_width} x {hr_height}",
        "Speed": f"{result.fps:.2f} frames per second, from file to file",
        "Scene cuts": ", ".join(f"{cut_s:.2f} s" for cut_s in result.cuts_s) or "none",
        **scores,
    }
    longest = max(*result.stages_s.values(), 1e-9)
    stages = "".join(
        f'<tr><th>{stage}<td style="width:5rem">{busy_s:.1f} s'
        f'<td><div class="bar" style="width:{100 * busy_s / longest:.1f}%"></div>'
        for stage, busy_s in result.stages_s.items()
    )
    page = PAGE.substitute(
        title=html.escape(upscaled.name),
        subtitle="Drag over a picture to compare. Below it, the detail that changed most.",
        samples="".join(map(_figures, samples)),
        facts=_rows(facts),
        stages=stages,
        settings=_rows({"Model": server, **_settings(options)}),
    )
    with atomic_write(target) as draft:
        draft.write_text(page, encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8


def _look(
    source: Source, options: Options, upscaled: Path, reference: Path | None, numbers: set[int]
) -> tuple[list[Sample], dict[str, str]]:
    """Go through the clips once: the sample frames, and mean scores against the truth."""
    samples, found, first = [], [], None
    with ExitStack() as files:
        lr, hr = files.enter_context(lr_and_hr(source, options, upscaled))
        truth = files.enter_context(Video(Source(reference))) if reference else None
        truths = truth.frames(options.range) if truth else None
        pairs = zip(lr.frames(options.range), hr.frames(Range()), strict=True)
        for number, (before, after) in enumerate(pairs):
            first = before.pts if first is None else first
            if number not in numbers and truths is None:
                continue
            versions = {
                "bicubic": upright(resized(before.image, hr.picture.size), hr.picture),
                "ours": upright(after.image, hr.picture),
            }
            if truth and truths is not None:
                exact = next(truths, None)
                if exact is None:
                    raise UpscaleError(
                        f"expected a reference as long as {source.path}, found the end of {reference} after "
                        f"{number} frames of this part"
                    )
                versions["truth"] = upright(exact.image, truth.picture)
                bicubic, ours, real = map(luma, versions.values())
                found.append([measure(p, real) for p in (bicubic, ours) for measure in (psnr_db, ssim)])
            if number in numbers:
                at_s = float((before.pts - first) * lr.picture.time_base)
                samples.append(Sample(f"frame {number + 1}, {at_s:.2f} s", versions))
        if truths is not None and next(truths, None) is not None:
            raise UpscaleError(
                f"expected a reference as long as {source.path}, found more frames in {reference}"
            )
    if not found:
        return samples, {}
    means = np.mean(found, axis=0)
    return samples, {
        "PSNR of luma": f"{means[2]:.2f} dB, bicubic {means[0]:.2f} dB",
        "SSIM of luma": f"{means[3]:.4f}, bicubic {means[1]:.4f}",
    }


def _figures(sample: Sample) -> str:
    """The slider over a whole frame, and a row of details."""
    move = "this.parentNode.style.setProperty('--at', this.value + '%')"
    bicubic, ours = sample.versions["bicubic"], sample.versions["ours"]
    where = most_changed(bicubic, ours)
    details = "".join(
        f'<figure><img alt="" src="{_data_url(image[where])}"><figcaption>{name}</figcaption></figure>'
        for name, image in sample.versions.items()
    )
    height, width, _ = ours.shape
    return (
        f'<figure class="slide" style="max-width: calc(90vh * {width / height:.4f})">'
        f'<img alt="upscaled" src="{_data_url(ours)}">'
        f'<img alt="bicubic" src="{_data_url(bicubic)}"><i></i><b>bicubic</b><b>ours, {sample.caption}</b>'
        f'<input type="range" value="50" step="any" aria-label="compare" oninput="{move}"></figure>'
        f'<div class="details">{details}</div>'
    )


def _settings(options: Options) -> dict[str, str]:
    encoding, part = options.encoding, options.range
    limits = [f"from {float(part.start_s):g} s"] if part.start_s else []
    limits += [f"for {float(part.duration_s):g} s"] if part.duration_s else []
    limits += [f"at most {part.frames} frames"] if part.frames else []
    return {
        "Encoder": ", ".join([encoding.codec.encoder, encoding.pix_fmt, *map(" ".join, encoding.options)]),
        "Part of the clip": ", ".join(limits) or "all",
        **({"Deinterlaced": options.deinterlace} if options.deinterlace != OFF else {}),
        "Scene threshold": f"{options.scene_threshold:g} gray levels",
    }


def _rows(facts: Mapping[str, object]) -> str:
    return "".join(f"<tr><th>{html.escape(name)}<td>{html.escape(str(fact))}" for name, fact in facts.items())


def _data_url(image: Image) -> str:
    """An (H, W, 3) image as JPEG in a URL."""
    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "yuvj444p"
        stream.codec_context.qmin = stream.codec_context.qmax = JPEG_QUANTIZER
        container.mux(stream.encode(frame_from_rgb(image, (stream.height, stream.width), "yuvj444p", JFIF)))
        container.mux(stream.encode(None))
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
