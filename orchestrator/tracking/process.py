"""The tracking process: `python -m orchestrator.tracking.process`, started by `Tracker` and by itself.

It lives outside of the ranks, so a failure of the training costs it nothing, and outside of the driver's process tree:
`ray job stop` ends the driver with all its descendants, which would cut off W&B's service in the middle of an upload.
(A Ray actor would share the driver's end: Ray kills the actors of a driver that died at once.) When the driver is gone,
however it went, the end of the pipe is read after its last event, and everything is brought to an end in peace.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.messages.attempts import Event
from orchestrator.tracking.credentials import has_wandb_key
from orchestrator.tracking.journal import NAME, Journal, exclusive, follow, last_opened

LOG, WANDB_LOCK = "tracking.log", "wandb.lock"
MAX_EVENT_BYTES = 128 * 1024
_MAX_LIVES = 4
"""Times that W&B's service may die before W&B is left alone until the next start of the driver."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a life of the process begins with."""

    life: int = 0
    """How often the process has replaced itself."""
    end: int | None = None
    """The size of the journal, if the driver has no more events."""
    offline: str = ""
    """Why W&B is not tried online, if so."""


def command(descriptor: int, folder: Path, start: Start) -> list[str]:
    """What starts the process. Args: descriptor: its end of the connection; folder: for all that it writes."""
    module = "orchestrator.tracking.process"
    return [sys.executable, "-m", module, str(descriptor), str(folder), json.dumps(asdict(start))]


class TrackingProcess:
    """Receives, journals, and lets each sink follow the journal in a thread of its own."""

    def __init__(self, connection: socket.socket, folder: Path, start: Start) -> None:
        self._connection = connection
        self._start = start
        self._folder = folder
        self._path = folder / NAME
        self._end = start.end
        self._lock = threading.Lock()
        self._failed = False

    def run(self) -> None:
        """Serve until the driver is gone and every sink has what it wants."""
        journal = Journal(self._path) if self._end is None else None
        if journal is not None and self._start.life == 0:
            journal.append(self._receive())
        opened = journal.opened if journal else last_opened(self._path)
        backlog = journal.size if journal else self._end
        assert opened is not None and backlog is not None, "a driver introduces itself first"
        threads = [threading.Thread(target=self._serve, args=pair) for pair in self._sinks(opened, backlog)]
        for thread in threads:
            thread.start()
        if journal is not None:
            self._fill(journal)
        for thread in threads:
            thread.join()

    def _receive(self) -> bytes:
        """The next event; nothing, if the driver has no more."""
        while True:
            try:
                return self._connection.recv(MAX_EVENT_BYTES)
            except ConnectionResetError:
                continue  # it died with a line of ours unread; what it had sent is still there

    def _fill(self, journal: Journal) -> None:
        while data := self._receive():
            with self._lock:  # a new life must not begin between the two
                self._write(journal, data)
        with self._lock:
            self._end = journal.size
            journal.close()  # from here on the next driver's process may write

    def _write(self, journal: Journal, data: bytes) -> None:
        try:
            journal.append(data)
        except OSError as error:
            if not self._failed:
                self._say(f"tracking: cannot write {self._path}: {error.strerror}; W&B and TensorBoard miss events")
            self._failed = True

    def _sinks(self, opened: Event, backlog: int) -> Iterator[tuple[str, Callable[[], None]]]:
        tracking = opened.fields["tracking"]
        if tracking["wandb"] and tracking["wandb"]["mode"] != "disabled":
            yield "W&B", lambda: self._feed_wandb(opened, backlog)
        if tracking["tensorboard"]:
            yield "TensorBoard", lambda: self._feed_tensorboard(opened)

    def _serve(self, name: str, feed: Callable[[], None]) -> None:
        try:
            feed()
        except Exception as error:  # whatever a foreign library raises: the training must not notice
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if name == "W&B" and self._start.life + 1 < _MAX_LIVES:
                time.sleep(self._start.life)
                self._begin_anew(self._start.offline)
            self._say(
                f"tracking: {name} failed ({reason}) and is left alone, training goes on; see {self._folder / LOG}"
            )

    def _begin_anew(self, offline: str) -> None:
        """Replace this process: W&B's client leaves neither a broken service nor a failed start behind."""
        with self._lock:
            start = Start(life=self._start.life + 1, end=self._end, offline=offline)
            descriptor = self._connection.fileno()
            # Not exec: what is left of W&B's service goes on as long as this process id lives.
            subprocess.Popen(command(descriptor, self._folder, start), pass_fds=[descriptor], stdin=subprocess.DEVNULL)
            os._exit(1)

    def _feed_tensorboard(self, opened: Event) -> None:
        from orchestrator.tracking.tensorboard_sink import TensorBoardSink

        with exclusive(self._folder / "tensorboard.lock"):
            sink = TensorBoardSink(opened, self._folder / "tensorboard", self._say)
            for event, _ in follow(self._path, lambda: self._end):
                sink.take(event)
            sink.close()

    def _feed_wandb(self, opened: Event, backlog: int) -> None:
        # An earlier driver's process may still upload: two at once would mix up the run.
        with exclusive(self._folder / WANDB_LOCK):
            sink = self._open_wandb(opened)
            caught_up = False
            for event, position in follow(self._path, lambda: self._end):
                if not caught_up and position > backlog:
                    caught_up = True
                    sink.caught_up()
                sink.take(event)
            sink.close()

    def _open_wandb(self, opened: Event) -> Any:
        from orchestrator.tracking import wandb_sink

        config, folder = opened.fields["tracking"]["wandb"], self._folder
        reason = "tracking.wandb.mode=offline" if config["mode"] == "offline" else self._start.offline
        if not reason and not has_wandb_key():
            reason = "no key: set WANDB_API_KEY or run `wandb login`"
        if not reason:
            try:
                sink = wandb_sink.WandbSink(opened, folder, "online", self._say)
            except Exception as error:  # CommError, UsageError, AuthenticationError, ...
                self._begin_anew(" ".join(str(error).split()) or type(error).__name__)
                raise AssertionError("this process has ended") from error
            wandb_sink.hide_replaced_logs(folder, opened.fields["run_id"])
            self._say(f"W&B: {sink.url}")
            return sink
        sink = wandb_sink.WandbSink(opened, folder, "offline", self._say)
        if self._start.life == (1 if self._start.offline else 0):  # said once, however often W&B's service dies
            self._say(
                f"W&B: offline in {folder / 'wandb'} ({reason}); to upload it later: {opened.fields['sync_command']}"
            )
        return sink

    def _say(self, line: str) -> None:
        print(line, flush=True)
        try:
            self._connection.send(line.encode(), socket.MSG_DONTWAIT)
        except OSError:
            pass  # the driver is gone; the log has the line


def main(arguments: list[str]) -> None:
    descriptor, folder, start = int(arguments[0]), Path(arguments[1]), Start(**json.loads(arguments[2]))
    if start.life == 0 and os.fork():
        os._exit(0)  # so that the other one is nobody's descendant
    os.environ.pop("WANDB_SERVICE", None)  # the service of an earlier life, set by wandb for processes like this one
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)  # W&B's service must not keep it open
    TrackingProcess(connection, folder, start).run()
    sys.stdout.flush()
    os._exit(0)  # past the exit handlers of foreign libraries: one of them waits for a service that was killed


if __name__ == "__main__":
    main(sys.argv[1:])
