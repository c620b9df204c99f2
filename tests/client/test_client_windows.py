"""Windows over a clip, and fitting frames to a model's sizes."""

import numpy as np
import pytest

from mst_gan_client.frames.windows import crop, fitted_size, pad, windows


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ("", []),
        ("a", ["aaa"]),
        ("ab", ["aab", "abb"]),
        ("abc", ["aab", "abc", "bcc"]),
        ("abcd", ["aab", "abc", "bcd", "cdd"]),
    ],
)
def test_every_frame_has_its_window_and_clip_ends_repeat(clip, expected):
    assert ["".join(window) for window in windows(clip, 3)] == expected


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_windows_of_any_size_are_centered_on_their_frame(count, size):
    half = size // 2
    expected = [
        tuple(min(max(t + offset, 0), count - 1) for offset in range(-half, half + 1)) for t in range(count)
    ]
    assert list(windows(range(count), size)) == expected


def test_no_window_looks_across_a_cut():
    found = ["".join(w) for w in windows("abcXYZ", 3, lambda a, b: a.islower() and b.isupper())]
    assert found == ["aab", "abc", "bcc", "XXY", "XYZ", "YZZ"]


def test_a_shot_of_one_frame_has_a_window_of_itself():
    assert ["".join(w) for w in windows("aXb", 5, lambda a, b: True)] == ["aaaaa", "XXXXX", "bbbbb"]


def test_windows_read_no_further_than_they_must():
    read = []
    source = (read.append(t) or t for t in range(100))
    next(windows(source, 3))
    assert read == [0, 1]


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((480, 852), (480, 852)), ((480, 853), (480, 856)), ((479, 852), (480, 852)), ((1, 1), (16, 16))],
)
def test_sizes_round_up_each_side_alone(size, fitted):
    assert fitted_size(size, 4, (16, 16)) == fitted


def test_padding_repeats_the_last_row_and_column_and_crop_undoes_it():
    image = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    padded = pad(image, (4, 8))
    assert padded.shape == (4, 8, 3)
    assert (padded[3, :5] == image[2]).all()
    assert (padded[:3, 5:] == image[:, 4:5]).all()
    assert (crop(padded, (3, 5)) == image).all()
    assert pad(image, (3, 5)) is image
