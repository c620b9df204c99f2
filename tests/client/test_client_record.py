"""What a continued run knows of the run before it, and inputs that change while they are read."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from client_fakes import (
    LOSSLESS,
    FakeTriton,
    decoded,
    frame_times,
    pictures,
    run_client,
    sum_of_window,
    write_clip,
)

from mst_gan_client.record import SAMPLE_BYTES, SAMPLES, Record, input_identity
from mst_gan_client.video import convert
from mst_gan_client.video.mux import Muxer
from mst_gan_client.video.source import Source

pytestmark = pytest.mark.slow

COUNT = 30


@pytest.fixture(scope="module")
def triton():
    with FakeTriton(network=sum_of_window) as server:
        yield server


def shots(count, cuts):
    """Pictures with cuts before the given frames."""
    images = pictures(count)
    return [255 - image if sum(cut <= t for cut in cuts) % 2 else image for t, image in enumerate(images)]


def stop_after(monkeypatch, segments):
    """Let the run end when so many segments are finished."""
    import mst_gan_client.run as run

    write, written = run.write_segment, []

    def limited(path, *arguments):
        if path.stem != "rehearsal":
            written.append(path)
        if len(written) > segments:
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    monkeypatch.setattr(run, "write_segment", limited)


def upscale(clip, out, triton, *options):
    return run_client(clip, out, "--url", triton.url, "--segment-frames", 7, "--json", *LOSSLESS, *options)


@pytest.mark.parametrize("cut", [5, 6, 7, 8, 13, 14, 15])
@pytest.mark.parametrize("stop", [1, 2])
def test_cuts_are_those_of_an_undisturbed_run(tmp_path, triton, monkeypatch, cut, stop):
    """Wherever the cut lies beside the frame at which the run goes on."""
    clip = write_clip(tmp_path / "in.mkv", shots(COUNT, (cut, 20)), codec="ffv1", pix_fmt="bgr0")
    calm, out = tmp_path / "calm.mkv", tmp_path / "out.mkv"
    undisturbed = upscale(clip, calm, triton)
    assert undisturbed.exit_code == 0, undisturbed.output
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        result = upscale(clip, out, triton)
        assert result.exit_code == 1
        assert f"{7 * stop} frames are kept" in result.output
    result = upscale(clip, out, triton)
    assert result.exit_code == 0, result.output
    calm_event, event = (json.loads(one.stdout.splitlines()[-1]) for one in (undisturbed, result))
    assert event["cuts_s"] == calm_event["cuts_s"] == [cut / 25, 0.8]
    assert event["frames"] == COUNT and event["new_frames"] == COUNT - 7 * stop
    assert frame_times(out) == frame_times(calm)
    assert all((one == other).all() for one, other in zip(decoded(out), decoded(calm), strict=True))


def test_a_failed_join_run_again_tells_the_truth(tmp_path, triton, monkeypatch):
    """30 frames in segments of 100: the one segment has 30 frames, not 100."""
    clip = write_clip(tmp_path / "in.mp4", pictures(COUNT))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Muxer, "write", fail)
    for _ in range(2):
        result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
        assert result.exit_code == 1
        assert f"stopped after frame 30 of {clip}: cannot write it (No space left" in result.output
        assert "; 30 frames are kept in" in result.output
    result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--json")
    started = json.loads(result.stdout.splitlines()[0])
    assert (started["frames"], started["frames_done"]) == (30, 30)


def test_a_segment_without_its_record_is_made_again(tmp_path, triton, monkeypatch):
    """As a crash between the two leaves it; later segments of before do not count either."""
    clip = write_clip(tmp_path / "in.mkv", pictures(COUNT), codec="ffv1", pix_fmt="bgr0")
    out = tmp_path / "out.mkv"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert upscale(clip, out, triton).exit_code == 1
    (tmp_path / "out.mkv.part" / "000001.record").unlink()
    (tmp_path / "out.mkv.part" / "000001.segment").write_bytes(b"garbage")
    result = upscale(clip, out, triton)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["new_frames"] == COUNT - 7
    assert len(decoded(out)) == COUNT


def test_a_clip_that_is_decoded_in_another_way_is_not_mixed_in(tmp_path, triton, monkeypatch):
    clip = write_clip(tmp_path / "in.mkv", pictures(COUNT), codec="ffv1", pix_fmt="bgr0")
    out = tmp_path / "out.mkv"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert upscale(clip, out, triton).exit_code == 1
    original = convert.rgb_from_frame
    monkeypatch.setattr(convert, "rgb_from_frame", lambda *arguments: original(*arguments) ^ 1)
    result = upscale(clip, out, triton)
    assert result.exit_code == 1
    assert f"expected frame 14 of {clip} as it was when the unfinished run read it" in result.stderr


# Inputs that change


def changed_while_read(triton, monkeypatch, clip, change, out, *options):
    """Change the input when frame 10 is sent; whether a run notices it."""
    triton.before_answer = lambda count: change() if count == 10 else None
    triton.requests = 0
    try:
        return run_client(clip, out, "--url", triton.url, "--segment-frames", 4, *options)
    finally:
        triton.before_answer = lambda count: None


def replaced(clip, new):
    os.replace(new, clip)


def written_over(clip, new):
    clip.write_bytes(new.read_bytes())


def appended_to(clip, new):
    with clip.open("ab") as file:
        file.write(b"more")


def removed(clip, new):
    clip.unlink()


def replaced_in_disguise(clip, new):
    """Same size, same time of change: only the bytes tell."""
    stat = clip.stat()
    new.write_bytes(new.read_bytes()[: stat.st_size].ljust(stat.st_size, b"\0"))
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(new, clip)


@pytest.mark.parametrize("change", [replaced, written_over, appended_to, removed, replaced_in_disguise])
def test_an_input_that_changes_while_it_is_read(tmp_path, triton, monkeypatch, change):
    clip = write_clip(tmp_path / "in.mp4", pictures(40), audio=True)
    new = write_clip(tmp_path / "new.mp4", pictures(40, 48, 64), audio=True)
    out = tmp_path / "out.mp4"
    result = changed_while_read(triton, monkeypatch, clip, lambda: change(clip, new), out)
    assert result.exit_code == 1
    assert f"expected {clip} to stay as it is, found that it changed while it was read" in result.output
    assert not out.exists()


def test_a_folder_of_images_that_changes_while_it_is_read(tmp_path, triton, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, image in enumerate(pictures(20)):
        path = folder / f"{number:02}.png"
        write_clip(path, [image], codec="png", pix_fmt="rgb24", container_options={"update": "1"})

    def change():
        shutil.copy(folder / "00.png", folder / "19.png")

    result = changed_while_read(triton, monkeypatch, folder, change, tmp_path / "out")
    assert result.exit_code == 1
    assert f"expected {folder} to stay as it is" in result.output


def test_identity_is_by_size_time_and_samples(tmp_path):
    """Without reading all of a large file."""
    path = tmp_path / "in.mp4"
    size = SAMPLES * SAMPLE_BYTES * 4
    path.write_bytes(bytes(size))
    os.utime(path, ns=(0, 0))
    found = {input_identity(Source(path))}
    for place in (0, size - 1, (size - SAMPLE_BYTES) * 7 // (SAMPLES - 1)):
        data = bytearray(size)
        data[place] = 1
        path.write_bytes(data)
        os.utime(path, ns=(0, 0))
        found.add(input_identity(Source(path)))
    path.write_bytes(bytes(size))
    found.add(input_identity(Source(path)))  # another time
    path.write_bytes(bytes(size + 1))
    os.utime(path, ns=(0, 0))
    found.add(input_identity(Source(path)))
    assert len(found) == 6


def test_a_large_file_is_not_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "in.mp4"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a terabyte, of holes
    input_identity(Source(path))


def test_small_files_are_read_whole(tmp_path):
    path = tmp_path / "in.mp4"
    found, places = set(), range(0, 3 * SAMPLE_BYTES, SAMPLE_BYTES // 3)
    for place in places:
        data = bytearray(3 * SAMPLE_BYTES)
        data[place] = 1
        path.write_bytes(data)
        os.utime(path, ns=(0, 0))
        found.add(input_identity(Source(path)))
    assert len(found) == len(places)


def test_records_of_parts_make_up_the_whole():
    whole = Record()
    for t in range(10):
        whole.add(3 * t, np.full((4, 4, 3), t, np.uint8), t // 4, t // 5)
    whole.cuts = [9, 12]
    texts = [whole.part(start, start + 4).to_json() for start in (0, 4, 8)]
    assert Record.from_json(texts) == whole
