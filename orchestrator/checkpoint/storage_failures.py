"""What an error of a storage library means: whether anything happened, whether to repeat, and one line for a person.

The libraries' own classes say too little (s3fs maps forty codes to EINVAL) and are known here by name only, so that a
run on a local folder imports none of them.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error, understood."""

    line: str
    """What happened, and what to do."""
    certain: bool = True
    """The request was refused or never sent. Otherwise it may have taken effect, or may do so later."""
    retry: bool = False
    """The same request may succeed in a moment."""
    renew: bool = False
    """Other credentials may be let in."""


class DeadlineError(OSError):
    """Repeating a request did not help in time. The last error is the cause."""


_CHOOSE = "or choose another `storage`"
_NO_BUCKET = "the bucket does not exist; create it, or correct `storage`"
_KEYS = "wrong credentials; correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_EXPIRED = "the credentials have expired; renew them"
_NO_CREDENTIALS = "no valid credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or attach a role"
_DENIED = f"permission denied; allow reading, writing, listing and deleting below it, {_CHOOSE}"
_REFUSED = f"{_DENIED} (or the credentials are wrong)"
_CLOCK = "the clock of this machine is too far from the store's; set it (NTP)"
_REGION = "the bucket is in another region; set AWS_DEFAULT_REGION"
_FULL = f"no space left; free some, {_CHOOSE}"
_READ_ONLY = f"it is read-only; make it writable, {_CHOOSE}"
_TOO_LARGE = f"larger than a file may be here; raise the limit (ulimit -f), {_CHOOSE}"
_TOO_MANY = "too many open files; raise the limit (ulimit -n)"
_CHECK = "check AWS_ENDPOINT_URL_S3 and the network"
_UNREACHABLE = f"the endpoint is unreachable; {_CHECK}"
_NO_ENDPOINT = "the endpoint is no URL; write it as AWS_ENDPOINT_URL_S3=https://HOST"
_TLS = "no secure connection; check AWS_ENDPOINT_URL_S3 (http or https) and AWS_CA_BUNDLE"

_BY_CODE = {
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": _NO_BUCKET,
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "InvalidToken": _KEYS,
    "InvalidClientTokenId": _KEYS,
    "NotSignedUp": _KEYS,
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "AccountProblem": _DENIED,
    "Forbidden": _DENIED,
    "403": _REFUSED,  # the answer to a HEAD has no body that could say more
    "RequestTimeTooSkewed": _CLOCK,
    "RequestInTheFuture": _CLOCK,
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "301": _REGION,
    "307": _REGION,
    "QuotaExceeded": _FULL,
    "InsufficientStorage": _FULL,
    "XMinioStorageFull": _FULL,
    "507": _FULL,
}
_BY_CLASS = {
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": _NO_CREDENTIALS,
    "CredentialRetrievalError": _NO_CREDENTIALS,
    "TokenRetrievalError": _NO_CREDENTIALS,
    "SSOTokenLoadError": _NO_CREDENTIALS,
    "ProfileNotFound": _NO_CREDENTIALS,
    "InvalidEndpointURLError": _UNREACHABLE,
    "SSLError": _TLS,
}
_UNSAID = {"400": "refused without a word, which may mean that the credentials have expired; renew them"}
"""To a HEAD, whose answer has no body, by its status; what says more has a code of its own."""
_RENEWED = {_KEYS, _EXPIRED, _NO_CREDENTIALS, _REFUSED, *_UNSAID.values()}
_BY_ERRNO = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _TOO_LARGE,
    errno.EMFILE: _TOO_MANY,
    errno.ENFILE: _TOO_MANY,
    errno.EROFS: _READ_ONLY,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENOENT: f"the bucket or folder does not exist; create it, {_CHOOSE}",
    errno.ENOTDIR: f"a file is in the way; remove it, {_CHOOSE}",
    errno.EISDIR: f"a folder is in the way; remove it, {_CHOOSE}",
    errno.EOPNOTSUPP: f"this file system cannot do it; {_CHOOSE[3:]}",
}
_NEVER_SENT = {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "ConnectionRefusedError"}
_BROKEN_OFF = {"HTTPClientError", "ClientError", "ResponseParserError", "ConnectionError", "IncompleteReadError"}
_REPEATABLE_CODES = {
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "OperationAborted",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "ServiceUnavailable",
}
_REPEATABLE_STATUS = {408, 409, 429, 500, 502, 503, 504}
_UNCERTAIN_STATUS = {408, 409}


def diagnose(error: BaseException) -> Failure:
    """What `error`, raised by a storage library or the operating system, means."""
    if isinstance(error, DeadlineError) and error.__cause__ is not None:
        return Failure(line=f"{diagnose(error.__cause__).line}; {error}", certain=False)
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict) and "Error" in response:
        return _of_answer(response, error)
    classes = {cls.__name__ for cls in type(error).__mro__}
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(": ")
    for name in classes & _BY_CLASS.keys():
        return Failure(line=f"{_BY_CLASS[name]} ({text})", renew=_BY_CLASS[name] in _RENEWED)
    if re.search(r"Invalid endpoint: |`.*` was not a valid URI", text):  # a ValueError without a scheme
        return Failure(line=f"{_NO_ENDPOINT} ({text})")
    if classes & _NEVER_SENT:
        return Failure(line=f"{_UNREACHABLE} ({text})", retry=True)
    if isinstance(error, TimeoutError):
        where = f" from {error}; {_CHECK}" if str(error).startswith("http") else ""  # of S3, and not of a file system
        return Failure(line=f"no answer in time{where}", certain=False, retry=True)
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return Failure(line=f"{_BY_ERRNO[error.errno]} ({text})")
    if isinstance(error, PermissionError):
        return Failure(line=f"{_DENIED} ({text})")
    if isinstance(error, FileNotFoundError):
        return Failure(line=f"{_BY_ERRNO[errno.ENOENT]} ({text})")
    return Failure(line=text, certain=False, retry=bool(classes & _BROKEN_OFF))


def code(error: BaseException) -> str:
    """The S3 error code in `error`, or an empty string."""
    response = getattr(error, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) and "Error" in response else ""


def _of_answer(response: dict[str, Any], error: BaseException) -> Failure:
    """The store answered with an error."""
    name = str(response["Error"].get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    message = " ".join(str(response["Error"].get("Message") or error).split())
    if meaning := _BY_CODE.get(name) or _UNSAID.get(name) or _BY_CODE.get(str(status)):
        return Failure(line=f"{meaning} ({name}: {message})", renew=meaning in _RENEWED)
    retry = name in _REPEATABLE_CODES or status in _REPEATABLE_STATUS
    certain = (400 <= status < 500 and status not in _UNCERTAIN_STATUS) or status == 501  # not implemented
    return Failure(line=f"the store answered {status} {name}: {message}", certain=certain, retry=retry)
