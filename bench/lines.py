"""What a measured program says: JSON lines, read by the `Arm` that started it."""

from __future__ import annotations

import json
import os
import time
from typing import Any


def say(kind: str, **fields: Any) -> None:
    """Print a line with the rank and the time."""
    line = {"kind": kind, "rank": int(os.environ["RANK"]), "time_s": time.time(), **fields}
    os.write(1, f"{json.dumps(line)}\n".encode())  # in one piece: the ranks share the pipe
