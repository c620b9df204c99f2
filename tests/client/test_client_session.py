"""The contract as read from a server, and ordered answers from servers that are slow, wrong or dying."""

import queue
import threading
import time

import grpc
import numpy as np
import pytest
from client_fakes import FakeTriton, ensemble_config, http_server, nearest, stage_config
from tritonclient.grpc import model_config_pb2

from mst_gan_client.errors import UpscaleError
from mst_gan_client.prefetch import Prefetch
from mst_gan_client.serving.addresses import address_from_url
from mst_gan_client.serving.contract import contract_from_config, instance_count
from mst_gan_client.serving.server import Server
from mst_gan_client.serving.session import Session

pytestmark = pytest.mark.slow


def lr_windows(count, size=(16, 16)):
    return [np.full((3, *size, 3), t % 256, np.uint8) for t in range(count)]


def values(answers):
    return [int(hr[0, 0, 0]) for hr in answers]


@pytest.fixture
def open_session():
    opened = []

    def open_(*tritons, **options):
        servers = [Server(triton.url, "mst_gan") for triton in tritons]
        session = Session(servers, **options)
        opened.extend((session, *servers))
        return session

    yield open_
    for one in opened:
        one.close()


@pytest.mark.parametrize(
    ("url", "address", "tls"),
    [
        ("localhost:8001", "localhost:8001", False),
        ("gpu-box", "gpu-box:8001", False),
        ("grpc://10.0.0.7:9001", "10.0.0.7:9001", False),
        ("grpcs://vsr.example.org", "vsr.example.org:8001", True),
        ("[::1]:8001", "[::1]:8001", False),
    ],
)
def test_addresses(url, address, tls):
    assert address_from_url(url) == (address, tls)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://localhost:8000", "does not speak http; Triton's gRPC port is usually 8001"),
        ("localhost:port", "expected HOST:PORT, found 'localhost:port'"),
        ("localhost:99999", "expected HOST:PORT, found 'localhost:99999'"),
        (":8001", "expected HOST:PORT, found ':8001'"),
        ("localhost:8001/v2", "expected HOST:PORT, found 'localhost:8001/v2'"),
    ],
)
def test_wrong_addresses(url, message):
    with pytest.raises(UpscaleError, match=message):
        address_from_url(url)


def test_contract_is_read_from_the_config():
    contract = contract_from_config(ensemble_config(multiple_of="8", max_size="540x960"), "here")
    assert (contract.input_name, contract.output_name) == ("lr_window", "hr_frame")
    assert (contract.scale, contract.window, contract.multiple_of) == (4, 3, 8)
    assert (contract.min_size, contract.max_size) == ((16, 16), (540, 960))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scale": ""}, "expected a parameter 'scale', found none"),
        ({"scale": "four"}, "expected a whole number in parameter 'scale', found 'four'"),
        ({"multiple_of": "0"}, "expected a whole number in parameter 'multiple_of', found '0'"),
        ({"max_size": "720"}, "expected HEIGHTxWIDTH in parameter 'max_size', found '720'"),
        ({"window": "4"}, "expected an odd window, found 4"),
        ({"window": "5"}, r"expected one UINT8 input of shape \[5, -1, -1, 3\], found lr_window"),
    ],
)
def test_another_contract_is_refused_with_what_differs(parameters, message):
    with pytest.raises(UpscaleError, match=message):
        contract_from_config(ensemble_config(**parameters), "here")


def test_a_float_output_is_refused():
    config = ensemble_config()
    config.output[0].data_type = model_config_pb2.TYPE_FP32
    with pytest.raises(UpscaleError, match="expected one UINT8 output"):
        contract_from_config(config, "here")


def test_instances_are_counted_per_gpu():
    config = stage_config("generator")
    assert instance_count(config) == 2
    config.instance_group[0].kind = model_config_pb2.ModelInstanceGroup.KIND_GPU
    config.instance_group[0].gpus[:] = [0, 1, 2]
    assert instance_count(config) == 4


