"""The relay before an S3 server."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from orchestrator.chaos.slow_store import SlowStore


class Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        host = self.headers["Host"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(host)))
        self.end_headers()
        self.wfile.write(host)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def relay() -> Iterator[SlowStore]:
    server = HTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    relay = SlowStore(f"http://127.0.0.1:{server.server_port}")
    yield relay
    relay.close()
    server.shutdown()
    thread.join()
    server.server_close()


def ask(relay: SlowStore) -> tuple[str, float]:
    begun = time.monotonic()
    with urllib.request.urlopen(relay.endpoint, timeout=60) as answer:
        return answer.read().decode(), time.monotonic() - begun


def test_it_passes_everything_on_and_holds_answers_back_while_slow(relay: SlowStore) -> None:
    host, _ = ask(relay)
    assert f"http://{host}" == relay.endpoint, "signatures are made for this address"
    relay.slow_down(0.5)
    _, took_s = ask(relay)
    assert took_s >= 0.4
    assert ask(relay)[0] == host
