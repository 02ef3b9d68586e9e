"""Objects in S3, and in what speaks its protocol."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from orchestrator.checkpoint.backend import Backend, Unfinished
from orchestrator.checkpoint.s3_requests import S3Requests, allow_for
from orchestrator.checkpoint.s3_transfers import S3Transfers
from orchestrator.checkpoint.storage_failures import code

T = TypeVar("T")

PART_BYTES = 16 << 20
_MAX_PARTS = 10_000
_PARTS_AT_ONCE = 8
_MISSING = {"NoSuchKey", "NotFound", "404"}


class S3Objects(Backend):
    """A backend of `Store`. Its calls may come from any thread of the process that made it."""

    kind = "s3"

    def __init__(self, connect: Callable[[], Any], deadline_s: float) -> None:
        """Args: connect: makes an s3fs filesystem with `s3_requests.OPTIONS`."""
        self._requests = S3Requests(connect, deadline_s)
        self._transfers = S3Transfers(self._requests)

    def reach(self, path: str, timeout_s: float) -> None:
        bucket, _ = _split(path)
        try:
            self._requests.run(
                self._requests.repeat(lambda client, _: client.head_bucket(Bucket=bucket), timeout_s=timeout_s)
            )
        except Exception as error:
            if not code(error):
                raise

    def read(self, path: str, begin: int | None, end: int | None, timeout_s: float) -> bytes:
        bucket, key = _split(path)
        wanted: dict[str, str] = {}
        if begin is not None or end is not None:
            if end is not None and end <= (begin or 0):
                self.size(path)  # there is no empty range; the object may be missing all the same
                return b""
            wanted["Range"] = f"bytes={begin or 0}-{'' if end is None else end - 1}"

        async def get(client: Any, limit: asyncio.Timeout) -> bytes:
            answer = await client.get_object(Bucket=bucket, Key=key, **wanted)
            allow_for(limit, answer["ContentLength"])
            async with answer["Body"] as body:
                return await body.read()

        try:
            return self._run(path, self._requests.repeat(get, timeout_s=timeout_s))
        except Exception as error:
            if code(error) in ("InvalidRange", "416"):
                return b""  # it begins at or after the end
            raise

    def read_into(self, path: str, begin: int, outs: Sequence[memoryview], timeout_s: float) -> int:
        if not any(map(len, outs)):
            self.size(path)  # there is no empty range; the object may be missing all the same
            return 0
        with _missing_found(path):
            return self._transfers.read_into(*_split(path), begin, outs, timeout_s)

    def write(self, path: str, parts: Sequence[memoryview]) -> None:
        size = sum(map(len, parts))
        part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
        pieces = list(_cut(parts, part_bytes)) or [[]]
        bucket, key = _split(path)
        with _missing_found(path):
            if len(pieces) == 1:
                self._transfers.send("put_object", pieces[0], lambda: False, Bucket=bucket, Key=key)
            else:
                self._put_in_parts(bucket, key, pieces)

    def create_once(self, path: str, data: bytes, timeout_s: float) -> None:
        """One conditional request, not repeated: the caller has to look at what happened first."""
        bucket, key = _split(path)

        async def put(client: Any, limit: asyncio.Timeout) -> None:
            await client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")

        try:
            self._run(path, self._requests.once(put, timeout_s, len(data)))
        except Exception as error:
            if code(error) in ("PreconditionFailed", "412"):
                raise FileExistsError(path) from error
            raise

    def size(self, path: str) -> int:
        return self._head(path)["ContentLength"]

    def list(self, path: str) -> list[str]:
        bucket, key = _split(path)
        prefix = f"{key}/"

        async def page(token: dict[str, str]) -> Any:
            return await self._requests.repeat(
                lambda client, _: client.list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter="/", **token)
            )

        async def names() -> list[str]:
            found, token = [], {}
            while True:
                answer = await page(token)
                found += [entry["Key"] for entry in answer.get("Contents", ())]
                found += [entry["Prefix"] for entry in answer.get("CommonPrefixes", ())]
                if not answer.get("IsTruncated"):
                    return found
                token = {"ContinuationToken": answer["NextContinuationToken"]}

        return [name[len(prefix) :].rstrip("/") for name in self._run(path, names()) if name != prefix]

    def delete(self, path: str) -> None:
        bucket, key = _split(path)
        self._run(path, self._requests.repeat(lambda client, _: client.delete_object(Bucket=bucket, Key=key)))

    def unfinished(self, path: str) -> list[Unfinished]:
        bucket, key = _split(path)

        async def page(marker: dict[str, str]) -> Any:
            return await self._requests.repeat(
                lambda client, _: client.list_multipart_uploads(Bucket=bucket, Prefix=f"{key}/", **marker)
            )

        async def uploads() -> list[Unfinished]:
            found, marker = [], {}
            while True:
                answer = await page(marker)
                now_s = _date_s(answer) or time.time()
                for upload in answer.get("Uploads", ()):
                    age_s = now_s - upload["Initiated"].timestamp()
                    place = f"{bucket}/{upload['Key']}"
                    found.append(Unfinished(path=place, age_s=age_s, handle=upload["UploadId"]))
                if not answer.get("IsTruncated"):
                    return found
                marker = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

        return self._run(path, uploads())

    def abort(self, upload: Unfinished) -> None:
        bucket, key = _split(upload.path)
        self._run(upload.path, self._abort(bucket, key, upload.handle))

    def age_s(self, path: str) -> float | None:
        answer = self._head(path)
        now_s = _date_s(answer)
        return None if now_s is None else now_s - answer["LastModified"].timestamp()

    def clock_skew_s(self, path: str) -> float | None:
        bucket, _ = _split(path)
        began = time.time()
        answer = self._run(path, self._requests.repeat(lambda client, _: client.head_bucket(Bucket=bucket)))
        now_s = _date_s(answer)
        # The header counts whole seconds and was written somewhere between sending and receiving.
        return None if now_s is None else now_s + 0.5 - (began + time.time()) / 2

    def _head(self, path: str) -> Any:
        bucket, key = _split(path)
        return self._run(path, self._requests.repeat(lambda client, _: client.head_object(Bucket=bucket, Key=key)))

    def _run(self, path: str, coroutine: Coroutine[Any, Any, T]) -> T:
        with _missing_found(path):
            return self._requests.run(coroutine)

    def _put_in_parts(self, bucket: str, key: str, pieces: Sequence[Sequence[memoryview]]) -> None:
        run, repeat = self._requests.run, self._requests.repeat
        began = run(repeat(lambda client, _: client.create_multipart_upload(Bucket=bucket, Key=key)))
        upload = {"Bucket": bucket, "Key": key, "UploadId": began["UploadId"]}
        try:
            parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(self._send(upload, pieces), 1)]
            run(self._complete(upload, {"Parts": parts}, sum(len(view) for piece in pieces for view in piece)))
        except BaseException:
            with suppress(Exception):  # what is left over costs money until the `Pruner` finds it
                run(self._requests.once(lambda client, _: client.abort_multipart_upload(**upload), 5.0))
            raise

    def _send(self, upload: dict[str, str], pieces: Sequence[Sequence[memoryview]]) -> list[str]:
        """The tags of the parts. If one of them fails for good, the others end soon."""
        failures: list[BaseException] = []

        def send(number: int, piece: Sequence[memoryview]) -> str:
            try:
                return self._transfers.send("upload_part", piece, lambda: bool(failures), **upload, PartNumber=number)
            except BaseException as error:
                failures.append(error)
                raise

        with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="s3-upload") as pool:
            sending = [pool.submit(send, number, piece) for number, piece in enumerate(pieces, 1)]
        if failures:
            raise failures[0]  # the others have ended because of it
        return [future.result() for future in sending]

    async def _complete(self, upload: dict[str, str], parts: dict[str, Any], size: int) -> None:
        try:
            await self._requests.repeat(
                lambda client, _: client.complete_multipart_upload(**upload, MultipartUpload=parts)
            )
        except Exception as error:
            if code(error) != "NoSuchUpload":
                raise
            # An earlier try did it, and its answer got lost. What it made is read back by the caller.
            place = {"Bucket": upload["Bucket"], "Key": upload["Key"]}
            found = await self._requests.repeat(lambda client, _: client.head_object(**place))
            if found["ContentLength"] != size:
                raise

    async def _abort(self, bucket: str, key: str, upload_id: str) -> None:
        try:
            await self._requests.repeat(
                lambda client, _: client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
            )
        except Exception as error:
            if code(error) != "NoSuchUpload":  # finished or aborted by its owner meanwhile
                raise


@contextmanager
def _missing_found(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if code(error) in _MISSING:
            raise FileNotFoundError(path) from error
        raise


def _date_s(answer: Any) -> float | None:
    """When the store answered, by its own clock; None: it does not say."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return None if date is None else email.utils.parsedate_to_datetime(date).timestamp()


def _cut(parts: Sequence[memoryview], size: int) -> Iterator[list[memoryview]]:
    """The parts, one after the other, in pieces of `size` bytes; only the last one is smaller."""
    piece: list[memoryview] = []
    room = size
    for part in parts:
        at = 0
        while at < len(part):
            view = part[at : at + room]
            piece.append(view)
            at, room = at + len(view), room - len(view)
            if room == 0:
                yield piece
                piece, room = [], size
    if piece:
        yield piece


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("/")
    return bucket, key
