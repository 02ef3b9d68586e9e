"""Mistakes in what a rank saves and restores, and in the agent that keeps it."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_TESTS = "tests/orchestrator/agents"
_CHECKPOINTER = "orchestrator/agents/checkpointer.py"
_SUPERVISOR = "orchestrator/agents/supervisor.py"
_SHARD_WRITER = "orchestrator/agents/shard_writer.py"
_STATE = "trainers/state.py"
_SAVING = f"{_TESTS}/test_checkpointer.py"
_ROUND_TRIP = f"{_TESTS}/test_round_trip.py"
_AGENT = f"{_TESTS}/test_supervisor.py"

_COPY = """        rows, buffer = owned_rows(owned), self._room(size_bytes)
        if self._targets is None:
            self._targets = targets(chunks, rows, buffer)
        # One call for all: one a tensor takes a tenth longer, with numpy's arrays a quarter.
        if rows:
            torch._foreach_copy_(self._targets, rows)
"""
_TELL = """        self._pending, self._undecided = state.progress, True
        self._agent.send(
            Snapshot(
                progress=state.progress,
                chunks=chunks,
                size_bytes=size_bytes,
                scalars=state.scalars(),
                tiers=self._tiers(state.progress),
            )
        )
"""

TRAINERS = (
    Mutant(
        "a save does not wait for the one before",
        _CHECKPOINTER,
        "self._settle()  # a failed save was reported by the coordinator; this newer one takes its place",
        "self._pending = None",
        f"{_SAVING}::test_the_watchdog_hears_of_copies_and_of_waiting_for_storage",
    ),
    Mutant(
        "a snapshot is handed over before it is taken",
        _CHECKPOINTER,
        _COPY + _TELL,
        _TELL + _COPY,
        f"{_SAVING}::test_the_agent_hears_that_a_snapshot_is_gone_before_and_that_one_is_there_after_the_copy",
    ),
    Mutant(
        "the agent hears too late that its snapshot is gone",
        _CHECKPOINTER,
        "        self._agent.send(Overwriting())\n" + _COPY,
        _COPY + "        self._agent.send(Overwriting())\n",
        f"{_SAVING}::test_the_agent_hears_that_a_snapshot_is_gone_before_and_that_one_is_there_after_the_copy",
    ),
    Mutant(
        "each rank decides for itself whether to leave a save out",
        _CHECKPOINTER,
        "if not _any_rank(self._pending is not None):",
        "if self._pending is None:",
        f"{_SAVING}::test_a_save_is_left_out_if_that_of_any_rank_still_runs",
    ),
    Mutant(
        "how far training is ahead is counted without the steps to the next save",
        _CHECKPOINTER,
        "return progress.step + self._every_steps - committed.step > most",
        "return progress.step - committed.step > most",
        f"{_SAVING}::test_the_watchdog_hears_of_copies_and_of_waiting_for_storage",
    ),
    Mutant(
        "the last save of a process is kept in memory",
        _CHECKPOINTER,
        'return ("peer", "storage")',
        'return ("peer",)',
        f"{_SAVING}::test_the_save_before_a_stop_is_made_in_all_tiers_the_nearest_first",
    ),
    Mutant(
        "what a checkpoint has and the run has not is not missed",
        _CHECKPOINTER,
        "sorted(set(expected) ^ set(actual))",
        "sorted(set(actual) - set(expected))",
        f"{_SAVING}::test_tensors_that_only_one_side_has_are_named",
    ),
    Mutant(
        "the generators are not saved",
        _CHECKPOINTER,
        "        state.generators.capture()\n",
        "",
        _ROUND_TRIP,
    ),
    Mutant(
        "from storage the generators are not restored",
        _CHECKPOINTER,
        "        _check_fingerprints(fingerprints(state), expected, name)\n        state.generators.apply()\n",
        "        _check_fingerprints(fingerprints(state), expected, name)\n",
        _ROUND_TRIP,
    ),
    Mutant(
        "from memory the generators are not restored",
        _CHECKPOINTER,
        "            state.generators.apply()\n            self._pending",
        "            self._pending",
        _ROUND_TRIP,
    ),
    Mutant(
        "what was loaded from storage is not compared",
        _CHECKPOINTER,
        "        _check_fingerprints(fingerprints(state), expected, name)\n",
        "",
        _ROUND_TRIP,
    ),
    Mutant(
        "what was loaded from memory is not compared",
        _CHECKPOINTER,
        '_check_fingerprints(fingerprints(state), expected, f"the snapshot',
        '_check_fingerprints({name: int(v, 16) for name, v in expected.items()}, expected, f"the snapshot',
        _ROUND_TRIP,
    ),
    Mutant(
        "a restored run repeats its last step",
        _CHECKPOINTER,
        "        state.progress = manifest.progress",
        "        state.progress = Progress(manifest.progress.step - 1, manifest.progress.samples_seen)",
        _ROUND_TRIP,
    ),
    Mutant(
        "a restored run begins its data anew",
        _CHECKPOINTER,
        "            state.progress = memory.snapshot.progress",
        "            state.progress = Progress(memory.snapshot.progress.step)",
        _ROUND_TRIP,
    ),
    Mutant(
        "a snapshot that is still on its way is not waited for by the next trainer",
        _CHECKPOINTER,
        "self._pending = state.progress if memory.pending else None",
        "self._pending = None",
        _ROUND_TRIP,
    ),
    Mutant(
        "from memory all replicas put their rows in the same place",
        "orchestrator/agents/memory_restore.py",
        "_fill(state, local, own, start * local.spec.row_bytes)",
        "_fill(state, local, own, 0)",
        _ROUND_TRIP,
    ),
    Mutant(
        "the rows of a replica are named as those of another",
        "orchestrator/agents/snapshot_layout.py",
        "offset = local.row_offset + start",
        "offset = local.row_offset",
        f"{_TESTS}/test_snapshot_layout.py",
    ),
    Mutant(
        "an average is saved under the name of another one",
        _STATE,
        "averages[profile][parameter.name]",
        "averages[min(averages)][parameter.name]",
        _ROUND_TRIP,
    ),
    Mutant(
        "one of the optimizer's moments is forgotten",
        _STATE,
        "for moment in self.moments:",
        "for moment in self.moments[:1]:",
        _ROUND_TRIP,
    ),
    Mutant(
        "the optimizer's step is forgotten",
        _STATE,
        "        for slot in self.optimizer.state.values():\n            if",
        "        for slot in ():\n            if",
        _ROUND_TRIP,
    ),
    Mutant(
        "the number of updates is forgotten",
        _STATE,
        "            group.update(numbers)\n        self.optimizer_steps = steps\n",
        "            group.update(numbers)\n",
        _ROUND_TRIP,
    ),
    Mutant(
        "what a trainer was told to leave out is forgotten when it restores",
        _STATE,
        'self.exclusions = self.exclusions.merged(Exclusions.from_scalars(scalars["exclusions"]))',
        'self.exclusions = Exclusions.from_scalars(scalars["exclusions"])',
        _ROUND_TRIP,
    ),
    Mutant(
        "rows are fingerprinted by their place in a replica",
        _STATE,
        "partial_fingerprint(local.spec, local.row_offset + start, data)",
        "partial_fingerprint(local.spec, local.row_offset, data)",
        _ROUND_TRIP,
    ),
    Mutant(
        "Python's generator is not restored",
        "trainers/generators.py",
        "        random.setstate((3, tuple(words.tolist()), None if np.isnan(gauss) else float(gauss)))\n",
        "",
        "tests/trainers/test_generators.py",
    ),
    Mutant(
        "an average begins to count anew",
        "trainers/ema.py",
        '            self._num_updates[name] = saved["num_updates"]\n',
        "",
        "tests/trainers/test_ema.py::test_restored_midway_it_ends_in_the_same_bits",
    ),
    Mutant(
        "an upload that fails is nobody's business",
        _SHARD_WRITER,
        "                except Exception as error:  # as above; the next tier may work\n"
        "                    self._fail(job, error, tier)",
        "                except Exception:  # as above; the next tier may work\n                    continue",
        f"{_TESTS}/test_shard_writer.py::test_what_nobody_waits_for_is_not_tried_again",
    ),
    Mutant(
        "a save that nobody waits for is tried on and on",
        _SHARD_WRITER,
        'nobody waits for it any more."""\n        self._retries.end()',
        'nobody waits for it any more."""\n        self._retries = Retries(0.0)',
        f"{_TESTS}/test_shard_writer.py::test_what_nobody_waits_for_is_not_tried_again",
    ),
    Mutant(
        "a snapshot that changed in memory is stored",
        _SHARD_WRITER,
        "elif [chunk.hash for chunk in hashed.result()] != [chunk.hash for chunk in receipt.chunks]:",
        "elif len(hashed.result()) != len(receipt.chunks):",
        f"{_TESTS}/test_shard_writer.py::test_a_snapshot_that_changed_in_memory_is_not_stored_a_second_time",
    ),
    Mutant(
        "half a snapshot is offered to the next trainer",
        _SUPERVISOR,
        "            case Overwriting():\n                self._held = None",
        "            case Overwriting():\n                pass",
        f"{_AGENT}::test_a_snapshot_is_offered_when_it_is_whole_and_not_while_it_is_overwritten",
    ),
    Mutant(
        "a snapshot of a past that was given up is offered",
        _SUPERVISOR,
        "            self._held = None\n            return None",
        "            return None",
        f"{_AGENT}::test_who_begins_from_storage_forgets_what_lies_in_memory",
    ),
    Mutant(
        "a snapshot that was never committed is not stored again",
        _SUPERVISOR,
        "if pending := launch.memory != launch.committed:",
        "if pending := launch.memory == launch.committed:",
        f"{_AGENT}::test_a_snapshot_in_memory_is_stored_again_unless_it_is_committed",
    ),
    Mutant(
        "the end of any save frees the memory",
        _SUPERVISOR,
        "case SaveEnded(progress=progress) if progress == self._pending:",
        "case SaveEnded() if self._pending is not None:",
        f"{_AGENT}::test_only_the_end_of_its_own_save_is_passed_on",
    ),
    Mutant(
        "an order to end the trainer before ends this one",
        _SUPERVISOR,
        "case Kill(attempt=attempt) if attempt == self._attempt and self._pid is not None:",
        "case Kill() if self._pid is not None:",
        f"{_AGENT}::test_an_order_to_end_another_attempt_is_not_obeyed",
    ),
    Mutant(
        "the last words of a trainer are not read",
        _SUPERVISOR,
        "        while self._trainer is not None:  # its last words",
        "        while False:  # its last words",
        f"{_AGENT}::test_last_words_count_though_the_end_is_heard_before_them",
    ),
    Mutant(
        "a crash is a kill",
        "orchestrator/agents/trainer_probe.py",
        "kind = ExitKind.CRASHED if -status in _OWN_FAULT else ExitKind.KILLED",
        "kind = ExitKind.KILLED",
        f"{_AGENT}::test_how_a_trainer_ended_that_left_no_word",
    ),
)
