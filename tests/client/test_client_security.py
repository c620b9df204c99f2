"""TLS and tokens."""

from __future__ import annotations

import pytest
from client_fakes import FakeTriton, decoded, pictures, run_client, write_clip

from mst_gan_client.serving.security import Security


@pytest.fixture
def triton(certificate):
    key, chain = certificate
    with FakeTriton(certificate=(key.read_bytes(), chain.read_bytes())) as server:
        yield server


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "in.mp4", pictures(3))


def test_tls_with_a_token(clip, tmp_path, triton, certificate, monkeypatch):
    monkeypatch.setenv("UPSCALE_TOKEN", "open sesame")
    url = f"grpcs://localhost:{triton.port}"
    result = run_client(clip, tmp_path / "out.mp4", "--url", url, "--tls-ca", certificate[1])
    assert result.exit_code == 0, result.output
    assert len(decoded(tmp_path / "out.mp4")) == 3
    assert {headers["authorization"] for headers in triton.headers} == {"Bearer open sesame"}


def test_a_stranger_is_not_trusted(clip, tmp_path, triton):
    result = run_client(clip, tmp_path / "out.mp4", "--url", f"grpcs://localhost:{triton.port}")
    assert result.exit_code == 1
    assert f"no Triton server answers at localhost:{triton.port}" in result.output


@pytest.mark.parametrize("option", [("--token", "secret"), ("--tls-ca", "ca.pem")])
def test_nothing_secret_in_the_clear(clip, tmp_path, option):
    result = run_client(clip, tmp_path / "out.mp4", "--url", "localhost:8001", *option)
    assert result.exit_code == 1
    assert "expected TLS for --token and --tls-*" in result.output
    assert "write --url grpcs://localhost:8001" in result.output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--tls-ca", "none.pem"), "cannot read none.pem (No such file or directory): check --tls-*"),
        (("--tls-key", "key.pem"), "expected --tls-cert and --tls-key together"),
    ],
)
def test_wrong_files(clip, tmp_path, option, message):
    result = run_client(clip, tmp_path / "out.mp4", "--url", "grpcs://localhost:8001", *option)
    assert result.exit_code == 1
    assert message in result.output


def test_a_token_is_not_shown():
    """As a traceback, a debugger or a log of options would."""
    assert "open sesame" not in repr(Security(token="open sesame"))
