"""The command, end to end against a fake server: exact output, and one-line errors for bad input."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from client_fakes import (
    LOSSLESS,
    FakeTriton,
    decoded,
    ensemble_config,
    frame_times,
    http_server,
    nearest,
    packets,
    pictures,
    run_client,
    sum_of_window,
    write_clip,
)

from mst_gan_client.video.encode import same_scheduling

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "client" / "upscale.py"


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mp4", pictures(10), audio=True)


def succeeded(result):
    assert result.exit_code == 0, result.output
    return result


def failed(result):
    """The error of a run that failed as it should: one line, exit status 1."""
    assert result.exit_code == 1, result.output
    last = result.output.splitlines()[-1]
    assert last.startswith("Error: ")
    return last


# What must work


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_frames_times_and_sound_are_kept(clip, tmp_path, triton, suffix):
    out = tmp_path / f"out{suffix}"
    result = succeeded(run_client(clip, out, "--url", triton.url))
    assert "10 frames, 48x32 -> 192x128" in result.output
    assert frame_times(out) == frame_times(clip)
    assert packets(out, "audio") == packets(clip, "audio")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", out.name]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_every_frame_is_upscaled_in_its_own_window(tmp_path, count):
    """Lossless in, lossless out: each pixel is what the server made of the window."""
    images = pictures(count)
    clip = write_clip(tmp_path / "in.mkv", images, codec="ffv1", pix_fmt="bgr0")
    with FakeTriton(network=sum_of_window) as triton:
        out = tmp_path / "out.mkv"
        succeeded(run_client(clip, out, "--url", triton.url, "--segment-frames", 4, *LOSSLESS))
    edges = [images[0], *images, images[-1]]
    expected = [sum_of_window(np.stack(edges[t : t + 3])[None])[0] for t in range(count)]
    found = decoded(out)
    assert len(found) == count
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47), (479, 853), (9, 9)])
def test_odd_sizes(tmp_path, triton, height, width):
    images = pictures(2, height, width)
    clip = write_clip(tmp_path / "in.mkv", images, codec="ffv1", pix_fmt="bgr0")
    out = tmp_path / "out.mkv"
    succeeded(run_client(clip, out, "--url", triton.url, *LOSSLESS))
    assert all(shape[2] % 4 == shape[3] % 4 == 0 for shape in triton.shapes)
    expected = [nearest(image[None, None].repeat(3, axis=1))[0] for image in images]
    assert all((one == other).all() for one, other in zip(decoded(out), expected, strict=True))


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), 25, Fraction(30000, 1001), 60])
def test_rates_are_exact(tmp_path, triton, rate):
    clip = write_clip(tmp_path / "in.mp4", pictures(8), rate=rate)
    out = tmp_path / "out.mp4"
    succeeded(run_client(clip, out, "--url", triton.url))
    assert frame_times(out) == frame_times(clip) == [n / Fraction(rate) for n in range(8)]
    with av.open(out) as container:
        assert container.streams.video[0].average_rate == rate


def test_varying_frame_rate_over_segments(tmp_path, triton):
    pts = [0, 7, 8, 30, 31, 32, 90, 91, 200, 333]
    clip = write_clip(tmp_path / "in.mp4", pictures(10), pts=pts, time_base=Fraction(1, 1000))
    out = tmp_path / "out.mp4"
    succeeded(run_client(clip, out, "--url", triton.url, "--segment-frames", 3))
    assert frame_times(out) == [Fraction(t, 1000) for t in pts]


def test_a_clip_without_sound(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", pictures(3))
    out = tmp_path / "out.mp4"
    succeeded(run_client(clip, out, "--url", triton.url))
    with av.open(out) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("h264", "mp4"), ("hevc", "mp4"), ("av1", "mp4"), ("av1", "webm"), ("ffv1", "mkv"), ("prores", "mov")],
)
def test_codecs(tmp_path, triton, codec, suffix):
    clip = write_clip(tmp_path / "in.mp4", pictures(5, 48, 64))
    out = tmp_path / f"out.{suffix}"
    succeeded(run_client(clip, out, "--url", triton.url, "--codec", codec, "--segment-frames", 2))
    assert frame_times(out) == frame_times(clip)
    worst = max(
        np.abs(a - b.astype(int)).mean() for a, b in zip(decoded(out), map(up, decoded(clip)), strict=True)
    )
    assert worst < 6


def up(image):
    return image.repeat(4, axis=0).repeat(4, axis=1)


def test_an_interlaced_clip_is_named(tmp_path, triton, caplog):
    options = {"x264-params": "tff=1"}
    clip = write_clip(tmp_path / "in.mp4", pictures(4), pix_fmt="yuv420p", options=options)
    succeeded(run_client(clip, tmp_path / "out.mp4", "--url", triton.url))
    assert "better deinterlace the clip first" in caplog.text


def test_stages_add_up_to_the_time_taken(tmp_path, triton):
    """An encoder looks ahead: what it does after the last frame has come counts too."""
    clip = write_clip(tmp_path / "in.mp4", pictures(40, 120, 160))
    result = succeeded(run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--json"))
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["stages_s"]["encode"] + found["stages_s"]["inference"] > found["elapsed_s"] / 2


def test_it_runs_from_any_directory(clip, tmp_path, triton):
    command = [sys.executable, str(SCRIPT), "in.mp4", "out.mp4", "--url", triton.url]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(decoded(tmp_path / "out.mp4")) == 10


def test_decode_inference_and_encode_keep_the_server_busy(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", pictures(60))
    gate = threading.Event()
    triton.before_answer = lambda count: gate.wait(5) if count < 16 else gate.set()
    succeeded(run_client(clip, tmp_path / "out.mp4", "--url", triton.url))
    assert triton.most_under_way == 16


def test_two_servers_and_the_death_of_one(tmp_path, triton):
    images = pictures(60)
    clip = write_clip(tmp_path / "in.mkv", images, codec="ffv1", pix_fmt="bgr0")
    other = FakeTriton()
    other.before_answer = lambda count: count == 10 and threading.Thread(target=other.stop).start()
    out = tmp_path / "out.mkv"
    succeeded(run_client(clip, out, "--url", f"{triton.url}, {other.url}", *LOSSLESS))
    assert other.requests >= 10
    assert all((one == up(image)).all() for one, image in zip(decoded(out), images, strict=True))


# What must fail, and how


def test_missing_file(tmp_path, triton):
    message = failed(run_client(tmp_path / "no.mp4", tmp_path / "out.mp4", "--url", triton.url))
    assert f"no such file: {tmp_path / 'no.mp4'}" in message


def test_a_text_file_named_mp4(tmp_path, triton):
    (tmp_path / "in.mp4").write_text("not a video\n" * 100)
    message = failed(run_client(tmp_path / "in.mp4", tmp_path / "out.mp4", "--url", triton.url))
    assert "expected a video, found" in message
    assert "check that it plays" in message
    assert not (tmp_path / "out.mp4.part").exists()


def test_sound_alone(tmp_path, triton):
    with av.open(tmp_path / "in.m4a", "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    message = failed(run_client(tmp_path / "in.m4a", tmp_path / "out.mp4", "--url", triton.url))
    assert "expected a video, found only audio" in message


def test_zero_frames(tmp_path, triton):
    clip = write_clip(tmp_path / "full.mkv", pictures(1), codec="ffv1")
    with av.open(clip) as full, av.open(tmp_path / "in.mkv", "w") as empty:
        empty.add_stream_from_template(full.streams.video[0], opaque=True)
        empty.start_encoding()
    message = failed(run_client(tmp_path / "in.mkv", tmp_path / "out.mp4", "--url", triton.url))
    assert "expected a video, found no frame in" in message


def test_output_folder_missing(clip, tmp_path, triton):
    message = failed(run_client(clip, tmp_path / "no" / "out.mp4", "--url", triton.url))
    assert f"expected a folder {tmp_path / 'no'}; create it" in message


@pytest.mark.parametrize("folder", ["/sys", "/proc"])  # they refuse in different ways
def test_output_not_writable(clip, triton, folder):
    message = failed(run_client(clip, f"{folder}/out.mp4", "--url", triton.url))
    assert f"cannot write {folder}/out.mp4" in message
    assert "name an output you may write" in message


def test_output_exists(clip, tmp_path, triton):
    out = tmp_path / "out.mp4"
    out.write_text("precious")
    assert "exists: pass --overwrite" in failed(run_client(clip, out, "--url", triton.url))
    assert out.read_text() == "precious"
    succeeded(run_client(clip, out, "--url", triton.url, "--overwrite"))
    assert len(decoded(out)) == 10


def test_unknown_output_container(clip, tmp_path, triton):
    message = failed(run_client(clip, tmp_path / "out.xyz", "--url", triton.url))
    assert "expected a file name such as out.mp4 or out.mkv, found .xyz" in message


def test_container_that_cannot_hold_the_codec(clip, tmp_path, triton):
    message = failed(run_client(clip, tmp_path / "out.webm", "--url", triton.url))
    assert ".webm files cannot hold h264 pictures: name the output .mkv" in message
    assert triton.requests == 0


def test_wrong_pixel_format_and_quality(clip, tmp_path, triton):
    out = tmp_path / "out.mov"
    assert "expected a pixel format of h264" in failed(run_client(clip, out, "--pix-fmt", "nosuch"))
    assert "prores has no crf" in failed(run_client(clip, out, "--codec", "prores", "--crf", 20))
    message = failed(run_client(clip, out, "--preset", "warp9", "--url", triton.url))
    assert "libx264 refused" in message
    assert triton.requests == 0


def test_server_not_running(clip, tmp_path):
    message = failed(run_client(clip, tmp_path / "out.mp4", "--url", "127.0.0.1:9"))
    assert "no Triton server answers at 127.0.0.1:9: start one with `make serve`" in message


def test_http_port(clip, tmp_path):
    with http_server() as port:
        message = failed(run_client(clip, tmp_path / "out.mp4", "--url", f"127.0.0.1:{port}"))
    assert "found HTTP: give Triton's gRPC port, usually 8001" in message


def test_ensemble_not_loaded(clip, tmp_path, triton):
    message = failed(run_client(clip, tmp_path / "out.mp4", "--url", triton.url, "--model", "other"))
    assert "has not loaded model 'other'" in message


def test_ensemble_with_another_contract(clip, tmp_path):
    with FakeTriton(config=ensemble_config(scale="")) as triton:
        message = failed(run_client(clip, tmp_path / "out.mp4", "--url", triton.url))
    assert "is no video upscaler: expected a parameter 'scale', found none" in message


def test_server_killed_half_way(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", pictures(60), options={"g": "10"})
    out = tmp_path / "out.mp4"
    triton.before_answer = lambda count: count == 30 and threading.Thread(target=triton.stop).start()
    arguments = (clip, out, "--url", triton.url, "--segment-frames", 8, "--patience", 0.5)
    message = failed(run_client(*arguments))
    assert "stopped after frame " in message
    assert f"frames are kept in {out}.part" in message
    assert "`make serve`" in message
    stopped_after = int(message.split("after frame ")[1].split()[0])
    kept = int(message.split("; ")[-1].split()[0])
    assert 0 <= stopped_after - kept < 8
    assert not out.exists()

    triton.before_answer = lambda count: None
    triton.start()
    before = len(triton.ids)
    succeeded(run_client(*arguments))
    assert len(triton.ids) - before == 60 - kept
    assert frame_times(out) == frame_times(clip)
    assert not Path(f"{out}.part").exists()


def test_a_file_cut_short(tmp_path, triton):
    whole = write_clip(tmp_path / "whole.mkv", pictures(60))
    clip, out = tmp_path / "in.mkv", tmp_path / "out.mkv"
    clip.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    message = failed(run_client(clip, out, "--url", triton.url))
    assert re.search(r"the file ends after \d+( of 60)? frames, \d\.\d\d s of 2\.40 s: get it whole", message)
    before = triton.requests
    succeeded(run_client(clip, out, "--url", triton.url, "--allow-damage"))
    assert triton.requests == before  # all that there is had been upscaled
    assert 20 < len(frame_times(out)) < 45


def test_an_mp4_without_its_end(tmp_path, triton):
    whole = write_clip(tmp_path / "whole.mp4", pictures(60))
    (tmp_path / "in.mp4").write_bytes(whole.read_bytes()[:-2000])
    message = failed(run_client(tmp_path / "in.mp4", tmp_path / "out.mp4", "--url", triton.url))
    assert "expected a video, found" in message


def with_broken_packets(clip, path, broken, filler):
    """Copy a clip, the bytes of some packets replaced."""
    with av.open(clip) as source, av.open(path, "w") as out:
        copy = out.add_stream_from_template(source.streams.video[0], opaque=True)
        for index, packet in enumerate(p for p in source.demux(video=0) if p.size):
            new = packet
            if index in broken:
                new = av.Packet(filler(bytes(packet)))
                new.pts, new.dts, new.time_base = packet.pts, packet.dts, packet.time_base
                new.duration, new.is_keyframe = packet.duration, packet.is_keyframe
            new.stream = copy
            out.mux(new)
    return path


def test_frames_that_cannot_be_decoded_are_counted_and_refused(tmp_path, triton):
    whole = write_clip(tmp_path / "whole.mov", pictures(20), codec="png", pix_fmt="rgb24")
    clip = with_broken_packets(whole, tmp_path / "in.mov", {7, 8, 12}, lambda data: b"x" * len(data))
    message = failed(run_client(clip, tmp_path / "out.mkv", "--url", triton.url))
    assert "has 3 frames that cannot be decoded: get it whole, or pass --allow-damage" in message
    result = succeeded(run_client(clip, tmp_path / "out.mkv", "--url", triton.url, "--allow-damage"))
    assert "17 frames" in result.output
    there = [Fraction(n, 25) for n in range(20) if n not in {7, 8, 12}]
    assert frame_times(tmp_path / "out.mkv") == there


def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files stands in for the disk."""
    rng = np.random.default_rng(1)
    write_clip(tmp_path / "in.mp4", pictures(40))
    with FakeTriton(network=lambda lr: rng.integers(0, 256, nearest(lr).shape, np.uint8)) as triton:
        command = [sys.executable, SCRIPT, "in.mp4", "out.mkv", "--url", triton.url, *LOSSLESS]
        limited = ["bash", "-c", 'ulimit -f 500; exec "$@"', "limited", *command]
        done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "cannot write it (File too large)" in done.stderr.splitlines()[-1]
    assert "the same command goes on from there" in done.stderr
    assert not (tmp_path / "out.mkv").exists()


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("VSR_DEBUG", "1")
    result = run_client(tmp_path / "no.mp4", tmp_path / "out.mp4")
    assert type(result.exception).__name__ == "UpscaleError"


