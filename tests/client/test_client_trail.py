"""Every request says which run, frame and tile it is for, and whose trace it belongs to."""

from __future__ import annotations

import logging
import re

import pytest
from client_fakes import FakeTriton, pictures, run_client, write_clip

from mst_gan_client.serving.trail import Trail

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Seen(FakeTriton):
    """Notes id, priority and headers of all requests but the probe."""

    def __init__(self, **options):
        self.seen: list[tuple[str, int, dict[str, str]]] = []
        super().__init__(**options)

    def ModelInfer(self, request, context):  # noqa: N802
        if request.id != "probe":
            headers = dict(context.invocation_metadata())
            self.seen.append((request.id, request.parameters["priority"].uint64_param, headers))
        return super().ModelInfer(request, context)


@pytest.fixture
def triton():
    with Seen() as server:
        yield server


def test_every_request_has_an_id_of_run_frame_and_tile(tmp_path, triton, caplog):
    caplog.set_level(logging.INFO)
    clip = write_clip(tmp_path / "in.mp4", pictures(9))
    assert run_client(clip, tmp_path / "out.mp4", "--url", triton.url).exit_code == 0
    (run,) = re.findall(r"requests are named ([0-9a-f]{8})-FRAME-TILE", caplog.text)
    assert {name for name, _, _ in triton.seen} == {f"{run}-{frame}-0" for frame in range(1, 10)}
    assert {priority for _, priority, _ in triton.seen} == {2}


def test_frames_of_a_shard_have_their_numbers_in_the_clip(tmp_path, triton):
    clip = write_clip(tmp_path / "in.mp4", pictures(9))
    options = ("--url", triton.url, "--segment-frames", 3, "--shard", "2/3", "--priority", "live")
    assert run_client(clip, tmp_path / "out.mp4", *options).exit_code == 0
    assert {name.split("-", 1)[1] for name, _, _ in triton.seen} == {"4-0", "5-0", "6-0"}
    assert {priority for _, priority, _ in triton.seen} == {1}


def test_the_trace_of_the_caller_goes_on(tmp_path, triton, monkeypatch):
    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE}-b7ad6b7169203331-00")
    clip = write_clip(tmp_path / "in.mp4", pictures(3))
    assert run_client(clip, tmp_path / "out.mp4", "--url", triton.url).exit_code == 0
    found = {headers["traceparent"] for _, _, headers in triton.seen}
    assert found == {f"00-{TRACE}-{span:016x}-00" for span in (1, 2, 3)}


@pytest.mark.parametrize("wrong", ["", "00-1-2-3", f"00-{TRACE}-b7ad6b7169203331-00-x"])
def test_another_traceparent_begins_a_new_trace(monkeypatch, wrong):
    monkeypatch.setenv("TRACEPARENT", wrong)
    one, other = Trail.new(), Trail.new()
    assert TRACE != one.trace_id != other.trace_id and len(one.trace_id) == 32


def test_tiles_of_a_frame():
    trail = Trail(TRACE, tiles=2, first=10)
    assert [trail.tag(index).request_id for index in range(3)] == [
        "0af76519-11-0",
        "0af76519-11-1",
        "0af76519-12-0",
    ]


def test_an_error_names_the_request(tmp_path):
    def fail(windows):
        if windows.shape[2:4] == (32, 48):
            raise RuntimeError("no")
        return windows[:, 1].repeat(4, axis=1).repeat(4, axis=2)

    clip = write_clip(tmp_path / "in.mp4", pictures(1))
    with Seen(network=fail) as triton:
        result = run_client(clip, tmp_path / "out.mp4", "--url", triton.url)
    assert result.exit_code == 1
    assert f"see request {triton.seen[0][0]} in the server's log" in result.output
