"""Mistakes in what keeps the objects, and in what is removed."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_TESTS = "tests/orchestrator/checkpoint"
_POLICY = "orchestrator/checkpoint/policy.py"
_RETENTION = "orchestrator/checkpoint/retention.py"
_STORE = "orchestrator/checkpoint/store.py"
_LOCAL = "orchestrator/checkpoint/local_folder.py"
_PEERS = "orchestrator/checkpoint/peer_objects.py"
_PRUNING = f"{_TESTS}/test_retention.py"
_LONG = f"{_TESTS}/test_retention_of_long_runs.py"
_CREATING = f"{_TESTS}/test_store.py::TestOutcomeOfACreate"

STORAGE = (
    Mutant(
        "one checkpoint fewer stays than was promised",
        _POLICY,
        "info.ref >= stable[config.last - 1]",
        "info.ref > stable[config.last - 1]",
        f"{_TESTS}/test_policy.py::test_what_is_kept",
    ),
    Mutant(
        "what is kept for a rollback would be undone by it",
        _POLICY,
        "if info.step <= newest.step - undo_steps)",
        "if info.step < newest.step)",
        f"{_TESTS}/test_policy.py::test_what_is_kept",
    ),
    Mutant(
        "what a rollback could go back to stays the same for ever",
        _POLICY,
        "return {refuge, min((info.ref for info in stable if info.ref > refuge and not info.expired), default=refuge)}",
        "return {refuge}",
        f"{_TESTS}/test_policy.py::test_where_a_rollback_goes_back_to_moves_on_with_the_run",
    ),
    Mutant(
        "what others go for is taken for what it was",
        _RETENTION,
        "doubted = decisive(found.values(), self._config, self._undo_steps)",
        "doubted = set[CheckpointRef]()",
        f"{_LONG}::test_nothing_goes_that_a_look_at_all_of_them_would_keep",
    ),
    Mutant(
        "what is to go is taken for what it was",
        _RETENTION,
        "doubted |= {verdict.info.ref for verdict in verdicts if not verdict.keep}",
        "doubted |= set()",
        f"{_LONG}::test_nothing_goes_that_a_look_at_all_of_them_would_keep",
    ),
    Mutant(
        "nobody says how many steps a rollback may undo",
        "orchestrator/coordination/pruning.py",
        "self._keep, undo_steps=self._undo_steps)",
        "self._keep)",
        "tests/orchestrator/coordination/test_pruning.py::test_what_may_be_undone_yet_is_not_all_there_is",
    ),
    Mutant(
        "the last try of a request gets less than no time",
        "orchestrator/checkpoint/s3_requests.py",
        "min(max(_LEAST_S, self._end - time.monotonic()), self._one_s)",
        "min(self._end - time.monotonic(), self._one_s)",
        f"{_TESTS}/test_store_faults.py::TestGivenUp::test_a_pause_that_ends_behind_the_deadline",
    ),
    Mutant(
        "an unhealthy checkpoint takes the place of one that stays",
        _POLICY,
        "(info.ref for info in checkpoints if info.state is CheckpointState.STABLE), reverse",
        "(info.ref for info in checkpoints if info.manifest is not None), reverse",
        f"{_TESTS}/test_policy.py::test_what_is_kept",
    ),
    Mutant(
        "a pin holds stable checkpoints only",
        _POLICY,
        "if info.pinned is not None:",
        "if info.pinned is not None and info.state is CheckpointState.STABLE:",
        f"{_TESTS}/test_policy.py::test_what_is_kept",
    ),
    Mutant(
        "what the newest attempt is writing is litter",
        _POLICY,
        "case CheckpointState.WRITING if info.ref.attempt >= attempt:",
        "case CheckpointState.WRITING if info.ref.attempt > attempt:",
        f"{_TESTS}/test_policy.py::test_what_is_kept",
    ),
    Mutant(
        "the files go before the manifest",
        _RETENTION,
        """        store.delete(ref.manifest)  # first: see above
    for name in info.names:
        if name not in (keys.MANIFEST_NAME, last):
            store.delete(ref.file(name))
    if last == keys.EXPIRED_NAME:
""",
        """        pass
    for name in info.names:
        if name not in (keys.MANIFEST_NAME, last):
            store.delete(ref.file(name))
    if last == keys.EXPIRED_NAME:
        store.delete(ref.manifest)
