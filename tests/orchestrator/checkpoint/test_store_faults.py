"""The store on S3 while network and server fail. Every test asserts that its fault happened."""

from __future__ import annotations

import time
import traceback

import pytest

from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, MissingObjectError, StorageError, UnknownOutcomeError
from tests.s3.fault_proxy import Fault, Kind
from tests.s3.server import KEY, SECRET
from tests.s3.stores import BIG, MB, abort_all, opened, unfinished

pytestmark = pytest.mark.s3

FOR_EVER = 10**6
OPERATIONS = {
    "write": (lambda store: store.write("new", [b"data"]), "PUT"),
    "read": (lambda store: store.read("old"), "GET .*/old"),
    "read_into": (lambda store: store.read_into("old", 0, [memoryview(bytearray(3))]), "GET .*/old"),
    "size": (lambda store: store.size("old"), "HEAD"),
    "list": (lambda store: store.list(""), "GET .*list-type"),
    "delete": (lambda store: store.delete("old"), "DELETE"),
    "create": (lambda store: store.create("new", b"mine"), "PUT"),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


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
        s3_proxy.faults = [Fault(kind=Kind.CUT_ANSWER, match="GET", after_bytes=5 * MB)]
        out = bytearray(len(BIG))
        assert store.read_into("new", 0, [memoryview(out)]) == len(BIG) and out == BIG
        assert s3_proxy.fired(Kind.CUT_ANSWER) == 2

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
        abort_all(store)  # of an upload whose beginning got no answer nobody knows the name

    def test_a_slow_line_gets_the_time_that_the_size_needs(self, s3_proxy, parts_of_5_mb):
        store = opened(deadline_s=1.2)
        s3_proxy.latency_s, s3_proxy.bytes_per_s = 0.05, 8 * MB
        store.write("new", [BIG])
        began = time.monotonic()
        assert store.read("new") == BIG
        assert time.monotonic() - began > 11 / 8
        assert store.read_into("new", 0, [memoryview(bytearray(len(BIG)))]) == len(BIG)
        assert time.monotonic() - began > 2 * 11 / 8


class TestReached:
    """Whoever waits at a terminal is told soon."""

    def test_a_black_hole_is_named(self, s3_proxy, monkeypatch):
        monkeypatch.setattr("orchestrator.checkpoint.store.REACH_S", 0.5)
        s3_proxy.faults = [Fault(kind=Kind.BLACK_HOLE, count=FOR_EVER)]
        began = time.monotonic()
        with pytest.raises(StorageError) as caught:
            Store.reach("s3://tests/runs")
        assert time.monotonic() - began < 20 and s3_proxy.fired(Kind.BLACK_HOLE) >= 1
        assert str(caught.value).startswith("cannot reach s3://tests/runs: no answer in time from http://127.0.0.1:")
        assert "check AWS_ENDPOINT_URL_S3 and the network; 1 try" in str(caught.value)

    def test_a_refusal_is_an_answer(self, s3_proxy):
        s3_proxy.faults = [Fault(kind=Kind.ANSWER, match="HEAD", status=403, code="AccessDenied")]
        assert Store.reach("s3://tests/runs").url == "s3://tests/runs" and s3_proxy.fired(Kind.ANSWER) == 1


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

    def test_a_pause_that_ends_behind_the_deadline(self, s3_proxy, monkeypatch):
        store, sleep = opened(deadline_s=1.5), time.sleep
        s3_proxy.faults = [Fault(kind=Kind.BLACK_HOLE, count=FOR_EVER)]
        monkeypatch.setattr("orchestrator.checkpoint.s3_requests.time.sleep", lambda pause_s: sleep(pause_s + 1.5))
        with pytest.raises(StorageError, match="no answer in time"):
            store.write("new", [b"text"])

    def test_what_is_said_of_a_download_lets_nobody_read_it(self, s3_proxy):
        store = opened(deadline_s=1.0)
        s3_proxy.faults = [Fault(kind=Kind.LOSE_ANSWER, match="GET .*/old", count=FOR_EVER)]
        with pytest.raises(StorageError) as caught:
            store.read_into("old", 0, [memoryview(bytearray(3))])
        assert "/old" in str(caught.value) and "Signature" not in "".join(traceback.format_exception(caught.value))
        assert s3_proxy.fired(Kind.LOSE_ANSWER) >= 2

    def test_a_download_that_trickles(self, s3_proxy, monkeypatch):
        monkeypatch.setattr("orchestrator.checkpoint.s3_requests._SLOWEST_BYTES_PER_S", 20 * MB)
        store = opened()
        store.write("new", [BIG])
        store._deadline_s = store.backend._requests._deadline_s = 1.5
        s3_proxy.bytes_per_s = MB  # something arrives all the time, and it would take 11 s
        began = time.monotonic()
        with pytest.raises(StorageError, match="no answer in time"):
            store.read_into("new", 0, [memoryview(bytearray(len(BIG)))])
        assert time.monotonic() - began < 6

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


@pytest.mark.parametrize("operation", ["write", "read_into", "list"])
def test_credentials_that_are_renewed_in_their_file_are_found(s3_server, s3_url, tmp_path, monkeypatch, operation):
    """As those of a session are, every few hours. botocore reads such a file once."""
    store, call = Store.open(s3_url), OPERATIONS[operation][0]
    store.write("old", [b"old"])
    credentials = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = Store.open(s3_url)
    file = f"[default]\naws_access_key_id = {{}}\naws_secret_access_key = {SECRET}\n"
    credentials.write_text(file.format("revoked"))
    with pytest.raises(StorageError, match="wrong credentials"):
        call(store)
    credentials.write_text(file.format(KEY))
    call(store)


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