def test_no_torch_and_no_export_is_loaded():
    code = "import sys, upscale; print([m for m in ('torch', 'export') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_encoders_open_one_at_a_time():
    """One that opens beside SVT-AV1 would take real-time for the scheduling that it is to restore."""
    inside, most = [], []

    def open_one(_):
        with same_scheduling():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_one, range(8)))
    assert max(most) == 1


def test_an_encoder_leaves_the_scheduling_of_the_process_alone(tmp_path):
    """SVT-AV1 makes its process real-time, and a server on the same cores would starve."""
    code = (
        "import os, sys; from pathlib import Path; import numpy as np; from fractions import Fraction\n"
        "from mst_gan_client.video.encode import encoding_from_options, write_segment\n"
        "from mst_gan_client.video.decode import Video\n"
        "from mst_gan_client.video.source import Source\n"
        "with Video(Source(Path(sys.argv[1]))) as video: picture = video.picture\n"
        "height, width = picture.size\n"
        "def policies(): return {os.sched_getscheduler(int(t)) for t in os.listdir('/proc/self/task')}\n"
        "def frames():\n"
        "    for _ in range(3): yield np.zeros((height, width, 3), np.uint8); seen.update(policies())\n"
        "before, seen = policies(), set()\n"
        "encoding = encoding_from_options('av1', None, None, None)\n"
        "write_segment(Path(sys.argv[2]), frames(), picture, encoding)\n"
        "print(before == seen | policies())"
    )
    clip = write_clip(tmp_path / "in.mkv", pictures(2, 64, 64))
    command = [sys.executable, "-c", code, str(clip), str(tmp_path / "out.segment")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True", done.stdout
