"""The stores of a run's tiers."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.checkpoint.peer_objects import PeerRing
from orchestrator.checkpoint.store import Store
from orchestrator.errors import StorageError
from orchestrator.sections import TierName


@dataclass(frozen=True, kw_only=True)
class Stores:
    """Opened in the process that uses them."""

    storage: Store
    peer: Store | None = None
    """The memory of the nodes, if the run has such a tier and there is one."""

    @staticmethod
    def open(run_url: str, ring: PeerRing | None) -> Stores:
        return Stores(storage=Store.open(run_url), peer=ring.open() if ring and ring.peers else None)

    def of(self, tier: TierName) -> Store:
        if tier == "storage":
            return self.storage
        if self.peer is None:
            raise StorageError("there was no memory of nodes to be found when these agents began")
        return self.peer
