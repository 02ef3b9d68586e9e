"""The measured program on our side: `python -m bench.under_ray CONFIG.json`. Prints every event as a JSON line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from bench.workload import pin
from orchestrator import driver
from orchestrator.config import RunConfig
from orchestrator.messages.attempts import Event
from trainers.decode import decode


def _show(event: Event) -> None:
    if event.kind == "trainer":
        # As the other side pins itself. The process has only its main thread yet; later ones inherit the core.
        pin(event.fields["rank"], event.fields["pid"])
    # In this order: the kind of an event wins over a field that is called kind.
    line = {**event.fields, "kind": event.kind, "time_s": event.time_s}
    os.write(1, f"{json.dumps(line)}\n".encode())  # in one piece: Ray's own output shares the pipe


if __name__ == "__main__":
    driver.run(decode(RunConfig, json.loads(Path(sys.argv[1]).read_text())), _show)
