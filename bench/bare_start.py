"""What a trainer that is started from nothing costs at least: `python -m bench.bare_start RANK PORT FOLDER MODULE...`.

Two of them import the modules, form a process group, and read each the shards of its rank from the folder.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

WORLD_SIZE = 2


def main(rank: str, port: str, folder: str, *modules: str) -> None:
    torch.set_num_threads(1)
    for name in modules:
        module, _, attribute = name.partition(":")
        imported = importlib.import_module(module)
        if attribute:
            getattr(imported, attribute)
    store = dist.TCPStore("127.0.0.1", int(port), WORLD_SIZE, is_master=rank == "0")
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=WORLD_SIZE)
    for file in sorted(Path(folder).glob("*.safetensors"))[int(rank) :: WORLD_SIZE]:
        load_file(file)
    dist.barrier()
    os.write(1, b"ready\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)
