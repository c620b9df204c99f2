"""Servers with different weights are told apart, at the start of a run, during it, and when it goes on."""

from __future__ import annotations

import json
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from client_fakes import (
    FakeTriton,
    decoded,
    ensemble_config,
    nearest,
    pictures,
    run_client,
    sum_of_window,
    write_clip,
)

from mst_gan_client.errors import UpscaleError
from mst_gan_client.serving.identity import SAMPLE_STEP, Identity, identity_of
from mst_gan_client.serving.server import Server
from mst_gan_client.serving.session import Session

PUBLISHED = {"weights_digest": "aa11bb22cc33dd44", "weights_name": "mst_gan_pruned", "precision": "int8"}
LOSSLESS = ("--codec", "ffv1", "--pix-fmt", "bgr0", "--segment-frames", 7)


def last_bit(windows):
    """``nearest`` with other rounding."""
    return nearest(windows) ^ 1


def two_levels_off(windows):
    return nearest(windows) ^ 2


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mkv", pictures(30), codec="ffv1", pix_fmt="bgr0")


def run_on(clip, out, *tritons, options=()):
    return run_client(clip, out, "--url", ",".join(one.url for one in tritons), *LOSSLESS, *options)


def test_servers_with_different_answers_are_refused(clip, tmp_path):
    with FakeTriton() as one, FakeTriton(network=sum_of_window) as two:
        result = run_on(clip, tmp_path / "out.mkv", one, two)
        assert result.exit_code == 1
        assert f"found that {one.url} serves weights (probe " in result.output
        assert f"{two.url} serves weights (probe " in result.output
        assert "pass --allow-mixed-weights" in result.output
        assert not (one.requests or two.requests)
        result = run_on(clip, tmp_path / "out.mkv", one, two, options=["--allow-mixed-weights"])
        assert result.exit_code == 0, result.output


def test_a_stream_to_standard_output_is_not_mixed_either(clip):
    with FakeTriton() as one, FakeTriton(network=sum_of_window) as two:
        result = run_client(clip, "-", "--url", f"{one.url},{two.url}")
        assert result.exit_code == 1
        assert "expected the same weights everywhere" in result.output


@pytest.mark.parametrize(
    ("parameter", "value", "difference"),
    [
        ("weights_digest", "ee55ff66", "weights_digest aa11bb22cc33 and ee55ff66"),
        ("precision", "fp16", "precision int8 and fp16"),
    ],
)
def test_servers_that_publish_different_weights_are_refused(clip, tmp_path, parameter, value, difference):
    """However alike their answers to one small window are."""
    with (
        FakeTriton(config=ensemble_config(**PUBLISHED)) as one,
        FakeTriton(config=ensemble_config(**PUBLISHED | {parameter: value})) as two,
    ):
        result = run_on(clip, tmp_path / "out.mkv", one, two)
        assert result.exit_code == 1
        assert f"{one.url} serves mst_gan_pruned int8 (digest aa11bb22cc33)" in result.output
        assert difference in result.output


def test_a_name_or_a_version_does_not_matter(clip, tmp_path):
    with (
        FakeTriton(config=ensemble_config(**PUBLISHED, version="0.1.0")) as one,
        FakeTriton(config=ensemble_config(**PUBLISHED | {"weights_name": "renamed"}, version="0.2.0")) as two,
        FakeTriton() as old,
    ):
        result = run_on(clip, tmp_path / "out.mkv", one, two, old)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("other", "is_said"), [("0.3.0", True), ("0.2.0", False)])
def test_servers_of_different_releases_are_named(clip, tmp_path, caplog, other, is_said):
    first, second = (ensemble_config(**PUBLISHED, version=version) for version in ("0.2.0", other))
    with FakeTriton(config=first) as one, FakeTriton(config=second) as two:
        assert run_on(clip, tmp_path / "out.mkv", one, two, options=["--max-frames", 2]).exit_code == 0
        said = f"are of different releases: {one.url} has 0.2.0, {two.url} has {other}" in caplog.text
    assert said == is_said


