"""Many machines share a folder: one writes an output, others leave it, and a dead one's is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import pytest
from client_fakes import decoded, pictures, run_client, write_clip

from mst_gan_client import batch, lease
from mst_gan_client.errors import HeldError
from mst_gan_client.lease import LEASE, LEASE_S, Holder
from mst_gan_client.record import Record
from mst_gan_client.resume import LOCK, ResumeState
from mst_gan_client.video.decode import Video
from mst_gan_client.video.encode import encoding_from_options, write_segment
from mst_gan_client.video.source import Source
from mst_gan_client.video.streams import EVERY_STREAM

ELSEWHERE = Holder("other-machine", "another boot", 1, "0123456789abcdef")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.mkv"


def leave(out: Path, holder: Holder, age_s: float) -> Path:
    """What a run elsewhere leaves that has not finished."""
    with ResumeState(out, {"input": "x"}, {}) as part:
        part.segment(0).write_bytes(b"frames")
        part.keep(part.segment(0), Record([0], [1], [0], [0]))
    path = part.folder / LEASE
    path.write_text(json.dumps(asdict(holder)))
    now = path.stat().st_mtime
    os.utime(path, (now - age_s, now - age_s))
    return path


def test_another_machine_is_at_work(out):
    leave(out, ELSEWHERE, LEASE_S / 2)
    with pytest.raises(HeldError, match="process 1 on other-machine renewed its lease 30 s ago; wait"):
        ResumeState(out, {"input": "x"}, {})


def test_another_machine_is_dead(out):
    leave(out, ELSEWHERE, LEASE_S + 5)
    with ResumeState(out, {"input": "x"}, {}) as part:
        assert len(part.segments()) == 1


def test_a_process_of_this_machine_is_dead(out):
    """Its file lock ended with it, so nobody waits for its lease."""
    leave(out, replace(Holder.new(), token="0" * 16), 0)
    with ResumeState(out, {"input": "x"}, {}) as part:
        assert len(part.segments()) == 1


def test_clocks_may_differ(out, monkeypatch):
    """Only the file server's clock counts, not this machine's."""
    monkeypatch.setattr("time.time", lambda: 0.0)
    leave(out, ELSEWHERE, LEASE_S / 2)
    with pytest.raises(HeldError):
        ResumeState(out, {"input": "x"}, {})


def test_the_lease_is_renewed(out, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", 0.06)
    with ResumeState(out, {"input": "x"}, {}) as part:
        path = part.folder / LEASE
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:
            pass


def test_a_run_that_stood_still_keeps_nothing_more(out):
    with ResumeState(out, {"input": "x"}, {}) as part:
        (part.folder / LEASE).write_text(json.dumps(asdict(ELSEWHERE)))
        part.segment(0).write_bytes(b"frames")
        with pytest.raises(HeldError, match="another run has taken over"):
            part.keep(part.segment(0), Record([0], [1], [0], [0]))
        with pytest.raises(HeldError, match="another run has taken over"):
            part.finish()
    assert (part.folder / LEASE).exists()  # it is the other's, and so is all that is there


def test_a_lock_that_outlives_its_machine(out):
    """As a network file system may keep it; seen from here it is just held."""
    path = leave(out, ELSEWHERE, LEASE_S + 5)
    with (path.parent / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with ResumeState(out, {"input": "x"}, {}) as part:
            assert len(part.segments()) == 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_the_lease_has_to_do(out, monkeypatch, code):
    def refuse(file, operation):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        ResumeState(out, {"input": "x"}, {}),
        pytest.raises(HeldError, match=f"process {os.getpid()} on"),
    ):
        ResumeState(out, {"input": "x"}, {})
    leave(out, replace(Holder.new(), pid=2**22 + 1, token="0" * 16), 0)  # no process has that id
    with ResumeState(out, {"input": "x"}, {}) as part:
        assert len(part.segments()) == 1


def test_a_released_lease_is_free_at_once(out):
    leave(out, ELSEWHERE, LEASE_S + 5)
    with ResumeState(out, {"input": "x"}, {}) as part:
        pass
    assert {path.name for path in part.folder.iterdir()} == {
        LOCK,
        "manifest.json",
        "000000.segment",
        "000000.record",
    }


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a.mkv", "b.mkv"):
        write_clip(folder / name, pictures(3), codec="ffv1", pix_fmt="bgr0")
    return folder


def hold(films, out, triton, age_s):
    """Another machine has begun a.mkv, and renewed its lease so many seconds ago."""
    out.mkdir()
    part = out / "a.mkv.part"
    part.mkdir()
    (part / LOCK).touch()
    path = part / LEASE
    path.write_text(json.dumps(asdict(ELSEWHERE)))
    now = path.stat().st_mtime
    os.utime(path, (now - age_s, now - age_s))
    return path


def test_a_film_that_another_worker_writes_is_skipped(tmp_path, films, triton, monkeypatch):
    """It is no failure, and what is there stays as it is."""
    out = tmp_path / "out"
    path = hold(films, out, triton, 1)
    monkeypatch.setattr(batch, "wait_for", lambda out, until_s: None)
    result = run_client(films, out, "--url", triton.url)
    assert result.exit_code == 0, result.output
    assert "a.mkv: another run is writing" in result.output
    assert path.exists() and not (out / "a.mkv").exists()
    assert len(decoded(out / "b.mkv")) == 3


def test_a_dead_workers_film_is_taken_over(tmp_path, films, triton, monkeypatch):
    """It was alive when this worker came by, and no longer when all else was done."""
    out = tmp_path / "out"
    path = hold(films, out, triton, 1)
    monkeypatch.setattr(batch, "wait_for", lambda out, until_s: os.utime(path, (0, 0)))
    result = run_client(films, out, "--url", triton.url)
    assert result.exit_code == 0, result.output
    assert len(decoded(out / "a.mkv")) == 3
    assert not path.parent.exists()


def test_a_run_whose_folder_is_gone_says_that_another_took_over(tmp_path, triton):
    """It stood still, and the other run has finished meanwhile."""
    clip = write_clip(tmp_path / "in.mkv", pictures(20), codec="ffv1", pix_fmt="bgr0")
    out = tmp_path / "out.mkv"

    def take_over(count):
        if count == 12:
            shutil.rmtree(tmp_path / "out.mkv.part")

    triton.before_answer = take_over
    result = run_client(clip, out, "--url", triton.url, "--segment-frames", 4)
    assert result.exit_code == 1
    assert f"another run has taken over {out}" in result.output.splitlines()[-1]


def test_two_runs_on_one_segment_write_two_files(tmp_path):
    """One that was taken for dead comes back in the middle of a segment that the other has written."""
    folder, images = tmp_path / "out.mkv.part", pictures(8)
    folder.mkdir()
    path, encoding = folder / "000003.segment", encoding_from_options("ffv1", None, None, None)
    clip = write_clip(tmp_path / "in.mkv", images, codec="ffv1", pix_fmt="bgr0")
    with Video(Source(clip, Fraction(25)), EVERY_STREAM) as video:
        picture = video.picture

    def resumed():
        yield from images[:4]
        write_segment(path, images, picture, encoding)
        finished = path.read_bytes()
        yield from images[4:]
        assert path.read_bytes() == finished

    write_segment(path, resumed(), picture, encoding)
    assert len(decoded(path)) == 8
    assert list(folder.iterdir()) == [path]


def test_two_runs_on_one_output_put_it_together_in_two_files(out):
    with ResumeState(out, {"input": "x"}, {}) as one:
        first = one.joined
    with ResumeState(out, {"input": "x"}, {}) as two:
        assert two.joined != first and two.joined.suffix == out.suffix
        first.write_bytes(b"of the run before")
        two.joined.write_bytes(b"whole")
        two.finish()
    assert out.read_bytes() == b"whole" and not two.folder.exists()
