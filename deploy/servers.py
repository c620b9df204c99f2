"""Checks of running servers, for ``make doctor``."""

from __future__ import annotations

import http.client
import re
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from email.utils import parsedate_to_datetime

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from deploy.finding import Finding
from export import spec
from mst_gan_client import UpscaleError
from mst_gan_client.serving.addresses import address_from_url
from mst_gan_client.serving.security import Security

TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 120  # of a real frame, behind those of others
# By Triton's version. Each release has the fixes of those before it, and an older one lacks them.
SECURITY_FIXES = {
    (2, 66): "5816 (26.02)",
    (2, 67): "5828, critical (26.03)",
    (2, 68): "5848 (26.04)",
    (2, 69): "5853 (26.05)",
    (2, 70): "5865, critical (26.06)",
    (2, 71): "5875 (26.07)",
}
"""Security bulletin of NVIDIA, and the release of its image."""
CLIENT_SHM_FLAG_FROM = (2, 68)
"""From here on clients may use shared memory only with --allow-client-shm; before, always, without a flag."""
QUEUE_LIMIT_FROM = (2, 67)
"""Before, ensembles could leave requests unanswered at a full queue (triton-inference-server/core#470)."""
USUAL_LIMIT = 4 << 20
"""Bytes of a message, gRPC's default for what is received; a proxy's, too, unless it was set."""
MOST_CLOCK_S = 60
"""How far two clocks may be apart; certificates and tokens have limits of minutes."""
SHOWN_DIGITS = 12  # of a digest of weights
NO_SUCH_MODEL = "doctor_asks_for_no_model"
NOT_YET_VALID, EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and _CERT_HAS_EXPIRED


def check_servers(urls: Sequence[str], security: Security, metrics_port: int) -> Iterator[Finding]:
    """Check every server, and whether all serve one release.

    Args:
        urls: gRPC addresses, as the client takes them.
        security: For ``grpcs://`` addresses.
        metrics_port: Where the metrics of every server should be; 0: do not look.
    """
    releases: dict[str, str] = {}
    for url in urls:
        try:
            address, is_tls = address_from_url(url)
            if not is_tls:
                security.refuse_in_the_clear(address)
            credentials = security.credentials() if is_tls else None
        except UpscaleError as err:
            yield Finding("error", "server", str(err))
            continue
        if is_tls:
            findings = list(check_certificate(address, security))
            yield from findings
            if any(finding.level == "error" for finding in findings):
                continue
        client = triton.InferenceServerClient(address, creds=credentials)
        with closing(client):
            try:
                version = client.get_server_metadata(client_timeout=TIMEOUT_S).version
            except InferenceServerException as err:
                text = f"expected a Triton server at {url}, found none ({err.message()})"
                yield Finding("error", "server", text, "make serve, or --url host:port of its gRPC")
                continue
            yield from check_version(version, url)
            try:
                config = client.get_model_config(spec.ENSEMBLE.name, client_timeout=TIMEOUT_S).config
            except InferenceServerException as err:
                text = f"{url} has not loaded {spec.ENSEMBLE.name} ({err.message()})"
                yield Finding("error", "ensemble", text, "see the server's log; make doctor where it runs")
                continue
            yield from check_queues(client, config, version, url)
            releases[url] = _release(config)
            yield Finding("ok", "release", f"{url} serves {releases[url]}")
            yield check_messages(client, url)
        if metrics_port:
            yield check_metrics(address, metrics_port)
    if len(set(releases.values())) > 1:
        listed = ", ".join(f"{url} serves {release}" for url, release in releases.items())
        yield Finding("warn", "release", listed, "serve one release everywhere; clients refuse other weights")


def check_version(version: str, where: str) -> Iterator[Finding]:
    """Security fixes of a server's version, and whether clients may share memory with it."""
    found = _numbers(version)
    lacking = [bulletin for since, bulletin in SECURITY_FIXES.items() if found < since]
    server = f"Triton {version}, {where}"
    if lacking:
        yield Finding(
            "warn", "server", f"{server}: lacks the fixes of security bulletins {'; '.join(lacking)}",
            "use nvcr.io/nvidia/tritonserver:26.07-py3 or newer where others can reach the server",
        )  # fmt: skip
    else:
        yield Finding("ok", "server", f"{server}: has all known security fixes up to 26.07")
    if found < CLIENT_SHM_FLAG_FROM:
        yield Finding("ok", "client memory", "clients on this machine may use shared memory")
    else:
        yield Finding(
            "warn", "client memory", "clients may use shared memory only if the server was started so",
            "--allow-client-shm=true, if client and server share this machine and trust each other",
        )  # fmt: skip


def check_queues(
    client: triton.InferenceServerClient, ensemble: pb.ModelConfig, version: str, url: str
) -> Iterator[Finding]:
    """Whether a stage has a limit on its queue at a server that may never answer what is over it."""
    if _numbers(version) >= QUEUE_LIMIT_FROM:
        return
    for step in ensemble.ensemble_scheduling.step:
        config = client.get_model_config(step.model_name, client_timeout=TIMEOUT_S).config
        batching = config.dynamic_batching
        policies = [batching.default_queue_policy, *batching.priority_queue_policy.values()]
        if any(policy.max_queue_size for policy in policies):
            text = f"{step.model_name} at {url} has max_queue_size, where Triton before 2.67 can hang"
            yield Finding("error", "queue", text, "Triton 26.03 or newer, or another --model-config-name")


