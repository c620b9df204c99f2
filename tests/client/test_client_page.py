"""The report of a run, and the scores in it."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
from client_fakes import LOSSLESS, decoded, nearest, pictures, run_client, write_clip
from ffmpeg import ffmpeg
from requirements import missing

from mst_gan_client.reports.compare import resized
from mst_gan_client.reports.scores import luma, psnr_db, ssim

pytestmark = pytest.mark.slow


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mkv", pictures(9), codec="ffv1", pix_fmt="bgr0")


@pytest.fixture
def truth(tmp_path):
    """What the fake network answers, a little off."""
    exact = [nearest(image[None, None].repeat(3, 1))[0] for image in pictures(9)]
    off = [np.where(image < 250, image + 4, image).astype(np.uint8) for image in exact]
    return write_clip(tmp_path / "truth.mkv", off, codec="ffv1", pix_fmt="bgr0")


def page_of(clip, triton, *options):
    out, page = clip.with_name("out.mkv"), clip.with_name("report.html")
    result = run_client(clip, out, "--url", triton.url, *LOSSLESS, "--report", page, *options)
    assert result.exit_code == 0, result.output
    return page.read_text()


def test_a_page_that_needs_nothing_else(clip, triton):
    page = page_of(clip, triton)
    assert page.count('<figure class="slide" ') == 3
    assert page.count("data:image/jpeg;base64,") == 3 * (2 + 2)
    assert "ours, frame 5, 0.16 s" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for fact in ("48 x 32 to 192 x 128", "frames per second", "<th>Scene cuts<td>none", "<th>encode<td "):
        assert fact in page
    assert f"<th>Model<td>mst_gan at {triton.url}" in page and "<th>Encoder<td>ffv1, bgr0, level 3" in page
    assert "<th>Part of the clip<td>all" in page and "PSNR" not in page


def test_the_part_is_told(clip, triton):
    page = page_of(clip, triton, "--start", "0.08", "--duration", "0.2", "--max-frames", 4)
    assert "<th>Part of the clip<td>from 0.08 s, for 0.2 s, at most 4 frames" in page


def test_a_folder_that_is_not_there_is_told_before_the_work(clip, triton, tmp_path):
    for option, name in (("--report", "r.html"), ("--compare", "c.png")):
        target = tmp_path / "none" / name
        result = run_client(clip, tmp_path / "out.mkv", "--url", triton.url, option, target)
        assert result.exit_code == 1
        assert f"cannot write {target}: expected a folder {tmp_path}/none; create it" in result.output
    assert triton.requests == 0


def test_scores_against_the_truth(clip, triton, truth):
    page = page_of(clip, triton, "--reference", truth)
    ours, bicubic = map(float, re.search(r"PSNR of luma<td>([\d.]+) dB, bicubic ([\d.]+) dB", page).groups())
    hr, exact = decoded(clip.with_name("out.mkv")), decoded(truth)
    expected = np.mean([psnr_db(luma(a), luma(b)) for a, b in zip(hr, exact, strict=True)])
    assert abs(ours - expected) < 0.006
    assert ours > bicubic
    assert re.search(r"SSIM of luma<td>0\.\d{4}, bicubic 0\.\d{4}", page)
    assert page.count("<figcaption>truth</figcaption>") == 3


def scores(page):
    return tuple(map(float, re.search(r"PSNR of luma<td>([\d.]+) dB, bicubic ([\d.]+) dB", page).groups()))


def test_of_a_reference_the_same_part_is_taken(clip, triton, truth):
    """Each frame of the truth is another; the wrong ones would score some 20 dB."""
    page = page_of(clip, triton, "--reference", truth, "--start", "0.12", "--max-frames", 3)
    hr, exact = decoded(clip.with_name("out.mkv")), decoded(truth)[3:6]
    expected = np.mean([psnr_db(luma(a), luma(b)) for a, b in zip(hr, exact, strict=True)])
    assert abs(scores(page)[0] - expected) < 0.006


def test_a_reference_of_another_length(clip, triton, tmp_path):
    exact = [nearest(image[None, None].repeat(3, 1))[0] for image in pictures(12)]
    for count, found in ((8, "found the end of"), (12, "found more frames in")):
        other = write_clip(tmp_path / f"{count}.mkv", exact[:count], codec="ffv1", pix_fmt="bgr0")
        options = ("--report", tmp_path / "r.html", "--reference", other, "--overwrite")
        result = run_client(clip, tmp_path / "out.mkv", "--url", triton.url, *LOSSLESS, *options)
        assert result.exit_code == 1
        assert f"expected a reference as long as {clip}, {found}" in result.output


def test_a_reference_of_a_turned_clip_may_be_upright(clip, triton, truth, tmp_path):
    """They are compared as players show them; a half turn does not change their size."""
    turned = ffmpeg("-display_rotation", "180", "-i", clip, "-c", "copy", tmp_path / "turned.mkv")
    upright = [np.rot90(image, 2).copy() for image in decoded(truth)]
    reference = write_clip(tmp_path / "upright.mkv", upright, codec="ffv1", pix_fmt="bgr0")
    straight = scores(page_of(clip, triton, "--reference", truth))
    assert scores(page_of(turned, triton, "--reference", reference, "--overwrite")) == straight


def test_a_reference_of_square_pixels(tmp_path, triton):
    clip = ffmpeg("-i", write_clip(tmp_path / "p.mkv", pictures(4)), "-vf", "setsar=2/1", tmp_path / "in.mkv")
    wide = [resized(image, (128, 384)) for image in pictures(4)]
    reference = write_clip(tmp_path / "wide.mkv", wide, codec="ffv1", pix_fmt="bgr0")
    page = page_of(clip, triton, "--square-pixels", "--reference", reference)
    assert "PSNR of luma" in page


def test_a_reference_that_does_not_fit(clip, triton, tmp_path):
    small = write_clip(tmp_path / "small.mkv", pictures(9), codec="ffv1", pix_fmt="bgr0")
    options = ("--url", triton.url, "--report", tmp_path / "r.html", "--reference", small, "--overwrite")
    result = run_client(clip, tmp_path / "out.mkv", *options)
    assert result.exit_code == 1
    assert "expected a reference of 192x128, found 48x32" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.mkv",
        "small.mkv",
    ]  # refused before any work
    missing = ("--url", triton.url, "--report", tmp_path / "r.html", "--reference", tmp_path / "no.mkv")
    result = run_client(clip, tmp_path / "out2.mkv", *missing)
    assert "expected --report and an existing file for --reference" in result.output


def test_names_are_escaped(tmp_path, triton):
    clip = write_clip(tmp_path / "a<b>.mkv", pictures(2))
    page = page_of(clip, triton)
    assert "a&lt;b&gt;.mkv" in page and "a<b>" not in page


def test_scores_are_those_of_scikit_image():
    from skimage import metrics

    rng = np.random.default_rng(2)
    one = rng.uniform(16, 235, (40, 50))
    other = np.clip(one + rng.normal(0, 12, one.shape), 0, 255)
    assert abs(psnr_db(one, other) - metrics.peak_signal_noise_ratio(one, other, data_range=255)) < 1e-9
    inner = np.s_[3:-3, 3:-3]  # scikit-image also looks at windows that are cut off, and leaves them out
    _, each = metrics.structural_similarity(one, other, win_size=7, data_range=255, full=True)
    assert abs(ssim(one, other) - each[inner].mean()) < 1e-9


def test_the_page_in_a_browser(clip, triton, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        missing("BROWSER", "neither chromium nor google-chrome is installed")
    page_of(clip, triton)
    shot = tmp_path / "shot.png"
    look = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,900", f"--screenshot={shot}"]
    look += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([browser, *look, clip.with_name("report.html").as_uri()], capture_output=True, timeout=300)
    (screen,) = decoded(shot)
    assert screen.shape[:2] == (900, 1100)
    assert np.unique(screen.reshape(-1, 3), axis=0).shape[0] > 500  # pictures, not a blank page
