"""`unbroken train` under Ray with its storage on S3: agents and trainers find the endpoint in their environment."""

from __future__ import annotations

import os
import signal

import pytest

from orchestrator.checkpoint.catalog import newest_stable
from orchestrator.checkpoint.reader import verify
from orchestrator.checkpoint.store import Store
from tests.orchestrator.test_train import STEPS, Driver, ray_folder, write_config

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(300)]

__all__ = ["ray_folder"]  # a fixture


def test_a_run_goes_on_from_s3_after_a_kill(tmp_path, ray_folder, s3_url):
    driver = Driver(ray_folder, write_config(tmp_path), f"storage={s3_url}")
    driver.until(r"newest stable checkpoint: step \d+")
    os.kill(driver.trainers[1], signal.SIGKILL)
    goes_on = driver.until(r"goes on from step (\d+)")
    assert int(goes_on[1]) > 0
    assert driver.end() == 0
    store = Store.open(f"{s3_url}/run")
    newest = newest_stable(store)
    assert newest.manifest.progress.step == STEPS and newest.manifest.attempt == 2
    assert newest.manifest.store == {"kind": "s3", "conditional_create": True}
    assert verify(store, newest.ref) == []
    assert store.unfinished_uploads() == []
