"""Still images with tags: the picture upright, color profile and EXIF in the PNG."""

from __future__ import annotations

import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, pictures, run_client
from ffmpeg import ffmpeg
from PIL import Image, ImageCms, ImageOps

from mst_gan_client.video.orientation import upright

PICTURE = pictures(1, 24, 40)[0]
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ORIENTATION, MODEL, EXIF_IFD, WIDTH_TAG, EXPOSURE = 0x0112, 0x0110, 0x8769, 0xA002, 0x829A


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION], tags[MODEL] = orientation, "Camera"
    tags.get_ifd(EXIF_IFD)[WIDTH_TAG] = 40
    tags.get_ifd(EXIF_IFD)[EXPOSURE] = 0.5
    return tags


def still(path, orientation=1, profile=PROFILE):
    """An image as cameras and editors save it."""
    options = {"exif": exif(orientation), "icc_profile": profile}
    quality = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}
    Image.fromarray(PICTURE).save(path, **options, **quality.get(path.suffix, {}))
    return path


@pytest.fixture(scope="module")
def triton():
    with FakeTriton() as server:
        yield server


def upscaled(source, out, triton, *options):
    result = run_client(source, out, "--url", triton.url, *options)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(orientation):
    image = Image.fromarray(PICTURE)
    image.getexif()[ORIENTATION] = orientation
    assert (upright(PICTURE, orientation) == np.asarray(ImageOps.exif_transpose(image))).all()


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_a_tagged_still_is_upright_and_keeps_its_tags(tmp_path, triton, suffix, orientation):
    source = still(tmp_path / f"in{suffix}", orientation)
    out = upscaled(source, tmp_path / "out.png", triton)
    with Image.open(source) as before, Image.open(out) as after:
        shown = np.asarray(ImageOps.exif_transpose(before).convert("RGB"))
        found = np.asarray(after)
        assert found.shape == (4 * shown.shape[0], 4 * shown.shape[1], 3)
        assert np.abs(found[2::4, 2::4].astype(int) - shown).max() <= 2
        assert after.info["icc_profile"] == PROFILE
        tags = after.getexif()
        assert ORIENTATION not in tags
        if suffix != ".tiff":
            assert tags[MODEL] == "Camera"
            assert set(tags.get_ifd(EXIF_IFD)) == {EXPOSURE}


def test_a_folder_of_tagged_stills(tmp_path, triton):
    """Color profiles of PNG crashed the process at the third image."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(5):
        still(folder / f"{number}.png", 6)
    out = upscaled(folder, tmp_path / "out", triton, "--segment-frames", 2)
    for path in sorted(out.iterdir()):
        with Image.open(path) as image:
            assert image.size == (96, 160)
            assert image.info["icc_profile"] == PROFILE
    video = upscaled(folder, tmp_path / "out.mkv", triton)
    assert [frame.shape for frame in decoded(video)] == [(160, 96, 3)] * 5


def test_a_profile_that_is_none_of_rgb_is_left_out(tmp_path, triton, caplog):
    profile = bytearray(PROFILE)
    profile[16:20] = b"CMYK"
    out = upscaled(still(tmp_path / "in.png", profile=bytes(profile)), tmp_path / "out.png", triton)
    with Image.open(out) as image:
        assert "icc_profile" not in image.info
    assert "the color profile of" in caplog.text


def test_broken_tags_of_a_good_image(tmp_path, triton, caplog):
    source = still(tmp_path / "in.jpg")
    data = bytearray(source.read_bytes())
    start = data.index(b"Exif\0\0") + 6
    data[start + 4 : start + 8] = b"\xff" * 4  # tags far behind the end
    source.write_bytes(data)
    out = upscaled(source, tmp_path / "out.png", triton)
    assert np.abs(decoded(out)[0][2::4, 2::4].astype(int) - PICTURE).max() < 30
    assert "the tags of" in caplog.text


def test_a_camera_that_tags_every_frame(tmp_path, triton):
    """Motion JPEG with EXIF, for which PyAV has no name."""
    still(tmp_path / "0.jpg")
    clip = ffmpeg("-loop", "1", "-i", tmp_path / "0.jpg", "-frames:v", "4", "-c", "copy", tmp_path / "in.avi")
    out = upscaled(clip, tmp_path / "out.mp4", triton)
    assert len(decoded(out)) == 4


def test_pages_that_are_left_out_are_said(tmp_path, triton, caplog):
    """FFmpeg shows the first page alone, and nothing of an animated WebP."""
    image = Image.fromarray(PICTURE)
    for name in ("pages.tiff", "animation.webp"):
        image.save(tmp_path / name, save_all=True, append_images=[Image.fromarray(255 - PICTURE)] * 2)
    upscaled(tmp_path / "pages.tiff", tmp_path / "out.png", triton)
    assert f"of 3 images in {tmp_path / 'pages.tiff'}, the first is taken" in caplog.text
    result = run_client(tmp_path / "animation.webp", tmp_path / "b.png", "--url", triton.url)
    assert result.exit_code == 1
    assert "expected a still image, found an animation of" in result.output
    caplog.clear()
    image.save(tmp_path / "one.tiff")
    upscaled(tmp_path / "one.tiff", tmp_path / "one.png", triton)
    assert "is taken" not in caplog.text


def test_cmyk_is_no_transparency(tmp_path, triton, caplog):
    Image.fromarray(PICTURE).convert("CMYK").save(tmp_path / "in.jpg", quality=100, subsampling=0)
    out = upscaled(tmp_path / "in.jpg", tmp_path / "out.png", triton)
    with Image.open(tmp_path / "in.jpg") as source:
        shown = np.asarray(source.convert("RGB")).astype(int)
    assert np.abs(decoded(out)[0][2::4, 2::4] - shown).max() <= 2
    assert "transparency" not in caplog.text
