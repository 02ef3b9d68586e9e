from __future__ import annotations

import uuid

import pytest

from orchestrator.checkpoint import s3_objects
from orchestrator.checkpoint.store import Store


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    """An empty store that costs no network."""
    return Store.open({"local": str(tmp_path / "store"), "memory": f"memory://{uuid.uuid4().hex}"}[request.param])


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def any_store(request, tmp_path):
    """An empty store of every kind."""
    if request.param == "s3":
        return Store.open(request.getfixturevalue("s3_url"))
    return Store.open({"local": str(tmp_path / "store"), "memory": f"memory://{uuid.uuid4().hex}"}[request.param])


@pytest.fixture
def parts_of_5_mb(monkeypatch):
    monkeypatch.setattr(s3_objects, "PART_BYTES", 5 << 20)  # the smallest that S3 takes
