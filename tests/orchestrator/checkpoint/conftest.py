from __future__ import annotations

import uuid

import pytest

from orchestrator.checkpoint.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    """An empty store of every kind."""
    return Store.open({"local": str(tmp_path / "store"), "memory": f"memory://{uuid.uuid4().hex}"}[request.param])
