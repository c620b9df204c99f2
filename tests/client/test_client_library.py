"""The library: ``Upscaler`` on frames from any source."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, ensemble_config, nearest, pictures, sum_of_window, write_clip

from mst_gan_client import FrameError, ServerError, UpscaleError, Upscaler

README = Path(__file__).parents[2] / "client/README.md"


def enlarged(image: np.ndarray) -> np.ndarray:
    return image.repeat(4, axis=0).repeat(4, axis=1)


@pytest.mark.parametrize("size", [(32, 48), (30, 45), (7, 9)])
def test_one_frame_for_each_in_order(triton: FakeTriton, size: tuple[int, int]) -> None:
    images, done = pictures(9, *size), []
    with Upscaler(triton.url) as upscaler:
        assert upscaler.scale == 4
        answers = list(upscaler.upscale(images, progress=done.append))
    np.testing.assert_array_equal(answers, [enlarged(image) for image in images])
    assert done == list(range(1, 10))


def test_windows_hold_the_neighbors() -> None:
    """The first and the last frame stand in for neighbors that do not exist, and for those beyond a cut."""
    shots = [*pictures(3), *(255 - image for image in pictures(2))]
    with FakeTriton(network=sum_of_window) as triton, Upscaler([triton.url]) as upscaler:
        answers = list(upscaler.upscale(shots))
    order = [(0, 0, 1), (0, 1, 2), (1, 2, 2), (3, 3, 4), (3, 4, 4)]
    expected = sum_of_window(np.stack([np.stack([shots[i] for i in window]) for window in order]))
    np.testing.assert_array_equal(answers, expected)


def test_frames_larger_than_the_model_takes_go_in_tiles() -> None:
    images = pictures(2, 96, 160)
    with (
        FakeTriton(config=ensemble_config(max_size="64x64"), network=nearest) as triton,
        Upscaler(triton.url) as upscaler,
    ):
        answers = list(upscaler.upscale(images))
    assert triton.requests > len(images)
    np.testing.assert_array_equal(answers, [enlarged(image) for image in images])


def test_frames_are_read_lazily(triton: FakeTriton) -> None:
    """A source without an end is no problem, and a second clip may follow an abandoned one."""

    def endless() -> Iterator[np.ndarray]:
        while True:
            yield from pictures(4)

    with Upscaler(triton.url) as upscaler:
        stream = upscaler.upscale(endless())
        first = next(stream)
        stream.close()
        assert len(list(upscaler.upscale(pictures(3)))) == 3
        assert list(upscaler.upscale([])) == []
    np.testing.assert_array_equal(first, enlarged(pictures(1)[0]))


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (np.zeros((32, 48), np.uint8), r"\(32, 48\) uint8"),
        (np.zeros((32, 48, 4), np.uint8), r"\(32, 48, 4\) uint8"),
        (np.zeros((32, 48, 3), np.float32), r"\(32, 48, 3\) float32"),
        (np.zeros((0, 48, 3), np.uint8), r"\(0, 48, 3\) uint8"),
        ("frame.png", r"\(\) str"),
    ],
)
def test_other_frames_are_refused(triton: FakeTriton, bad: object, found: str) -> None:
    with Upscaler(triton.url) as upscaler:
        for frames in ([bad], [*pictures(2), bad]):
            with pytest.raises(FrameError, match=rf"expected frames of shape .* found {found}") as caught:
                list(upscaler.upscale(frames))  # type: ignore[arg-type]
            assert isinstance(caught.value, ValueError) and isinstance(caught.value, UpscaleError)


def test_a_size_that_changes_is_refused(triton: FakeTriton) -> None:
    with (
        Upscaler(triton.url) as upscaler,
        pytest.raises(FrameError, match=r"\(32, 48, 3\).*found \(16, 48, 3\)"),
    ):
        list(upscaler.upscale([*pictures(2), *pictures(1, 16)]))


def test_no_server_is_a_connection_error() -> None:
    with FakeTriton() as triton:
        url = triton.url
    with pytest.raises(ConnectionError, match="no Triton server answers") as caught:
        Upscaler(url)
    assert isinstance(caught.value, ServerError)


def test_a_server_lost_for_good_is_a_connection_error() -> None:
    with FakeTriton() as triton, Upscaler(triton.url, patience_s=0.5) as upscaler:
        answers = upscaler.upscale(pictures(40))
        next(answers)
        triton.stop()
        with pytest.raises(ServerError, match="found no server"):
            list(answers)


def test_the_documented_example_runs(triton: FakeTriton, tmp_path: Path) -> None:
    """The Python block of the client's README, as it stands but for the server's address."""
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "localhost:8001" in example
    assert len(example.splitlines()) <= 16
    images = pictures(5)
    write_clip(tmp_path / "in.mp4", images)
    (tmp_path / "example.py").write_text(example.replace("localhost:8001", triton.url))
    subprocess.run([sys.executable, "example.py"], cwd=tmp_path, check=True, timeout=300)
    frames = decoded(tmp_path / "out.mp4")
    assert [frame.shape for frame in frames] == [(128, 192, 3)] * 5
    with av.open(tmp_path / "in.mp4") as container:
        source = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    error = np.abs(np.stack(frames).astype(int) - np.stack([enlarged(image) for image in source]))
    assert error.mean() < 4  # H.264


NEVER_CLOSED = """
import sys
import numpy as np
from mst_gan_client import Upscaler

upscaler = Upscaler(sys.argv[1])
print(sum(1 for _ in upscaler.upscale([np.zeros((16, 16, 3), np.uint8)] * 5)))
"""


def test_a_program_that_never_closes_it_ends(triton: FakeTriton) -> None:
    command = [sys.executable, "-c", NEVER_CLOSED, triton.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


def frames_under_way(upscaler: Upscaler) -> int:
    """The most frames that were read and not yet given back, over a clip."""
    read = most = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal read
        for image in pictures(60, 64, 64):
            read += 1
            yield image

    for done, _ in enumerate(upscaler.upscale(frames())):
        most = max(most, read - done)
    return most


@pytest.mark.parametrize(
    ("memory", "most"), [(100, 1), (2_500_000, 3), (None, 32)], ids=["little", "some", "a quarter of all"]
)
def test_memory_is_bounded_as_on_the_command_line(
    memory: int | None, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A frame of 64x64 is 12 kB, its answer 197 kB, and what is under way of both some 430 kB."""
    with (
        FakeTriton(before_answer=lambda _: time.sleep(0.01)) as triton,
        Upscaler(triton.url, memory=memory) as upscaler,
    ):
        found = frames_under_way(upscaler)
        assert triton.most_under_way <= most
        assert found <= most + 3  # those that the window being cut is made of
        assert upscaler._session._most_held == most
    assert ("one at a time is under way, see memory=" in caplog.text) == (most == 1)


def test_memory_is_a_quarter_of_the_machines_unless_given(
    triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mst_gan_client.upscaler.default_budget", lambda: 2_500_000)
    with Upscaler(triton.url) as upscaler:
        assert frames_under_way(upscaler) <= 6


def test_clips_of_several_sizes_have_a_plan_each(triton: FakeTriton) -> None:
    """The limit of a large clip does not hold for the small one after it."""
    with Upscaler(triton.url, memory=3_000_000) as upscaler:
        sizes = []
        for size in ((64, 64), (16, 16)):
            triton.most_under_way = 0
            assert sum(1 for _ in upscaler.upscale(pictures(60, *size))) == 60
            sizes.append(upscaler._session._most_held)
    assert sizes[0] < sizes[1]