def test_requests_in_flight_come_from_the_server(open_session):
    gate = threading.Event()

    def hold(_):
        if triton.under_way == session.in_flight:
            threading.Timer(0.2, gate.set).start()  # long enough for a request too many
        gate.wait(60)

    with FakeTriton(before_answer=hold) as triton:
        session = open_session(triton)
        assert session.in_flight == 2 * 4 * 2  # twice the batch of 4, for two instances
        answers = session.hr_frames(lr_windows(40))
        assert values(answers) == list(range(40))
        assert triton.most_under_way == 16


def test_answers_keep_the_order_of_the_windows(open_session):
    with FakeTriton(before_answer=lambda count: time.sleep(0.02 * (count % 5 == 1))) as triton:
        assert values(open_session(triton).hr_frames(lr_windows(60))) == list(range(60))


def test_memory_is_bounded_when_nobody_takes_the_answers(open_session):
    taken = []
    with FakeTriton() as triton:
        session = open_session(triton)
        answers = session.hr_frames(taken.append(t) or window for t, window in enumerate(lr_windows(200)))
        next(answers)
        time.sleep(0.3)
        assert len(taken) <= 2 * session.in_flight


def test_a_server_without_shared_memory_is_sent_everything(open_session):
    with FakeTriton() as triton:
        session = open_session(triton)
        way = session.share_memory((3, 16, 16, 3), "system")
        assert way == f"gRPC (no system shared memory with {triton.url}: Method not implemented!)"
        assert values(session.hr_frames(lr_windows(20))) == list(range(20))


def test_memory_that_is_not_there_is_not_used(open_session, monkeypatch, tmp_path):
    monkeypatch.setattr("mst_gan_client.serving.transports.system.SHARED_FOLDER", tmp_path / "none")
    with FakeTriton() as triton:
        way = open_session(triton).share_memory((3, 16, 16, 3), "system")
        assert way == "gRPC (no system shared memory: No such file or directory)"


def test_an_abandoned_run_does_not_disturb_the_next(open_session):
    """As when one clip of many fails while its windows are under way: its thread still waits for them."""
    gate = threading.Event()
    with FakeTriton(before_answer=lambda count: count == 1 and gate.wait(60)) as triton:
        session = open_session(triton)
        Prefetch(session.hr_frames(lr_windows(1)), 1)
        while not triton.requests:
            time.sleep(0.01)
        assert values(session.hr_frames(lr_windows(1))) == [0]
        assert triton.under_way == 1  # the first one still waits
        gate.set()


def test_a_run_that_waits_for_a_slow_server_is_stopped_at_once(open_session):
    gate = threading.Event()
    with FakeTriton(before_answer=lambda _: gate.wait(60)) as triton:
        session = open_session(triton)
        answers = Prefetch(session.hr_frames(lr_windows(3)), 1)
        while not triton.requests:
            time.sleep(0.01)
        session.stop()
        answers.close()
        assert not answers._thread.is_alive()  # close() gives up on a thread that goes on waiting
        gate.set()


def test_no_windows_no_answers(open_session):
    with FakeTriton() as triton:
        assert list(open_session(triton).hr_frames([])) == []


def test_a_wrong_answer_is_refused(open_session):
    with FakeTriton() as triton:
        session = open_session(triton)
        triton.network = lambda windows: nearest(windows)[:, ::2]
        with pytest.raises(UpscaleError, match=r"UINT8 \[1, 64, 64, 3\], found UINT8 \[1, 32"):
            list(session.hr_frames(lr_windows(3)))


def test_an_error_of_the_model_is_told(open_session):
    def fail(windows):
        raise RuntimeError("the model broke")

    with FakeTriton() as triton:
        session = open_session(triton)
        triton.network = fail
        with pytest.raises(UpscaleError, match=r"refused frame \d of this run"):
            list(session.hr_frames(lr_windows(3)))


def test_a_server_that_comes_back_is_used_again(open_session):
    restarted = queue.Queue()
    triton = FakeTriton()

    def restart(count):
        if count == 20:
            threading.Thread(target=lambda: (triton.stop(), triton.start(), restarted.put(True))).start()
            time.sleep(0.2)

    triton.before_answer = restart
    with triton:
        session = open_session(triton)
        assert values(session.hr_frames(lr_windows(60))) == list(range(60))
        assert restarted.get(timeout=60)
        assert session.resent > 0


