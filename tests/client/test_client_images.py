"""Still images, and clips that are folders of images."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, frame_times, pictures, run_client, sum_of_window, write_clip

IMAGES = pictures(12)


def write_image(path, image, codec="png", pix_fmt="rgb24"):
    return write_clip(path, [image], codec=codec, pix_fmt=pix_fmt, container_options={"update": "1"})


def expected_frames(images):
    edges = [images[0], *images, images[-1]]
    return [sum_of_window(np.stack(edges[t : t + 3])[None])[0] for t in range(len(images))]


@pytest.fixture(scope="module")
def triton():
    with FakeTriton(network=sum_of_window) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """A clip as twelve PNG files whose numbers do not begin at 0."""
    path = tmp_path / "frames [1]"
    path.mkdir()
    for number, image in enumerate(IMAGES):
        write_image(path / f"shot_{number + 95:03d}.png", image)
    return path


def test_a_folder_of_images_becomes_a_folder_of_images(tmp_path, triton, folder):
    """The windows are those of a clip, the names those of the images, the pixels exact."""
    out = tmp_path / "out"
    result = run_client(folder, out, "--url", triton.url, "--segment-frames", 5)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name, expected in zip(names, expected_frames(IMAGES), strict=True):
        assert (decoded(out / name)[0] == expected).all()
    assert not (tmp_path / "out.part").exists()


def test_a_part_of_a_folder(tmp_path, triton, folder):
    out = tmp_path / "out"
    result = run_client(folder, out, "--url", triton.url, "--start", "0.2", "--max-frames", 3)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["shot_100.png", "shot_101.png", "shot_102.png"]


def test_a_folder_of_images_becomes_a_video(tmp_path, triton, folder):
    out = tmp_path / "out.mp4"
    result = run_client(folder, out, "--url", triton.url, "--rate", "30000/1001")
    assert result.exit_code == 0, result.output
    assert frame_times(out) == [Fraction(n * 1001, 30000) for n in range(12)]


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"), [("in.png", "png", "rgb24"), ("in.jpg", "mjpeg", "yuvj444p")]
)
def test_a_still_image(tmp_path, triton, name, codec, pix_fmt):
    still = write_image(tmp_path / name, IMAGES[3], codec, pix_fmt)
    out = tmp_path / "out.png"
    result = run_client(still, out, "--url", triton.url)
    assert result.exit_code == 0, result.output
    assert (decoded(out)[0] == expected_frames(decoded(still))[0]).all()


def test_many_still_images(tmp_path, triton, folder):
    """A pattern means files, each for itself; a folder means a clip."""
    result = run_client(f"{tmp_path}/frames*/shot_0*.png", tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").iterdir())) == 5
    assert (decoded(tmp_path / "out" / "shot_096.png")[0] == expected_frames([IMAGES[1]])[0]).all()


def test_numbers_without_leading_zeros(tmp_path, triton):
    for number in (2, 10):
        write_image(tmp_path / f"{number}.png", IMAGES[0])
    result = run_client(tmp_path, tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 1
    assert "found 10.png before 2.png: write the numbers with leading zeros" in result.output


def test_images_of_two_kinds(tmp_path, triton, folder):
    write_image(folder / "shot_001.bmp", IMAGES[0], "bmp", "bgr24")
    result = run_client(folder, tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 1
    assert "expected images of one kind in" in result.output
    assert "1 .bmp, 12 .png" in result.output


def test_images_of_two_sizes(tmp_path, triton, folder):
    write_image(folder / "shot_200.png", pictures(1, 16, 16)[0])
    before = triton.requests
    result = run_client(folder, tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 1
    assert "expected images of one size, found 16x16 and 48x32 in" in result.output
    assert triton.requests == before


def test_images_are_replaced_only_when_asked(tmp_path, triton, folder):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shot_095.png").write_text("precious")
    result = run_client(folder, out, "--url", triton.url)
    assert (result.exit_code, "exists: pass --overwrite" in result.output) == (1, True)
    assert (out / "shot_095.png").read_text() == "precious"
    assert run_client(folder, out, "--url", triton.url, "--overwrite").exit_code == 0
    assert decoded(out / "shot_095.png")[0].shape == (128, 192, 3)


def test_options_that_images_do_not_have(tmp_path, triton, folder):
    result = run_client(folder, tmp_path / "out", "--url", triton.url, "--codec", "hevc")
    assert result.exit_code == 1
    assert "images are written as PNG: leave --codec" in result.output


def test_transparency_is_named(tmp_path, triton, caplog):
    image = np.dstack([IMAGES[0], np.full((32, 48), 128, np.uint8)])
    with av.open(tmp_path / "in.png", "w", container_options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgba")))
        container.mux(stream.encode(None))
    result = run_client(tmp_path / "in.png", tmp_path / "out.png", "--url", triton.url)
    assert result.exit_code == 0, result.output
    assert "transparency is left out" in caplog.text
