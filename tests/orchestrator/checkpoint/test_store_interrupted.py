"""The store on S3 when a process ends in the middle: the server, the client, or a fork of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid

import pytest

from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.store import Store
from tests.orchestrator.checkpoint.states import equal, load, make_state, save
from tests.s3.server import BUCKET
from tests.s3.stores import BIG, MB, abort_all, opened, unfinished

pytestmark = pytest.mark.s3


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
    def test_only_those_below_our_prefix_are_seen(self, s3_server, s3_url):
        client, store = s3_server.client, Store.open(f"{s3_url}/run")
        prefix = store.url.removeprefix(f"s3://{BUCKET}/")
        keys = [f"{prefix}/checkpoints/1/shard", f"{prefix}-2/checkpoints/1/shard"]
        for key in keys:
            client.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
        (upload,) = store.unfinished_uploads()
        assert store.upload_key(upload) == "checkpoints/1/shard" and abs(upload.age_s) < 60
        assert {upload["Key"] for upload in unfinished(s3_server)} == set(keys)
        assert abort_all(store) == 1
        assert [upload["Key"] for upload in unfinished(s3_server)] == keys[1:]
        abort_all(Store.open(f"{s3_url}/run-2"))

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
        assert abort_all(store) == 1
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
