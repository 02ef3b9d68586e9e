"""Which nodes do not answer: Ray itself learns of a lost one seconds after its agents are gone, or a minute after."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_ANSWER_S = 2.0


def silent_nodes(nodes: Sequence[Mapping[str, Any]]) -> set[str]:
    """Ids of those that can not be connected to. Takes two seconds at most for 64 of them.

    Args:
        nodes: as `ray.nodes()` gives them.
    """
    with ThreadPoolExecutor(max_workers=64) as pool:
        return {node["NodeID"] for node, answers in zip(nodes, pool.map(_answers, nodes), strict=True) if not answers}


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=_ANSWER_S):
            return True
    except OSError:
        return False
