"""An object read from its beginning to its end, as fast as its store gives it, in little memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from orchestrator.checkpoint.store import Store


def read_ahead(store: Store, key: str, size_bytes: int) -> Iterator[memoryview]:
    """The bytes of an object in order, piece by piece; a piece is good until the next one is asked for.

    The last ones are short, or empty, if the object is shorter than `size_bytes`.

    Raises:
        MissingObjectError: there is no such object.
        StorageError: it could not be read.
    """
    piece_bytes, at_once = store.backend.piece_bytes, store.backend.pieces_at_once
    begins = range(0, size_bytes, piece_bytes)
    # As many as are used at a time, again and again: fresh memory would cost more than what is read into it.
    buffers = [memoryview(bytearray(min(piece_bytes, size_bytes))) for _ in begins[:at_once]]

    def read(index: int, begin: int) -> memoryview:
        out = buffers[index % at_once][: size_bytes - begin]
        return out[: store.read_into(key, begin, [out])]

    if len(buffers) == 1:  # one piece after the other, or one piece
        yield from (read(*place) for place in enumerate(begins))
        return
    with ThreadPoolExecutor(at_once, thread_name_prefix="read-ahead") as pool:
        reading: deque[Future[memoryview]] = deque()
        for place in enumerate(begins):
            if len(reading) == at_once:
                yield reading.popleft().result()  # afterwards its buffer is free for the piece that is asked for next
            reading.append(pool.submit(read, *place))
        while reading:
            yield reading.popleft().result()
