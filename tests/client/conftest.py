"""Fixtures of more than one of the client's test files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest
from client_fakes import FakeTriton


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Files of a key and a certificate for localhost that vouches for itself."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    return key, certificate


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    """A server of its own for a test, which answers at once."""
    with FakeTriton() as server:
        yield server
