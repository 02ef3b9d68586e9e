"""Stores on the test server."""

from __future__ import annotations

import os
import uuid

import fsspec

from orchestrator.checkpoint.s3_objects import S3Objects
from orchestrator.checkpoint.s3_requests import OPTIONS
from orchestrator.checkpoint.store import Store
from tests.s3.server import BUCKET, S3Server

MB = 1 << 20
BIG = os.urandom(11 * MB)
"""Three parts of 5 MB, the smallest that S3 takes."""


def opened(deadline_s: float = 10.0) -> Store:
    """A new prefix with the object `old`, through the proxy; all stores share one connection, which saves time."""
    options = OPTIONS | {"skip_instance_cache": False, "endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]}
    root = f"{BUCKET}/{uuid.uuid4().hex}"
    store = Store(f"s3://{root}", root, S3Objects(lambda: fsspec.filesystem("s3", **options), deadline_s), deadline_s)
    store.write("old", [b"old"])
    return store


def unfinished(server: S3Server) -> list:
    """Multipart uploads that were begun and never ended."""
    return server.client.list_multipart_uploads(BUCKET)


def abort_all(store: Store) -> int:
    """End every upload below the store that was begun and not ended; how many there were."""
    uploads = store.unfinished_uploads()
    for upload in uploads:
        store.abort_upload(upload)
    return len(uploads)