def check_messages(client: triton.InferenceServerClient, url: str) -> Finding:
    """Whether requests and answers of more than 4 MB pass, as frames of 640x480 and up need.

    The request is for a model that does not exist: a server that got all of it says so, and computes nothing.
    The answer is a real one, to the smallest frame whose answer is that large.
    """
    side = spec.MULTIPLE_OF
    while np.prod(spec.HR_FRAME.shape(1, (side, side))) <= USUAL_LIMIT:
        side += spec.MULTIPLE_OF
    large = np.zeros((USUAL_LIMIT + 1,), np.uint8)
    request = triton.InferInput("any", large.shape, "UINT8")
    request.set_data_from_numpy(large)
    frame = np.zeros(spec.LR_WINDOW.shape(1, (side, side)), np.uint8)
    lr_window = triton.InferInput(spec.LR_WINDOW.name, frame.shape, spec.LR_WINDOW.dtype)
    lr_window.set_data_from_numpy(frame)
    what = "requests"
    try:
        try:
            client.infer(NO_SUCH_MODEL, [request], client_timeout=TIMEOUT_S)
        except InferenceServerException as err:
            if NO_SUCH_MODEL not in err.message():  # Triton's words name the model
                raise
        what = "answers"
        client.infer(spec.ENSEMBLE.name, [lr_window], client_timeout=ANSWER_TIMEOUT_S)
    except InferenceServerException as err:
        return Finding(
            "error", "message size", f"{what} of more than 4 MB do not pass at {url} ({err.message()})",
            "raise the limit of the proxy between; nginx: client_max_body_size 64m",
        )  # fmt: skip
    return Finding("ok", "message size", f"requests and answers of more than 4 MB pass at {url}")


def check_certificate(address: str, security: Security) -> Iterator[Finding]:
    """Whether the certificate at ``host:port`` is valid by this machine's clock, and the clock right."""
    host, port = _split(address)
    try:
        context = ssl.create_default_context(cafile=security.ca)
        if security.certificate:
            context.load_cert_chain(security.certificate, security.key)
        offset_s = _clock_offset_s(
            http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
        )
        yield Finding("ok", "certificate", f"of {address}: valid by this machine's clock")
        yield from _check_clock(offset_s, address)
    except ssl.SSLCertVerificationError as err:
        context = ssl._create_unverified_context()
        offset_s = _clock_offset_s(
            http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
        )
        clock = list(_check_clock(offset_s, address))
        yield from clock
        is_clock_off = any(finding.level != "ok" for finding in clock)
        now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        if err.verify_code in (NOT_YET_VALID, EXPIRED):
            state = "not valid yet" if err.verify_code == NOT_YET_VALID else "expired"
            fix = (
                "set this machine's clock"
                if is_clock_off
                else "renew the certificate, or wait until it is valid"
            )
            yield Finding(
                "error", "certificate", f"of {address}: {state} by this machine's clock ({now})", fix
            )
        else:
            yield Finding("error", "certificate", f"of {address}: {err.verify_message}", "--tls-ca FILE")
    except OSError as err:
        yield Finding("error", "certificate", f"expected TLS at {address}, found none ({err})", "check --url")


def check_metrics(address: str, port: int) -> Finding:
    """Whether Prometheus could scrape a server from here."""
    host, _ = _split(address)
    where = f"http://{host}:{port}/metrics"
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    with closing(connection):
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as err:
            return Finding(
                "warn", "metrics", f"expected metrics at {where}, found none ({err or type(err).__name__})",
                "open the port to Prometheus, or name it with --metrics-port; Triton: --metrics-address, "
                "--metrics-port",
            )  # fmt: skip
    if f'nv_inference_count{{model="{spec.ENSEMBLE.name}"' not in text:
        text = f"{where} has no metrics of {spec.ENSEMBLE.name}: they are another server's"
        return Finding("warn", "metrics", text, "--metrics-port PORT of this one")
    return Finding("ok", "metrics", f"Prometheus can scrape {where} from here")


def _clock_offset_s(connection: http.client.HTTPConnection) -> float | None:
    """Seconds that a web server's clock is ahead of this machine's; None: it does not tell the time.

    Raises:
        OSError: There is no connection.
    """
    with closing(connection):
        connection.connect()
        try:
            connection.request("GET", "/")
            date = connection.getresponse().headers["Date"]
            return parsedate_to_datetime(date).timestamp() - time.time() if date else None
        except (OSError, http.client.HTTPException, ValueError):  # speaks HTTP/2 alone
            return None


def _check_clock(offset_s: float | None, address: str) -> Iterator[Finding]:
    if offset_s is None:
        return
    if abs(offset_s) > MOST_CLOCK_S:
        text = (
            f"this machine's is {abs(offset_s):.0f} s {'behind' if offset_s > 0 else 'ahead of'} {address}'s"
        )
        yield Finding("error", "clock", text, "timedatectl set-ntp true, on the one that is wrong")
    else:
        yield Finding("ok", "clock", f"within {MOST_CLOCK_S} s of {address}'s")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _release(config: pb.ModelConfig) -> str:
    """What an ensemble publishes about itself, in one line."""
    values = {
        name: config.parameters[name].string_value for name in spec.IDENTITY if name in config.parameters
    }
    known = [values.get(name, "") for name in (spec.WEIGHTS_NAME, spec.PRECISION)]
    weights = " ".join(filter(None, [*known, values.get(spec.WEIGHTS_DIGEST, "")[:SHOWN_DIGITS]]))
    release = f"release {values.get(spec.RELEASE, 'before 0.2.0')}"
    return f"{release}: {weights}" if weights else release


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
