from __future__ import annotations

import socket

from orchestrator.cluster.silent_nodes import silent_nodes


def test_who_can_be_connected_to_is_not_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as up, socket.create_server(("127.0.0.1", 0)) as down:
        ports = {"up": up.getsockname()[1], "down": down.getsockname()[1]}
        down.close()
        nodes = [{"NodeID": id, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": ports[id]} for id in ports]
        assert silent_nodes(nodes) == {"down"}
