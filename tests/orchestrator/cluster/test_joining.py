from __future__ import annotations

import pytest
import ray
from ray.exceptions import AuthenticationError

from orchestrator.cluster.joining import join
from orchestrator.errors import ClusterError


def refused(*_: object, **__: object) -> None:
    """As Ray 2.60 tells of a wrong token."""
    trace = RuntimeError("Failed to connect to GCS. Last connection error: ... ray.exceptions.AuthenticationError: ...")
    raise ConnectionError("Failed to connect to Ray cluster at head:6379") from trace


def missing(*_: object, **__: object) -> None:
    raise AuthenticationError("Token authentication is enabled but no authentication token was found")


@pytest.mark.parametrize("init", [refused, missing])
def test_a_token_that_is_missing_or_wrong(monkeypatch: pytest.MonkeyPatch, init):
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match="the Ray cluster at auto asks for its token; set RAY_AUTH_MODE=token"):
        join("auto")
