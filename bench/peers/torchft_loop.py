"""Ray Train with torchft: `python -m bench.peers.torchft_loop CONFIG.json FOLDER LIGHTHOUSE`.

Two replicas (`torchft_replica`), with Ray Train's settings as they are. LIGHTHOUSE is JSON: settings of the server by
which torchft knows who is alive.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ray.train.v2.torch.torchft_config import TorchftConfig

from bench.peers.ray_train_loop import fit, speak


def main() -> None:
    config, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).absolute()
    lighthouse = {"min_replicas": 1, **json.loads(sys.argv[3])}
    fit(_work, config, folder, {}, TorchftConfig(lighthouse_kwargs=lighthouse, backend="gloo"))


def _work(arguments: dict[str, Any]) -> None:
    from bench.lines import say
    from bench.peers.torchft_replica import train

    speak(arguments["folder"])
    say("imported", pid=os.getpid())
    train(arguments["config"])


if __name__ == "__main__":
    main()
