"""One run as one HTML file that needs nothing else: samples to compare, timings, cuts, settings, scores."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from string import Template

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc
from colour import BT470BG, Colour, frame_from_rgb
from compare import resized, sample_numbers
from errors import UpscaleError
from pipeline import Result
from scores import luma, psnr_db, ssim
from source import Source
from video import Range, Video
from windows import Image

JFIF = Colour(BT470BG, True, ColorPrimaries.UNSPECIFIED, ColorTrc.UNSPECIFIED)
JPEG_QUANTISER = 2  # of 31; the finest that every viewer takes

BAR_PX = 300

PAGE = Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem }
figure { --at: 50%; position: relative; margin: 1.5rem 0 }
figure img { display: block; width: 100% }
figure img + img { position: absolute; top: 0; left: 0; clip-path: inset(0 calc(100% - var(--at)) 0 0) }
figure i { position: absolute; top: 0; bottom: 2rem; left: var(--at); border-left: 2px solid #fff }
figure input { width: 100%; height: 2rem; margin: 0; display: block }
table { border-collapse: collapse }
td, th { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }
.bar { background: #36c; height: .8rem }
</style>
<h1>$title</h1>
<p>Left of the line bicubic interpolation, right of it the upscaled clip; drag to compare.</p>
$samples
<h2>Result</h2><table>$facts</table>
<h2>Time</h2><table>$stages</table>
<h2>Settings</h2><table>$settings</table>
</html>
"""
)


def write_page(
    target: Path,
    source: Source,
    wanted: Range,
    upscaled: Path,
    result: Result,
    settings: Mapping[str, object],
    reference: Path | None,
) -> None:
    """Write the page.

    Args:
        target: The HTML file.
        source: The lr clip.
        wanted: The part of it that was upscaled.
        upscaled: The hr clip.
        result: What the run did.
        settings: What to list as settings.
        reference: The truth, a clip as large and as long as the upscaled one, for PSNR and SSIM.

    Raises:
        UpscaleError: The reference does not fit, or the page cannot be written.
    """
    samples, scores = _look(source, wanted, upscaled, reference, sample_numbers(result.frames))
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
        f"<tr><th>{stage}<td>{busy_s:.1f} s"
        f'<td><div class="bar" style="width:{BAR_PX * busy_s / longest:.0f}px"></div>'
        for stage, busy_s in result.stages_s.items()
    )
    page = PAGE.substitute(
        title=html.escape(f"{upscaled.name}: {hr_width} x {hr_height}"),
        samples="".join(_figure(bicubic, ours) for bicubic, ours in samples),
        facts=_rows(facts),
        stages=stages,
        settings=_rows(settings),
    )
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as err:
        raise UpscaleError(f"cannot write the report {target} ({err.strerror})") from err


def _look(
    source: Source, wanted: Range, upscaled: Path, reference: Path | None, numbers: set[int]
) -> tuple[list[tuple[Image, Image]], dict[str, str]]:
    """Go through the clips once: the sample frames, bicubic and ours, and mean scores against the truth."""
    samples, found = [], []
    with ExitStack() as files:
        lr = files.enter_context(Video(source))
        hr = files.enter_context(Video(Source(upscaled)))
        truth = files.enter_context(Video(Source(reference))) if reference else None
        if truth and truth.picture.size != hr.picture.size:
            (height, width), (found_height, found_width) = hr.picture.size, truth.picture.size
            raise UpscaleError(
                f"expected a reference of {width}x{height}, found {found_width}x{found_height}: {reference}"
            )
        truths = truth.frames(Range()) if truth else None
        pairs = zip(lr.frames(wanted), hr.frames(Range()), strict=True)
        for number, (before, after) in enumerate(pairs):
            if number not in numbers and truths is None:
                continue
            bicubic = resized(before.image, hr.picture.size)
            if number in numbers:
                samples.append((bicubic, after.image))
            if truths is not None:
                exact = next(truths, None)
                if exact is None:
                    raise UpscaleError(
                        f"expected a reference as long as the clip, found {number} frames: {reference}"
                    )
                planes = [luma(image) for image in (bicubic, after.image, exact.image)]
                found.append(
                    [measure(plane, planes[2]) for plane in planes[:2] for measure in (psnr_db, ssim)]
                )
    if not found:
        return samples, {}
    means = np.mean(found, axis=0)
    return samples, {
        "PSNR of luma": f"{means[2]:.2f} dB, bicubic {means[0]:.2f} dB",
        "SSIM of luma": f"{means[3]:.4f}, bicubic {means[1]:.4f}",
    }


def _figure(bicubic: Image, ours: Image) -> str:
    move = "this.parentNode.style.setProperty('--at', this.value + '%')"
    return (
        f'<figure><img alt="upscaled" src="{_data_url(ours)}"><img alt="bicubic" src="{_data_url(bicubic)}">'
        f'<i></i><input type="range" value="50" aria-label="compare" oninput="{move}"></figure>'
    )


def _rows(facts: Mapping[str, object]) -> str:
    return "".join(f"<tr><th>{html.escape(name)}<td>{html.escape(str(fact))}" for name, fact in facts.items())


def _data_url(image: Image) -> str:
    """An (H, W, 3) image as JPEG in a URL."""
    file = io.BytesIO()
    with av.open(file, "w", format="image2pipe") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "yuvj444p"
        stream.codec_context.qmin = stream.codec_context.qmax = JPEG_QUANTISER
        container.mux(stream.encode(frame_from_rgb(image, (stream.height, stream.width), "yuvj444p", JFIF)))
        container.mux(stream.encode(None))
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
