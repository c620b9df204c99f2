"""Whatever fails in one clip is said in one line that names the stage, and stays that clip's failure."""

from __future__ import annotations

import errno
import json

import av
import pytest
from client_fakes import FakeTriton, decoded, pictures, run_client, write_clip

from mst_gan_client.run import REHEARSED_FRAMES

pytestmark = pytest.mark.slow

ERRORS = [
    av.error.DecoderNotFoundError(1, "Decoder not found"),
    av.error.InvalidDataError(1, "Invalid data found when processing input"),
    av.error.ExternalError(1, "Generic error in an external library"),
    av.error.ArgumentError(errno.EINVAL, "Invalid argument"),
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    MemoryError(),
    ValueError("17 is not a valid Type"),
    KeyError("SIDE_DATA"),
]

# What to replace by something that fails, and how the stage is called.
STAGES = {
    "mst_gan_client.video.source.Source.open": "cannot read",
    "mst_gan_client.video.convert.rgb_from_frame": "cannot read",
    "mst_gan_client.record.input_identity": "cannot read",
    "mst_gan_client.frames.tiles.Grid.merge": "cannot send frames",
    "mst_gan_client.serving.session.Session.hr_frames": "cannot send frames",
    "mst_gan_client.video.encode.frame_from_rgb": "cannot encode",
    "mst_gan_client.video.mux.Muxer.write": "cannot write",
    "mst_gan_client.resume.ResumeState.finish": "cannot write",
    "mst_gan_client.resume.rename": "cannot write",
}


@pytest.fixture(scope="module")
def triton():
    with FakeTriton() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    for name in "abc":
        write_clip(films / f"{name}.mp4", pictures(3))
    return films


def fail_once(monkeypatch, target, error):
    """The first call fails, after that for the rehearsal; returns the list of calls."""
    number = 1 + REHEARSED_FRAMES if target.endswith("frame_from_rgb") else 1
    module, _, name = target.rpartition(".")
    parent = None if module.rpartition(".")[2][0].isupper() else __import__(module, fromlist=["x"])
    if parent is None:
        module, _, holder = module.rpartition(".")
        parent = getattr(__import__(module, fromlist=["x"]), holder)
    original, calls = getattr(parent, name), []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(parent, name, call)
    return calls


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("target", STAGES)
def test_one_clip_of_a_batch(tmp_path, triton, folder, monkeypatch, target, error):
    calls = fail_once(monkeypatch, target, error)
    result = run_client(folder, tmp_path / "out", "--url", triton.url, "--json")
    assert calls and result.exit_code == 1, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    failures = [event for event in events if event["event"] == "failed"]
    assert [event["input"] for event in failures] == [str(folder / "a.mp4")]
    expected = STAGES[target]
    if isinstance(error, OSError) and expected == "cannot encode":
        expected = "cannot write"  # a disk that is full is no fault of the encoder
    assert expected in failures[0]["reason"], failures
    assert "\n" not in failures[0]["reason"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == ["b.mp4", "c.mp4"]
    assert len(decoded(tmp_path / "out" / "b.mp4")) == 3


@pytest.mark.parametrize("target", STAGES)
def test_one_clip_alone(tmp_path, triton, folder, monkeypatch, target):
    fail_once(monkeypatch, target, ERRORS[2])
    result = run_client(folder / "a.mp4", tmp_path / "out.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert STAGES[target] in result.output.splitlines()[-1]
    assert "Traceback" not in result.output


def test_a_mistake_of_ours_costs_one_clip_and_is_called_one(tmp_path, triton, folder, monkeypatch):
    fail_once(monkeypatch, "mst_gan_client.video.mux.Muxer.write", AttributeError("no attribute 'name'"))
    result = run_client(folder, tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 1
    assert "a.mp4: unexpected AttributeError: no attribute 'name'; VSR_DEBUG=1 shows where" in result.output
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2


def test_ctrl_c_ends_a_batch(tmp_path, triton, folder, monkeypatch):
    fail_once(monkeypatch, "mst_gan_client.video.mux.Muxer.write", KeyboardInterrupt())
    result = run_client(folder, tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 130
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_a_clip_without_a_decoder(tmp_path, triton, folder):
    """One that FFmpeg can open and knows by name, and has nothing to decode with."""
    data = bytearray((folder / "a.mp4").read_bytes())
    at = data.index(b"avc1", data.index(b"stsd"))
    data[at : at + 4] = b"dvhX"
    (folder / "a.mp4").write_bytes(data)
    result = run_client(folder, tmp_path / "out", "--url", triton.url)
    assert result.exit_code == 1, result.output
    assert f"{folder / 'a.mp4'}: cannot read" in result.output or "expected a video" in result.output
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
