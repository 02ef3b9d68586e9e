"""The main job, start to end: `make demo`.

Trains digits on two Ray Train workers, kills one of them with SIGKILL in the middle, draws samples, exports the model,
trains the same once more undisturbed, and proves that both runs ended in the same bits. Every step is a command that
you could type yourself, and is shown before it runs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

_CONFIG = "configs/digits.yaml"
_PROCESS = re.compile(r"rank (\d+) trains in process (\d+)")
_STEP = re.compile(r"step (\d+)/(\d+) ")


def main() -> int:
    """Run the demo; its exit code is that of the first command that fails or is interrupted, or of the proof."""
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the command too, which says what it does about it
    began = time.monotonic()
    storage = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    killed, straight = storage / "killed", storage / "straight"
    commands = [
        ["train", _CONFIG, f"storage={storage}", "run.name=killed"],
        ["sample", str(killed), str(storage / "samples-ema.png"), "--weights", "ema", "--num", "60"],
        ["sample", str(killed), str(storage / "samples-raw.png"), "--weights", "raw", "--num", "60"],
        ["export", str(killed), str(storage / "export")],
        ["train", _CONFIG, f"storage={storage}", "run.name=straight"],
        ["prove", str(killed), str(straight)],
    ]
    for index, command in enumerate(commands):
        print(f"\n$ unbroken {' '.join(command)}", flush=True)
        code = _run(command, kill=index == 0)
        if code:
            return code
    print(f"\nSamples: {storage}/samples-ema.png and samples-raw.png. The model: {storage}/export.")
    print(f"Done in {time.monotonic() - began:.0f} s.")
    return 0


def _run(command: list[str], kill: bool) -> int:
    """Run one command, passing its lines on; with `kill`, end a worker when half of the steps are done."""
    unbroken = Path(sys.executable).with_name("unbroken")
    process = subprocess.Popen([unbroken, *command], stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout is not None
    victims: dict[str, int] = {}
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := _PROCESS.search(line):
            victims[found[1]] = int(found[2])
        found = _STEP.search(line)
        if kill and found and int(found[1]) >= int(found[2]) // 2:
            kill = False
            rank, pid = max(victims.items())
            print(f"\n$ kill -9 {pid}    # the trainer of rank {rank}\n", flush=True)
            os.kill(pid, signal.SIGKILL)
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
