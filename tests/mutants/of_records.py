"""Mistakes in what is told of a run: its metrics, its account of time, the proof, the scorecard of a drill."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_TESTS = "tests/orchestrator"
_TRACKING = "orchestrator/tracking"
_GOODPUT = f"{_TRACKING}/goodput.py"
_RECORD = f"{_TRACKING}/record.py"
_PROVE = "orchestrator/prove.py"

RECORDS = (
    Mutant(
        "of a replayed step the row that was undone counts",
        _RECORD,
        'if known is None or row["attempt"] > known["attempt"]:',
        'if known is None or row["attempt"] < known["attempt"]:',
        f"{_TESTS}/tracking/test_record.py::test_a_step_that_was_replayed_counts_once_and_says_which_attempt_it_is_from",
    ),
    Mutant(
        "what superseded attempts did counts",
        _RECORD,
        "elif (attempt is not None and attempt < newest) or (session in claimants and session != owner):",
        "elif attempt is not None and attempt < newest:",
        f"{_TESTS}/tracking/test_goodput.py::"
        "test_two_drivers_interleaved_the_older_one_counts_for_nothing_once_superseded",
    ),
    Mutant(
        "sinks get a step twice after a replay",
        f"{_TRACKING}/journal.py",
        'if event.fields["step"] <= self._marks.get(key, -1):',
        'if event.fields["step"] < self._marks.get(key, -1):',
        f"{_TESTS}/tracking/test_journal.py::test_repeated_steps_are_left_out",
    ),
    Mutant(
        "sinks get an event twice that was sent twice",
        f"{_TRACKING}/journal.py",
        "if session == self._session and number <= self._number:",
        "if session == self._session and number < self._number:",
        f"{_TESTS}/tracking/test_journal.py::test_what_is_sent_again_is_kept_once",
    ),
    Mutant(
        "seconds are in two buckets",
        _GOODPUT,
        "self._add(max(span.begin_s, since_s), span.end_s, bucket)",
        "self._add(span.begin_s, span.end_s, bucket)",
        f"{_TESTS}/tracking/test_goodput.py::test_a_kill_costs_the_steps_after_the_save_the_detection_and_the_restart",
    ),
    Mutant(
        "steps that had to be repeated are productive",
        _GOODPUT,
        "self._turn(mark_s, Bucket.LOST, Bucket.PRODUCTIVE, Bucket.STALL, Bucket.EVALUATE)",
        "self._turn(mark_s, Bucket.LOST, Bucket.STALL, Bucket.EVALUATE)",
        f"{_TESTS}/tracking/test_goodput.py::test_a_kill_costs_the_steps_after_the_save_the_detection_and_the_restart",
    ),
    Mutant(
        "what is merged is deleted before it is written",
        f"{_TRACKING}/merging.py",
        """            self._store.write(f"{self._folder}/{target}", [data])
            self.add(target)
        self._small[level] -= set(refs)
        for ref in present:
            self._store.delete(f"{self._folder}/{ref}")
""",
        """            for ref in present:
                self._store.delete(f"{self._folder}/{ref}")
            self._store.write(f"{self._folder}/{target}", [data])
            self.add(target)
        self._small[level] -= set(refs)
""",
        f"{_TESTS}/tracking/test_merging.py::test_two_that_merge_the_same_objects_and_die_anywhere_lose_nothing",
    ),
    Mutant(
        "what could not be recorded is forgotten",
        f"{_TRACKING}/recorder.py",
        '            self._store.write(f"{folder}/{ref}", [data])\n            del self._unwritten[0]\n',
        '            del self._unwritten[0]\n            self._store.write(f"{folder}/{ref}", [data])\n',
        f"{_TESTS}/tracking/test_recorder.py::test_an_outage_loses_nothing_and_is_said_once",
    ),
    Mutant(
        "the proof looks only at what both runs have",
        _PROVE,
        "for name in sorted(values_a.keys() | values_b.keys()):",
        "for name in sorted(values_a.keys() & values_b.keys()):",
        f"{_TESTS}/test_prove.py",
    ),
    Mutant(
        "the proof does not look at replays",
        _PROVE,
        "for pair in sorted(pairs + replays,",
        "for pair in sorted(pairs,",
        f"{_TESTS}/test_prove.py::test_a_replay_that_differs_is_found_though_the_newest_attempts_agree",
    ),
    Mutant(
        "the proof takes unhealthy checkpoints for evidence",
        _PROVE,
        "if info.state is CheckpointState.STABLE and info.manifest is not None:",
        "if info.manifest is not None:",
        f"{_TESTS}/test_prove.py::test_an_unhealthy_checkpoint_is_no_evidence",
    ),
    Mutant(
        "the proof does not know dtypes",
        _PROVE,
        'f"{entry.fingerprint} {entry.dtype} {list(entry.shape)}"',
        'f"{entry.fingerprint} {list(entry.shape)}"',
        f"{_TESTS}/test_prove.py::test_the_same_bytes_of_another_type_are_a_difference",
    ),
    Mutant(
        "a drill passes though it does not know whether the runs are the same",
        "orchestrator/chaos/scores.py",
        "return self.same_bits is True and clean",
        "return self.same_bits is not False and clean",
        f"{_TESTS}/chaos/test_scores.py::test_the_card_passes_only_with_every_fault_and_the_same_bits",
    ),
    Mutant(
        "a drill passes though processes are left behind",
        "orchestrator/chaos/scores.py",
        "clean = not self.damaged and not self.left_running",
        "clean = not self.damaged",
        f"{_TESTS}/chaos/test_scores.py::test_the_card_passes_only_with_every_fault_and_the_same_bits",
    ),
    Mutant(
        "a drill passes though a manifest is damaged",
        "orchestrator/chaos/exercise.py",
        "if info.state in (CheckpointState.STABLE, CheckpointState.DAMAGED):",
        "if info.state is CheckpointState.STABLE:",
        f"{_TESTS}/chaos/test_drill.py::test_what_is_damaged_and_still_offered_is_on_the_card",
    ),
)