def test_servers_that_round_differently_are_the_same(clip, tmp_path):
    with FakeTriton() as one, FakeTriton(network=last_bit) as two:
        assert run_on(clip, tmp_path / "out.mkv", one, two).exit_code == 0
    with FakeTriton() as one, FakeTriton(network=two_levels_off) as two:
        result = run_on(clip, tmp_path / "other.mkv", one, two)
        assert result.exit_code == 1
        assert "answers to one probe 2 gray levels apart" in result.output


def test_the_sample_has_all_channels_and_sub_pixels():
    """A difference in one of them alone is seen."""
    config = ensemble_config()
    whole = np.zeros((64, 64, 3), np.uint8)
    for channel in range(3):
        for y in range(4):
            for x in range(4):
                other = whole.copy()
                other[y::4, x::4, channel] = 9
                difference = identity_of(config, whole).difference(identity_of(config, other))
                assert difference == "answers to one probe 9 gray levels apart"


def interrupted(clip, out, triton):
    """A run that an error of the model has ended after its first segment."""
    segment = out.with_name(out.name + ".part") / "000000.segment"

    def fail_late(count):
        if count > 20:
            while not segment.exists():
                time.sleep(0.01)
            raise RuntimeError("the model broke")

    triton.before_answer = fail_late
    result = run_on(clip, out, triton)
    assert result.exit_code == 1, result.output
    assert segment.exists()
    triton.before_answer = lambda count: None


def test_a_run_goes_on_with_other_rounding_but_not_with_other_weights(clip, tmp_path):
    """As after a restart of a server on a GPU."""
    out = tmp_path / "out.mkv"
    with FakeTriton() as triton:
        interrupted(clip, out, triton)
        triton.network = two_levels_off
        result = run_on(clip, out, triton)
        assert result.exit_code == 1
        assert "holds an unfinished run with other weights" in result.output
        triton.network = last_bit
        result = run_on(clip, out, triton)
        assert result.exit_code == 0, result.output
    assert len(decoded(out)) == 30


def test_a_manifest_of_another_release_is_said_to_be_unreadable(clip, tmp_path):
    out = tmp_path / "out.mkv"
    with FakeTriton() as triton:
        interrupted(clip, out, triton)
        manifest = Path(f"{out}.part") / "manifest.json"
        facts = json.loads(manifest.read_text())
        for weights in (["0123abcd" * 8], [{"probe": "?"}], [{"probe": 1}], []):
            manifest.write_text(json.dumps(facts | {"weights": weights}))
            result = run_on(clip, out, triton)
            assert result.exit_code == 1
            assert "expected none that this release can read, found weights (probe " in result.output


def test_what_a_manifest_keeps_is_read_back():
    sample = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    identity = Identity(PUBLISHED, sample)
    again = Identity.from_json(json.loads(json.dumps(identity.to_json())))
    assert again.published == PUBLISHED
    assert (again.sample == sample).all()
    assert SAMPLE_STEP % 2 and SAMPLE_STEP % 3


def test_a_server_that_comes_back_with_other_rounding_is_used_on(clip, tmp_path):
    with FakeTriton() as triton:

        def restart(count):
            if count == 10:
                triton.network = last_bit
                threading.Thread(target=lambda: (triton.stop(), triton.start())).start()

        triton.before_answer = restart
        result = run_on(clip, tmp_path / "out.mkv", triton)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("pause_s", [0.0, 0.5])
def test_a_server_that_is_replaced_while_nothing_is_under_way(clip, pause_s):
    """gRPC connects again by itself, and the next window would be answered by whoever is there now."""
    with FakeTriton() as triton, closing(Server(triton.url, "mst_gan")) as server:
        session = Session([server])

        def lr_windows():
            for t in range(40):
                if t == 20:
                    triton.stop()
                    triton.network = sum_of_window
                    triton.start()
                    time.sleep(pause_s)
                yield np.full((3, 16, 16, 3), t + 100, np.uint8)

        answers = []
        with pytest.raises(UpscaleError, match="found that it came back with others"):
            answers.extend(session.hr_frames(lr_windows()))
            pytest.fail("nobody noticed")
        session.close()
        assert [int(hr[0, 0, 0]) for hr in answers] == list(range(100, 100 + len(answers)))