""",
        f"{_PRUNING}::test_an_interrupted_removal_is_completed_at_once_by_another",
    ),
    Mutant(
        "the grace period may end while the checkpoints are looked at",
        _RETENTION,
        "self._expired_at[info.ref] + self._config.grace_s - began",
        "self._expired_at[info.ref] + self._config.grace_s - self._clock()",
        f"{_PRUNING}::test_a_pin_set_during_a_pass_that_takes_long_is_respected",
    ),
    Mutant(
        "a superseded attempt prunes",
        _RETENTION,
        "        info = verdict.info\n        check_not_superseded(self._store, attempt)\n",
        "        info = verdict.info\n",
        f"{_PRUNING}::test_a_superseded_attempt_removes_nothing",
    ),
    Mutant(
        "what is kept after all stays marked",
        _RETENTION,
        "                self._store.delete(verdict.info.ref.expired)",
        "                self._expired_at.pop(verdict.info.ref, None)",
        f"{_PRUNING}::test_a_run_with_nothing_newer_goes_on_from_an_expired_one_and_it_stays",
    ),
    Mutant(
        "a second mark counts from the first one",
        _RETENTION,
        "                self._expired_at.pop(info.ref, None)  # whatever took",
        "                pass  # whatever took",
        f"{_PRUNING}::test_a_mark_that_was_taken_away_and_set_again_counts_from_the_second_time",
    ),
    Mutant(
        "uploads of the attempt that lives are swept",
        _RETENTION,
        "ref.attempt < attempt else _UPLOAD_S",
        "ref.attempt <= attempt else _UPLOAD_S",
        f"{_TESTS}/test_litter.py::test_uploads_of_attempts_that_are_over_are_swept_after_the_grace_period",
    ),
    Mutant(
        "the place of what was never committed is free again",
        _RETENTION,
        "        last = keys.MANIFEST_NAME  # holds no manifest, and stays",
        "        store.delete(ref.manifest)",
        f"{_PRUNING}::test_what_a_dead_attempt_never_committed_goes_but_its_place_stays_taken",
    ),
    Mutant(
        "an unknown outcome is a failure",
        _STORE,
        "            raise self._unknown(key, unclear)\n        raise StorageError(f",
        "            raise StorageError(unclear.line)\n        raise StorageError(f",
        _CREATING,
    ),
    Mutant(
        "an answer that got lost is a failure",
        _STORE,
        "                if self._holds(key, data, failure, end):\n                    return None\n",
        "",
        _CREATING,
    ),
    Mutant(
        "whatever lies under a key, it is ours",
        _STORE,
        "        if held != data:",
        "        if not held:",
        f"{_TESTS}/test_store.py::TestContract::test_create_fails_on_other_bytes_and_keeps_the_first[local]",
    ),
    Mutant(
        "without conditions nobody looks a second time",
        _STORE,
        "        time.sleep(_SETTLE_S)\n        if not self._holds(",
        "        time.sleep(_SETTLE_S)\n        if not self.exists(key) and not self._holds(",
        f"{_TESTS}/test_probe.py::test_then_who_was_overwritten_meanwhile_learns_it",
    ),
    Mutant(
        "creating a file replaces one that is there",
        _LOCAL,
        "os.link(temporary, path)",
        "os.replace(temporary, path)",
        f"{_TESTS}/test_store.py::TestContract::test_create_fails_on_other_bytes_and_keeps_the_first[local]",
    ),
    Mutant(
        "a file is named before it is on the disk",
        _LOCAL,
        "            os.fsync(file.fileno())\n",
        "",
        f"{_TESTS}/test_store.py::TestLocal::test_a_write_that_breaks_leaves_the_old_object_and_no_litter",
    ),
    Mutant(
        "one node keeps a shard",
        _PEERS,
        "if copies == _COPIES:",
        "if copies:",
        "tests/orchestrator/test_peer_tier.py::"
        "test_the_loss_of_any_one_node_costs_nothing_and_reads_nothing_from_storage",
    ),
    Mutant(
        "a node that comes late lets a key be taken twice",
        _PEERS,
        'if any(size is not None for size in self._all("size", path)):',
        'if any(size is not None for size in self._all("size", path)[:1]):',
        "tests/orchestrator/test_peer_tier.py::TestStore::test_a_node_that_comes_late_and_empty_takes_no_key_twice",
    ),
    Mutant(
        "memory that is being read is filled anew",
        "orchestrator/checkpoint/read_ahead.py",
        "buffers[index % at_once]",
        "buffers[index % max(1, at_once - 1)]",
        f"{_TESTS}/test_read_ahead.py",
    ),
    Mutant(
        "the parts of an upload are put together in another order",
        "orchestrator/checkpoint/s3_objects.py",
        "for number, piece in enumerate(pieces, 1)]\n        if failures:",
        "for number, piece in enumerate(reversed(pieces), 1)]\n        if failures:",
        f"{_TESTS}/test_store.py::TestContract::test_parts_larger_than_one_piece_arrive_in_order[s3]",
    ),
    Mutant(
        "a conflict is certain to have done nothing",
        "orchestrator/checkpoint/storage_failures.py",
        "_UNCERTAIN_STATUS = {408, 409}",
        "_UNCERTAIN_STATUS = {408}",
        f"{_TESTS}/test_storage_failures.py::test_what_an_error_means",
    ),
)
