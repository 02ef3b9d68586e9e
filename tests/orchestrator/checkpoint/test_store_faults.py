"""The store on S3 while network and server fail. Every test asserts that its fault happened."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid

import fsspec
import pytest

from orchestrator.checkpoint import s3_objects
from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.s3_objects import S3Objects
from orchestrator.checkpoint.s3_requests import OPTIONS
from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, MissingObjectError, StorageError, UnknownOutcomeError
from tests.orchestrator.checkpoint.states import equal, load, make_state, save
from tests.s3.fault_proxy import Fault, Kind
from tests.s3.server import BUCKET

pytestmark = pytest.mark.s3

MB = 1 << 20
BIG = os.urandom(11 * MB)
FOR_EVER = 10**6
OPERATIONS = {
    "write": (lambda store: store.write("new", [b"data"]), "PUT"),
    "read": (lambda store: store.read("old"), "GET .*/old"),
    "size": (lambda store: store.size("old"), "HEAD"),
    "list": (lambda store: store.list(""), "GET .*list-type"),
    "delete": (lambda store: store.delete("old"), "DELETE"),
    "create": (lambda store: store.create("new", b"mine"), "PUT"),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


@pytest.fixture
def parts_of_5_mb(monkeypatch):
    monkeypatch.setattr(s3_objects, "PART_BYTES", 5 * MB)  # the smallest that S3 takes


def opened(deadline_s: float = 10.0) -> Store:
    """A new prefix with the object `old`, through the proxy; all stores share one connection, which saves time."""
    options = OPTIONS | {"skip_instance_cache": False, "endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]}
    root = f"{BUCKET}/{uuid.uuid4().hex}"
    store = Store(f"s3://{root}", root, S3Objects(lambda: fsspec.filesystem("s3", **options), deadline_s), deadline_s)
    store.write("old", [b"old"])
    return store


def unfinished(server) -> list:
    return server.client.list_multipart_uploads(BUCKET)


class TestRepeated:
    """What passes by itself is not noticed."""

    @each_operation
    def test_a_store_that_is_busy(self, s3_proxy, operation):
        store, (call, match) = opened(), OPERATIONS[operation]
        s3_proxy.faults = [Fault(kind=Kind.ANSWER, match=match, count=2)]
        call(store)
        assert s3_proxy.fired(Kind.ANSWER) == 2

    @pytest.mark.parametrize(
        ("status", "code"), [(500, "InternalError"), (429, "TooManyRequests"), (503, ""), (400, "RequestTimeout")]
    )
    def test_other_words_for_busy(self, s3_proxy, status, code):
        store = opened()
        s3_proxy.faults = [Fault(kind=Kind.ANSWER, status=status, code=code)]
        assert store.read("old") == b"old" and s3_proxy.fired(Kind.ANSWER) == 1

    @each_operation
    def test_a_lost_answer(self, s3_proxy, operation):
        store, (call, match) = opened(), OPERATIONS[operation]
        s3_proxy.faults = [Fault(kind=Kind.LOSE_ANSWER, match=match)]
        call(store)
        assert s3_proxy.fired(Kind.LOSE_ANSWER) == 1

    @each_operation
    def test_a_black_hole_that_closes(self, s3_proxy, operation):
        store, (call, match) = opened(deadline_s=3), OPERATIONS[operation]
        s3_proxy.faults = [Fault(kind=Kind.BLACK_HOLE, match=match)]
        call(store)
        assert s3_proxy.fired(Kind.BLACK_HOLE) == 1

    def test_a_cut_in_the_middle_of_an_upload_and_of_a_download(self, s3_proxy):
        store = opened()
        s3_proxy.faults = [
            Fault(kind=Kind.CUT_REQUEST, match="PUT", after_bytes=3 * MB),
            Fault(kind=Kind.CUT_ANSWER, match="GET", after_bytes=5 * MB),
        ]
        store.write("new", [BIG])
        assert store.read("new") == BIG
        assert s3_proxy.fired(Kind.CUT_REQUEST) == s3_proxy.fired(Kind.CUT_ANSWER) == 1

    @pytest.mark.parametrize("kind", [Kind.CUT_REQUEST, Kind.LOSE_ANSWER, Kind.ANSWER])
    def test_a_part_that_fails_is_sent_again(self, s3_server, s3_proxy, parts_of_5_mb, kind):
        store = opened()
        s3_proxy.faults = [Fault(kind=kind, match="PUT .*partNumber=2", after_bytes=2 * MB)]
        store.write("new", [BIG[:100], memoryview(BIG)[100:]])
        assert store.read("new") == BIG
        assert s3_proxy.fired(kind) == 1 and unfinished(s3_server) == []
        numbers = [seen.line[-1] for seen in s3_proxy.log if "partNumber" in seen.line and seen.line.startswith("PUT")]
        assert len(numbers) == 4

    @pytest.mark.parametrize("request_", ["POST .*uploads", "POST .*uploadId"])
    @pytest.mark.parametrize("kind", [Kind.LOSE_ANSWER, Kind.ANSWER])
    def test_beginning_and_completing_an_upload(self, s3_proxy, parts_of_5_mb, request_, kind):
        store = opened()
        s3_proxy.faults = [Fault(kind=kind, match=request_)]
        store.write("new", [BIG])
        assert store.read("new") == BIG and s3_proxy.fired(kind) == 1
        store.abort_dangling_uploads(0)  # of an upload whose beginning got no answer nobody knows the name

    def test_a_slow_line_gets_the_time_that_the_size_needs(self, s3_proxy, parts_of_5_mb):
        store = opened(deadline_s=1.2)
        s3_proxy.latency_s, s3_proxy.bytes_per_s = 0.05, 8 * MB
        store.write("new", [BIG])
        began = time.monotonic()
        assert store.read("new") == BIG
        assert time.monotonic() - began > 11 / 8


class TestGivenUp:
    """What does not pass ends at the deadline, and says so."""

    @each_operation
    def test_a_black_hole(self, s3_proxy, operation):
        store, (call, _) = opened(deadline_s=1.5), OPERATIONS[operation]
        s3_proxy.faults = [Fault(kind=Kind.BLACK_HOLE, count=FOR_EVER)]
        began = time.monotonic()
        with pytest.raises(UnknownOutcomeError if operation == "create" else StorageError, match="no answer in time"):
            call(store)
        assert time.monotonic() - began < 3
        assert s3_proxy.fired(Kind.BLACK_HOLE) >= 2

    def test_a_black_hole_in_the_middle_of_a_large_upload(self, s3_server, s3_proxy, parts_of_5_mb, monkeypatch):
        monkeypatch.setattr("orchestrator.checkpoint.s3_requests._SLOWEST_BYTES_PER_S", 20 * MB)
        store = opened(deadline_s=1.5)
        s3_proxy.faults = [Fault(kind=Kind.BLACK_HOLE, match="partNumber=2", count=FOR_EVER)]
        began = time.monotonic()
        with pytest.raises(StorageError, match="no answer in time"):
            store.write("new", [BIG])
        assert time.monotonic() - began < 4 and s3_proxy.fired(Kind.BLACK_HOLE) >= 2
        assert not store.exists("new") and unfinished(s3_server) == []

    def test_a_store_that_stays_busy(self, s3_proxy):
        store = opened(deadline_s=1.5)
        s3_proxy.faults = [Fault(kind=Kind.ANSWER, count=FOR_EVER)]
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"SlowDown: injected; \d+ tries in 2 s"):
            store.write("new", [b"data"])
        assert time.monotonic() - began < 2 and s3_proxy.fired(Kind.ANSWER) >= 3

    def test_a_part_that_is_refused_ends_the_upload_without_a_trace(self, s3_server, s3_proxy, parts_of_5_mb):
        store = opened()
        s3_proxy.faults = [Fault(kind=Kind.ANSWER, match="partNumber=3", status=403, code="AccessDenied")]
        with pytest.raises(StorageError, match="permission denied"):
            store.write("new", [BIG])
        assert s3_proxy.fired(Kind.ANSWER) == 1
        assert not store.exists("new") and unfinished(s3_server) == []


class TestCreate:
    """Whatever gets lost, one creator wins and everybody knows who."""

    def test_ours_although_no_answer_said_so(self, s3_proxy):
        store = opened()
        s3_proxy.faults = [Fault(kind=Kind.LOSE_ANSWER, match="PUT")]
        store.create("new", b"mine")
        assert store.read("new") == b"mine"
        assert sum(seen.line.startswith("PUT .*/new") for seen in s3_proxy.log) <= 1

    def test_theirs_although_no_answer_said_so(self, s3_proxy):
        store = opened()
        s3_proxy.faults = [Fault(kind=Kind.LOSE_ANSWER, match="PUT")]
        with pytest.raises(AlreadyExistsError):
            store.create("old", b"mine")
        assert store.read("old") == b"old" and s3_proxy.fired(Kind.LOSE_ANSWER) == 1

    def test_a_conflict_is_tried_again(self, s3_proxy):
        store = opened()
        s3_proxy.faults = [Fault(kind=Kind.ANSWER, match="PUT", status=409, code="ConditionalRequestConflict")]
        store.create("new", b"mine")
        assert store.read("new") == b"mine" and s3_proxy.fired(Kind.ANSWER) == 1

    def test_unknown_when_it_cannot_be_read_back(self, s3_proxy):
        store = opened(deadline_s=1.5)
        s3_proxy.faults = [
            Fault(kind=Kind.LOSE_ANSWER, match="PUT"),
            Fault(kind=Kind.BLACK_HOLE, match="GET", count=FOR_EVER),
        ]
        with pytest.raises(UnknownOutcomeError, match="delete nothing"):
            store.create("new", b"mine")
        assert s3_proxy.fired(Kind.LOSE_ANSWER) == 1 and s3_proxy.fired(Kind.BLACK_HOLE) >= 1
        assert not any(seen.line.startswith("DELETE") for seen in s3_proxy.log)
        s3_proxy.faults = []
        assert store.read("new") == b"mine"  # so it was right not to call it a failure

    def test_unknown_stays_unknown_although_the_next_try_is_refused(self, s3_proxy):
        store = opened()
        s3_proxy.faults = [
            Fault(kind=Kind.ANSWER, match="PUT", status=500, code="InternalError"),
            Fault(kind=Kind.ANSWER, match="PUT", status=403, code="AccessDenied"),
        ]
        with pytest.raises(UnknownOutcomeError):
            store.create("new", b"mine")
        assert s3_proxy.fired(Kind.ANSWER) == 2

    def test_refused_is_certain(self, s3_proxy):
        store = opened()
        s3_proxy.faults = [Fault(kind=Kind.ANSWER, match="PUT", status=403, code="AccessDenied")]
        with pytest.raises(StorageError, match="permission denied"):
            store.create("new", b"mine")
        assert s3_proxy.fired(Kind.ANSWER) == 1


class TestServerKilled:
    def test_in_the_middle_of_an_upload_and_started_again(self, s3_server, s3_proxy, parts_of_5_mb):
        store = opened(deadline_s=30)
        first = save(store, make_state(0), step=1)
        s3_proxy.bytes_per_s = 8 * MB
        sent = s3_proxy.num_sent
        upload = threading.Thread(target=lambda: store.write("new", [BIG]))
        upload.start()
        while s3_proxy.num_sent < sent + 4 * MB:
            time.sleep(0.01)
        s3_server.kill()
        assert s3_proxy.num_sent < sent + len(BIG) and upload.is_alive()
        s3_server.start()
        upload.join(30)
        assert store.read("new") == BIG
        assert equal(load(store, newest_stable(store).manifest, 2), make_state(0))
        assert newest_stable(store).manifest == first


class TestUnfinishedUploads:
    def test_only_old_ones_below_our_prefix_are_aborted(self, s3_server, s3_url):
        client, store = s3_server.client, Store.open(f"{s3_url}/run")
        prefix = store.url.removeprefix(f"s3://{BUCKET}/")
        keys = [f"{prefix}/checkpoints/1/shard", f"{prefix}-2/checkpoints/1/shard"]
        for key in keys:
            client.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
        assert store.abort_dangling_uploads(3600) == 0
        assert {upload["Key"] for upload in unfinished(s3_server)} == set(keys)
        assert store.abort_dangling_uploads(0) == 1
        assert [upload["Key"] for upload in unfinished(s3_server)] == keys[1:]
        Store.open(f"{s3_url}/run-2").abort_dangling_uploads(0)

    def test_of_a_process_that_was_killed(self, s3_server, s3_proxy):
        url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        s3_proxy.bytes_per_s = MB
        program = f"""
