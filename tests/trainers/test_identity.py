from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from trainers.errors import ConfigError
from trainers.identity import agreed


def ranks_have(monkeypatch: pytest.MonkeyPatch, *hashes: dict[str, str]) -> None:
    def gather(found: list[Any], mine: object) -> None:
        found[:] = hashes

    monkeypatch.setattr(dist, "get_world_size", lambda: len(hashes))
    monkeypatch.setattr(dist, "all_gather_object", gather)


def test_ranks_that_see_the_same_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"data": "1", "vae": "2"}
    ranks_have(monkeypatch, mine, dict(mine))
    assert agreed(mine) == mine


def test_a_rank_that_sees_other_files_is_named_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = {"data": "1", "vae": "2"}, {"data": "3", "vae": "2"}
    ranks_have(monkeypatch, here, here, there)
    for mine in (here, there):
        with pytest.raises(
            ConfigError, match=r'data\.path: the data of rank 2 is not .* rank 0 \(hash "3", there "1"\)'
        ):
            agreed(mine)
    ranks_have(monkeypatch, here, {"data": "1"})
    with pytest.raises(ConfigError, match=r'frozen part vae of rank 1 .*\(hash null, there "2"\); give every node'):
        agreed(here)
