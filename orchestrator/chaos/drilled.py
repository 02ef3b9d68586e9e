"""`unbroken train`, as a drill runs it: its events as JSON lines instead of text.

python -m orchestrator.chaos.drilled FD CONFIG [MODULE ...]: the lines go to that file descriptor; every trainer imports
the modules.
"""

from __future__ import annotations

import json
import os
import sys

from orchestrator import driver
from orchestrator.cli import describe
from orchestrator.config import load_config
from orchestrator.interrupts import leave
from orchestrator.messages.attempts import Event


def main(handle: str, config: str, *preload: str) -> int:
    """Train; returns the exit code that `unbroken train` would have."""
    os.set_inheritable(int(handle), False)  # what this starts must not keep it open
    lines = os.fdopen(int(handle), "w")

    def show(event: Event) -> None:
        print(json.dumps([event.kind, event.time_s, dict(event.fields)], default=str), file=lines, flush=True)

    try:
        driver.run(load_config(config, ()), show, preload)
    except Exception as error:
        line, code = describe(error)
        print(f"error: {line}", file=sys.stderr)
        return code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
