"""Mistakes in what rank 0 decides: which saves count, and from where a run goes on."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_TESTS = "tests/orchestrator/coordination"
_SAVE_ROUND = "orchestrator/coordination/save_round.py"
_COORDINATOR = "orchestrator/coordination/coordinator.py"
_OPENING = "orchestrator/coordination/opening.py"
_RESTORE_POINT = "orchestrator/coordination/restore_point.py"

COORDINATION = (
    Mutant(
        "a checkpoint is committed without the last shard",
        _SAVE_ROUND,
        "if len(receipts) < self._world_size:",
        "if len(receipts) < self._world_size - 1:",
        f"{_TESTS}/test_save_round.py::test_commits_when_every_shard_is_there",
    ),
    Mutant(
        "old checkpoints go before the new one is committed",
        _SAVE_ROUND,
        "        self._chores.commit(CommitJob(",
        "        self._chores.prune(message.attempt, message.tier)\n        self._chores.commit(CommitJob(",
        f"{_TESTS}/test_save_round.py::test_old_checkpoints_are_pruned_after_a_commit_and_only_then",
    ),
    Mutant(
        "shards of two saves are mixed",
        _SAVE_ROUND,
        "if of.progress.step > progress.step}",
        "}",
        f"{_TESTS}/test_save_round.py::test_a_shard_of_a_save_that_another_rank_failed_is_none_of_the_next",
    ),
    Mutant(
        "a save is over when it has failed in one of its tiers",
        _SAVE_ROUND,
        "        if result.last:",
        "        if result.last or error is not None:",
        f"{_TESTS}/test_save_round.py::test_a_tier_that_fails_ends_no_save_that_another_one_follows",
    ),
    Mutant(
        "a rank that is late does not hear that its save has failed",
        _SAVE_ROUND,
        "            if self.ended is not None:\n                self._send(rank, self.ended)\n",
        "",
        f"{_TESTS}/test_save_round.py::test_a_rank_that_takes_its_snapshot_after_the_save_has_failed_is_told_too",
    ),
    Mutant(
        "a checkpoint has the numbers of another step",
        _SAVE_ROUND,
        "        if progress != receipt.progress:\n            metrics, reason = {}, None\n",
        "",
        f"{_TESTS}/test_save_round.py",
    ),
    Mutant(
        "after one bad step a checkpoint is healthy",
        _SAVE_ROUND,
        "if num_bad == 0 or final:",
        "if num_bad <= 1 or final:",
        f"{_TESTS}/test_save_round.py",
    ),
    Mutant(
        "a commit of unknown outcome is not tried again",
        "orchestrator/coordination/committing.py",
        "again = (StorageError, UnknownOutcomeError)",
        "again = (StorageError,)",
        f"{_TESTS}/test_opening.py::test_a_commit_is_tried_again_and_looks_first",
    ),
    Mutant(
        "a commit that failed is said to have succeeded",
        "orchestrator/coordination/committing.py",
        "return replace(ended, error=str(error) if isinstance(error, UnbrokenError) else repr(error))",
        "return ended",
        f"{_TESTS}/test_committing.py",
    ),
    Mutant(
        "a stale rendezvous is passed on",
        _COORDINATOR,
        "case FromTrainer(attempt=attempt, message=inner) if attempt == self._attempt and not self._stopping:",
        "case FromTrainer(message=inner) if not self._stopping:",
        f"{_TESTS}/test_coordinator.py::test_messages_of_an_earlier_attempt_count_for_nothing",
    ),
    Mutant(
        "shards of an earlier attempt count",
        _COORDINATOR,
        "case Receipt() | SaveFailed() | CommitEnded() if message.attempt == self._attempt:",
        "case Receipt() | SaveFailed() | CommitEnded():",
        f"{_TESTS}/test_save_round.py::test_a_shard_of_an_earlier_attempt_is_none_of_this_one",
    ),
    Mutant(
        "the next attempt begins while trainers of this one live",
        _COORDINATOR,
        "        if len(self._down) == self._world_size:\n            self._decide()",
        "        if self._down:\n            self._decide()",
        f"{_TESTS}/test_coordinator.py::test_a_failed_save_of_one_rank_counts_no_second_failure",
    ),
    Mutant(
        "who is superseded goes on",
        _COORDINATOR,
        "elif message.superseded and self._opener.claimed == message.attempt:",
        "elif message.superseded and self._opener.claimed < message.attempt:",
        f"{_TESTS}/test_coordinator.py::test_a_superseded_attempt_stops_at_its_commit",
    ),
    Mutant(
        "ranks begin from snapshots of different steps",
        _COORDINATOR,
        "decision.action is Action.RESTART and len(held) == 1 else None",
        "decision.action is Action.RESTART else None",
        f"{_TESTS}/test_opening.py::test_memory_is_not_used_unless_all_hold_the_same",
    ),
    Mutant(
        "memory that a trainer refused is offered again",
        _COORDINATOR,
        "if decision.action is Action.RESTART and len(held) == 1 else",
        "if len(held) == 1 else",
        f"{_TESTS}/test_opening.py::test_memory_that_a_trainer_refuses_is_not_offered_again",
    ),
    Mutant(
        "a stop that meets a death loses the snapshot",
        _COORDINATOR,
        "        elif self._guard.halt.order is not None:\n            self._after_save(self._end_halted)",
        "        elif self._guard.halt.order is not None:\n            self._end_halted()",
        f"{_TESTS}/test_opening.py::test_a_run_whose_trainers_die_on_the_way_to_a_stop_stores_their_snapshot_first",
    ),
    Mutant(
        "memory is used although somebody else was here",
        _OPENING,
        'lambda claim: claim.get("group") == self._group)',
        "lambda claim: True)",
        f"{_TESTS}/test_opening.py::test_a_group_that_is_superseded_takes_nothing_back",
    ),
    Mutant(
        "memory is used although storage has something newer",
        _OPENING,
        " and not self._lists_newer(remembered.progress):",
        ":",
        f"{_TESTS}/test_opening.py::test_memory_is_not_used_if_storage_lists_anything_newer",
    ),
    Mutant(
        "one group of agents more may die than was said",
        _OPENING,
        "if len(groups) >= (budget := self._spec.failures.agents):",
        "if len(groups) > (budget := self._spec.failures.agents):",
        f"{_TESTS}/test_coordinator.py::test_groups_of_agents_that_die_without_progress_end_the_run",
    ),
    Mutant(
        "each attempt is a group of agents",
        _OPENING,
        'groups.add(record.get("group", ""))',
        'groups.add(str(record["attempt"]))',
        f"{_TESTS}/test_coordinator.py::test_trainers_that_die_often_are_no_groups_of_agents",
    ),
    Mutant(
        "trainers are not told what to leave out",
        _OPENING,
        "            exclusions=exclusions,\n            every_steps=every_steps,",
        "            every_steps=every_steps,",
        f"{_TESTS}/test_opening.py::"
        "test_after_a_divergence_memory_is_not_used_and_its_snapshot_counts_as_any_checkpoint",
    ),
    Mutant(
        "a rollback goes back into the trouble",
        _RESTORE_POINT,
        "if info.step >= first and",
        "if info.step > last and",
        f"{_TESTS}/test_restore_point.py",
    ),
    Mutant(
        "a rollback keeps the first of the steps that it undoes",
        _RESTORE_POINT,
        "if info.step >= first and",
        "if info.step > first and",
        f"{_TESTS}/test_restore_point.py",
    ),
    Mutant(
        "what earlier lives left out is forgotten",
        "orchestrator/coordination/casebook.py",
        "self.exclusions = self.exclusions.merged(Exclusions.from_scalars(",
        "self.exclusions.merged(Exclusions.from_scalars(",
        f"{_TESTS}/test_casebook.py",
    ),
    Mutant(
        "storage that was away once has no patience left",
        "orchestrator/coordination/next_launch.py",
        "    def succeeded(self) -> None:\n        self._retries = None",
        "    def succeeded(self) -> None:\n        self._at = None",
        f"{_TESTS}/test_next_launch.py",
    ),
    Mutant(
        "a save under way when corruption is found counts as any",
        _OPENING,
        "if pending is not None and self.distrusts(pending):",
        "if pending is not None and not self._distrusted:",
        f"{_TESTS}/test_corruption.py::test_a_run_that_gives_up_while_such_a_state_is_saved_leaves_it_marked",
    ),
    Mutant(
        "corruption is forgotten when not all trainers end",
        _COORDINATOR,
        "        self._casebook.hear(down, ",
        "        if len(self._down) == self._world_size:\n            self._casebook.hear(down, ",
        f"{_TESTS}/test_corruption.py::test_the_first_to_find_it_is_enough_if_the_others_never_end",
    ),
)
