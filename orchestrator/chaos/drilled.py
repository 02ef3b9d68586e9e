"""`unbroken train`, as a drill runs it: its events as JSON lines instead of text.

python -m orchestrator.chaos.drilled CONFIG [MODULE ...]: the modules are imported by every trainer.
"""

from __future__ import annotations

import json
import sys

from orchestrator import driver
from orchestrator.cli import describe
from orchestrator.config import load_config
from orchestrator.interrupts import leave
from orchestrator.messages import Event


def show(event: Event) -> None:
    print(json.dumps([event.kind, event.time_s, dict(event.fields)], default=str), flush=True)


def main(config: str, *preload: str) -> int:
    """Train; returns the exit code that `unbroken train` would have."""
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