STOPPING = [  # what Triton 2.51 answers, one after the other, from SIGTERM until its port closes
    (
        grpc.StatusCode.UNAVAILABLE,
        "in ensemble 'mst_gan', [request id: <id_unknown>] Server is stopping, "
        "scheduler for model has stopped accepting new inference requests",
    ),
    (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'mst_gan' has no available versions"),
]


@pytest.mark.parametrize("refusal", STOPPING, ids=["stopping", "unloaded"])
def test_a_server_on_its_way_out_or_in_is_waited_for(open_session, refusal):
    triton = FakeTriton()

    def leave_for_a_while(count):
        if count == 20:
            triton.refusal = refusal
            threading.Timer(0.6, lambda: setattr(triton, "refusal", None)).start()

    triton.before_answer = leave_for_a_while
    with triton:
        session = open_session(triton, patience_s=5.0)
        assert values(session.hr_frames(lr_windows(60))) == list(range(60))
        assert session.resent > 0


def test_a_model_that_stays_unloaded_is_given_up_with_the_reason(open_session):
    with FakeTriton() as triton:
        session = open_session(triton, patience_s=0.5)
        triton.refusal = STOPPING[1]
        with pytest.raises(UpscaleError, match=r"found no server for \d s: .*\[Server not ready\]"):
            list(session.hr_frames(lr_windows(3)))


def test_a_server_that_stays_away_is_given_up(open_session):
    triton = FakeTriton()
    triton.before_answer = lambda count: count == 5 and threading.Thread(target=triton.stop).start()
    session = open_session(triton, patience_s=1.0)
    with pytest.raises(UpscaleError, match=r"lost 127.0.0.1:\d+ and found no server for 1 s: start one"):
        list(session.hr_frames(slow(lr_windows(60))))


def slow(items):
    for item in items:
        time.sleep(0.01)
        yield item


def test_a_silent_server_is_given_up(open_session):
    gate = threading.Event()
    with FakeTriton(before_answer=lambda _: gate.wait(10)) as triton:
        session = open_session(triton, stall_s=0.5)
        with pytest.raises(UpscaleError, match="gave no answer for"):
            list(session.hr_frames(lr_windows(3)))
        gate.set()


def test_two_servers_share_the_windows(open_session):
    with FakeTriton() as one, FakeTriton() as two:
        session = open_session(one, two)
        assert session.in_flight == 32
        assert values(session.hr_frames(lr_windows(120))) == list(range(120))
        assert min(one.requests, two.requests) > 20


def test_when_one_of_two_servers_dies_the_other_takes_its_windows(open_session):
    with FakeTriton(before_answer=lambda _: time.sleep(0.005)) as one:
        two = FakeTriton()
        two.before_answer = lambda count: (
            count == 10 and (threading.Thread(target=two.stop).start() or time.sleep(0.3))
        )
        session = open_session(one, two)
        assert values(session.hr_frames(lr_windows(120))) == list(range(120))
        assert session.resent > 0


def test_servers_with_different_ensembles_are_refused(open_session):
    with (
        FakeTriton() as one,
        FakeTriton(config=ensemble_config(max_size="540x960")) as two,
        pytest.raises(UpscaleError, match="expected one ensemble everywhere"),
    ):
        open_session(one, two)


def test_no_server():
    with pytest.raises(
        UpscaleError, match=r"no Triton server answers at 127\.0\.0\.1:9: start one with `make"
    ):
        Server("127.0.0.1:9", "mst_gan")


def test_http_port_instead_of_grpc():
    with http_server() as port, pytest.raises(UpscaleError, match=r"expected gRPC at .*, found HTTP"):
        Server(f"127.0.0.1:{port}", "mst_gan")


def test_ensemble_not_loaded():
    with FakeTriton() as triton, pytest.raises(UpscaleError, match="has not loaded model 'other'"):
        Server(triton.url, "other")
