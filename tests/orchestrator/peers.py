"""Memory of nodes without Ray: servers in this process."""

from __future__ import annotations

from orchestrator.checkpoint.peer_objects import Peer, PeerRing
from orchestrator.checkpoint.peer_server import PeerServer


class Nodes:
    """Three of them; losing one is losing its memory."""

    def __init__(self) -> None:
        self.servers = {node: PeerServer("127.0.0.1", b"key") for node in ("a", "b", "c")}

    def ring(self, home: str = "a") -> PeerRing:
        peers = [Peer(node=node, host="127.0.0.1", port=server.port) for node, server in self.servers.items()]
        return PeerRing(peers=tuple(peers), key=b"key", home=home)

    def lose(self, *nodes: str) -> None:
        for node in nodes:
            self.servers.pop(node).close()
