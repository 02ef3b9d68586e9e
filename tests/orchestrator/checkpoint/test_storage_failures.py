from __future__ import annotations

import errno
import os

import pytest

from orchestrator.checkpoint.storage_failures import DeadlineError, diagnose
from orchestrator.checkpoint.store import Store
from orchestrator.errors import StorageError, UnbrokenError
from tests.s3.fault_proxy import Fault, Kind
from tests.s3.server import free_ports


class Answer(Exception):
    """As botocore's ClientError."""

    def __init__(self, status: int, code: str, message: str = "said so") -> None:
        super().__init__(message)
        self.response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}


def named(name: str, *bases: type[Exception]) -> Exception:
    return type(name, bases or (Exception,), {})("said so")


CASES = [
    # error, what the line says, certain, retry
    (Answer(404, "NoSuchBucket"), "bucket does not exist; create it", True, False),
    (Answer(403, "InvalidAccessKeyId"), "wrong credentials; correct AWS_ACCESS_KEY_ID", True, False),
    (Answer(403, "SignatureDoesNotMatch"), "wrong credentials; correct AWS_ACCESS_KEY_ID", True, False),
    (Answer(400, "ExpiredToken"), "credentials have expired; renew them", True, False),
    (Answer(400, "400"), "the credentials have expired; renew them", True, False),
    (Answer(403, "AccessDenied"), "permission denied; allow", True, False),
    (Answer(403, "403"), "or the credentials are wrong", True, False),
    (Answer(403, "RequestTimeTooSkewed"), "clock of this machine is too far from the store's; set it", True, False),
    (Answer(301, "PermanentRedirect"), "another region; set AWS_DEFAULT_REGION", True, False),
    (Answer(507, "InsufficientStorage"), "no space left; free some", True, False),
    (Answer(403, "QuotaExceeded"), "no space left; free some", True, False),
    (Answer(503, "SlowDown"), "503 SlowDown: said so", False, True),
    (Answer(500, "InternalError"), "500 InternalError", False, True),
    (Answer(429, "TooManyRequests"), "429 TooManyRequests", True, True),
    (Answer(409, "ConditionalRequestConflict"), "409 Conditional", False, True),
    (Answer(400, "RequestTimeout"), "400 RequestTimeout", True, True),
    (Answer(400, "EntityTooSmall"), "400 EntityTooSmall: said so", True, False),
    (Answer(501, "NotImplemented"), "501 NotImplemented: said so", True, False),
    (named("NoCredentialsError"), "no valid credentials found; set AWS_ACCESS_KEY_ID", True, False),
    (named("EndpointConnectionError", ConnectionError), "unreachable; check AWS_ENDPOINT_URL_S3", True, True),
    (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "unreachable; check AWS_ENDPOINT_URL_S3", True, True),
    (ValueError("Invalid endpoint: host:9000"), "is no URL; write it as AWS_ENDPOINT_URL_S3=https://HOST", True, False),
    (RuntimeError("Custom endpoint `ftp://h` was not a valid URI"), "the endpoint is no URL; write", True, False),
    (named("SSLError"), "no secure connection; check AWS_ENDPOINT_URL_S3", True, False),
    (ConnectionResetError(errno.ECONNRESET, "reset by peer"), "reset by peer", False, True),
    (named("ReadTimeoutError", named("HTTPClientError").__class__), "ReadTimeoutError: said so", False, True),
    (TimeoutError(), "no answer in time", False, True),
    (OSError(errno.ENOSPC, "No space left on device"), "no space left; free some", True, False),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left; free some", True, False),
    (OSError(errno.EFBIG, "File too large"), "raise the limit (ulimit -f)", True, False),
    (OSError(errno.EROFS, "Read-only file system"), "it is read-only; make it writable", True, False),
    (PermissionError(errno.EACCES, "Permission denied"), "permission denied; allow", True, False),
    (PermissionError("AccessDenied"), "permission denied; allow", True, False),
    (FileNotFoundError(errno.ENOENT, "No such file"), "bucket or folder does not exist; create it", True, False),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "a file is in the way; remove it", True, False),
    (OSError(errno.EIO, "Input/output error"), "Input/output error", False, False),
    (RuntimeError("what is this"), "RuntimeError: what is this", False, False),
]


@pytest.mark.parametrize(("error", "line", "certain", "retry"), CASES, ids=[repr(case[0])[:40] for case in CASES])
def test_what_an_error_means(error, line, certain, retry):
    found = diagnose(error)
    assert line in found.line and "\n" not in found.line
    assert (found.certain, found.retry) == (certain, retry)
    assert found.renew == ("credentials" in line)


def test_after_the_deadline_the_last_error_says_why():
    error = DeadlineError("7 tries in 60 s")
    error.__cause__ = Answer(503, "SlowDown")
    assert diagnose(error).line == "the store answered 503 SlowDown: said so; 7 tries in 60 s"


def first_words(url: str) -> str:
    """What the start of a run says about a store that cannot be used: the first write or the first look."""
    with pytest.raises(UnbrokenError) as caught:
        store = Store.open(url, deadline_s=2.0)
        store.list("checkpoints")
        store.create("a", b"b")
    assert isinstance(caught.value, StorageError)
    return str(caught.value)


@pytest.mark.s3
class TestOnARealServer:
    def test_no_such_bucket(self, s3_url):
        assert "the bucket does not exist; create it" in first_words("s3://nothing-here/prefix")

    @pytest.mark.parametrize(("name", "value"), [("AWS_ACCESS_KEY_ID", "nobody"), ("AWS_SECRET_ACCESS_KEY", "wrong")])
    def test_wrong_credentials(self, s3_url, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        assert "wrong credentials; correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in first_words(s3_url)

    def test_no_credentials(self, s3_url, monkeypatch, tmp_path):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        assert "no valid credentials found; set AWS_ACCESS_KEY_ID" in first_words(s3_url)

    def test_unreachable(self, s3_url, monkeypatch):
        (port,) = free_ports(1)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
        said = first_words(s3_url)
        assert "the endpoint is unreachable; check AWS_ENDPOINT_URL_S3 and the network (Endpoint" in said
        assert str(port) in said

    def test_not_https(self, s3_server, s3_url, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint.replace("http:", "https:"))
        assert "no secure connection; check AWS_ENDPOINT_URL_S3 (http or https)" in first_words(s3_url)

    @pytest.mark.parametrize(
        ("code", "line"),
        [("AccessDenied", "permission denied; allow"), ("RequestTimeTooSkewed", "the clock of this machine")],
    )
    def test_refused(self, s3_proxy, s3_url, monkeypatch, code, line):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_proxy.endpoint)
        s3_proxy.faults = [Fault(kind=Kind.ANSWER, status=403, code=code)]
        assert line in first_words(s3_url) and s3_proxy.fired(Kind.ANSWER) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk(tmp_path, monkeypatch):
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *mode: real("/dev/full", "wb") if "xb" in mode else real(path))
    assert "no space left; free some" in first_words(str(tmp_path))
