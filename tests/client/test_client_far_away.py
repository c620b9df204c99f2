"""Servers at the other end of a slow network: delay, loss, TLS, names and addresses of all kinds."""

from __future__ import annotations

import numpy as np
import pytest
from client_fakes import FakeTriton, decoded, frame_times, nearest, pictures, run_client, write_clip
from delay_proxy import Proxy

LOSSLESS = ("--codec", "ffv1", "--pix-fmt", "bgr0")
pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mkv", pictures(30), codec="ffv1", pix_fmt="bgr0")


def is_exact(out, clip):
    expected = [nearest(image[None, None].repeat(3, 1))[0] for image in decoded(clip)]
    return frame_times(out) == frame_times(clip) and all(map(np.array_equal, decoded(out), expected))


@pytest.mark.parametrize(("delay_s", "loss"), [(0.1, 0.0), (0.15, 0.01), (0.3, 0.01)])
def test_a_server_far_away(clip, tmp_path, delay_s, loss):
    out = tmp_path / "out.mkv"
    with FakeTriton() as triton, Proxy(triton.port, delay_s, loss) as proxy:
        result = run_client(clip, out, "--url", proxy.url, *LOSSLESS)
    assert result.exit_code == 0, result.output
    assert "lost" not in result.output
    assert is_exact(out, clip)


def test_a_server_far_away_over_tls(clip, tmp_path, certificate):
    key, chain = certificate
    out = tmp_path / "out.mkv"
    with (
        FakeTriton(certificate=(key.read_bytes(), chain.read_bytes())) as triton,
        Proxy(triton.port, 0.3, 0.01) as proxy,
    ):
        url = f"grpcs://localhost:{proxy.port}"
        result = run_client(clip, out, "--url", url, "--tls-ca", chain, *LOSSLESS)
    assert result.exit_code == 0, result.output
    assert is_exact(out, clip)
