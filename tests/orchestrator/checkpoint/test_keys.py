from __future__ import annotations

import pytest

from orchestrator.checkpoint import keys
from orchestrator.checkpoint.keys import CheckpointRef


@pytest.mark.parametrize("attempt", [0, 7, 9999, 10000])
def test_an_attempt_survives_the_round_trip(attempt):
    folder, name = keys.attempt_key(attempt).split("/")
    assert folder == keys.ATTEMPTS and keys.parse_attempt(name) == attempt


@pytest.mark.parametrize("ref", [CheckpointRef(0, 0), CheckpointRef(12800, 7), CheckpointRef(10**14, 12345)])
def test_a_reference_survives_the_round_trip(ref):
    assert CheckpointRef.parse(str(ref)) == ref


@pytest.mark.parametrize("name", ["", "7.json", "0007.json.tmp", ".tmp-0007.json", "0007", "x0007.json"])
def test_other_files_are_no_attempts(name):
    assert keys.parse_attempt(name) is None


@pytest.mark.parametrize("name", ["", "12800-0007", "0000000012800-0007.old", "0000000012800", "manifest.json"])
def test_other_folders_are_no_checkpoints(name):
    assert CheckpointRef.parse(name) is None


def test_the_layout():
    ref = CheckpointRef(12800, 7)
    assert ref.shard(1, 4) == "checkpoints/0000000012800-0007/shard-00001-of-00004.safetensors"
    assert ref.manifest == "checkpoints/0000000012800-0007/manifest.json"
    assert ref.quarantine == "checkpoints/0000000012800-0007/quarantine.json"


def test_more_samples_then_the_later_attempt_is_newer():
    refs = [CheckpointRef(100, 2), CheckpointRef(10**13, 0), CheckpointRef(100, 10000), CheckpointRef(99, 3)]
    assert sorted(refs) == [refs[3], refs[0], refs[2], refs[1]]