from orchestrator.checkpoint import s3_objects
from orchestrator.checkpoint.store import Store
s3_objects.PART_BYTES = 5 << 20
Store.open({url!r}).write("big", [bytes(20 << 20)])
"""
        process = subprocess.Popen([sys.executable, "-c", program])
        while s3_proxy.num_sent < MB:
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
        process.wait()
        store = Store.open(url)
        assert not store.exists("big") and len(unfinished(s3_server)) == 1
        assert store.abort_dangling_uploads(0) == 1
        assert unfinished(s3_server) == []


def test_a_forked_process_must_open_its_own(s3_url):
    store = Store.open(s3_url)
    store.write("a", [b"x"])
    pid = os.fork()
    if pid == 0:
        try:
            store.read("a")
        except AssertionError as error:
            os._exit(0 if "open one in" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert store.read("a") == b"x"


def test_a_custom_endpoint_with_a_name_is_addressed_by_path(s3_server, s3_url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://localhost:{s3_server.port}")
    store = Store.open(s3_url)
    with pytest.raises(MissingObjectError):  # and not: cannot resolve tests.localhost
        store.read("nothing")


def test_ranges(s3_proxy):
    store = opened()
    store.write("digits", [b"0123456789"])
    s3_proxy.log.clear()
    assert [store.read("digits", *span) for span in ((0, 0), (3, 3), (10, 20), (12, None))] == [b""] * 4
    with pytest.raises(MissingObjectError):
        store.read("nothing", 3, 3)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_over(s3_server):
    yield
    assert unfinished(s3_server) == []
