"""Mistakes in what is noticed, and in what follows from it: failures, hangs, other bits, orders to stop."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_TESTS = "tests/orchestrator/coordination"
_FAILURES = "orchestrator/coordination/failures.py"
_REPLAY = "orchestrator/coordination/replay.py"
_WATCHDOG = "orchestrator/coordination/watchdog.py"
_HALTING = "orchestrator/coordination/halting.py"
_CONTROL = "orchestrator/cluster/control.py"
_CLUSTER = "tests/orchestrator/cluster"

FAILURES = (
    Mutant(
        "failures at one checkpoint are forgotten",
        _FAILURES,
        "if failure.restored_step < found[-1].restored_step:",
        "if failure.restored_step <= found[-1].restored_step:",
        f"{_TESTS}/test_failures.py::test_each_kind_has_its_own_budget",
    ),
    Mutant(
        "each budget has one more",
        _FAILURES,
        "if count >= budget:",
        "if count > budget:",
        f"{_TESTS}/test_failures.py::test_each_kind_has_its_own_budget",
    ),
    Mutant(
        "a crash loop at one step is not noticed",
        _FAILURES,
        "if failure.reached_step > history[-1].reached_step:",
        "if failure.reached_step >= history[-1].reached_step:",
        f"{_TESTS}/test_failures.py::test_decide",
    ),
    Mutant(
        "rollbacks never end",
        _FAILURES,
        "if last.exit.num_rollbacks >= config.rollbacks:",
        "if last.exit.num_rollbacks > config.rollbacks:",
        f"{_TESTS}/test_failures.py::test_decide",
    ),
    Mutant(
        "the first rank is to blame",
        _FAILURES,
        "key=lambda rank: (_BLAME.index(exits[rank].kind), rank)",
        "key=lambda rank: (rank, _BLAME.index(exits[rank].kind))",
        f"{_TESTS}/test_failures.py::test_the_cause_is_the_end_that_explains_the_others",
    ),
    Mutant(
        "the replay check compares nothing",
        _REPLAY,
        "before is None or (before.numbers == now.numbers and",
        "before is None or (len(before.numbers) == len(now.numbers) and",
        f"{_TESTS}/test_replay.py::test_a_gradient_alone_is_of_no_known_rank",
    ),
    Mutant(
        "what was recorded is not compared with what is made again",
        _REPLAY,
        "if now.numbers != then.numbers and not self._found:",
        "if now.numbers is then.numbers and not self._found:",
        f"{_TESTS}/test_replay.py::test_a_record_that_is_read_late_is_compared_with_what_was_made_meanwhile",
    ),
    Mutant(
        "numbers of other versions bind",
        "orchestrator/coordination/past.py",
        '        if row["attempt"] in alike\n        and not any(',
        "        if not any(",
        f"{_TESTS}/test_past.py",
    ),
    Mutant(
        "the watchdog learns nothing",
        _WATCHDOG,
        "            self._durations.append(self.silent_s)\n",
        "            pass\n",
        f"{_TESTS}/test_watchdog.py::test_learns_the_limit_from_the_longest_step",
    ),
    Mutant(
        "to wait for storage is to hang",
        _WATCHDOG,
        "if self._counts[Phase.STORING] or not self._running:",
        "if not self._running:",
        f"{_TESTS}/test_watchdog.py::test_saves_take_the_time_they_take",
    ),
    Mutant(
        "a pause of the machine is a silence",
        _WATCHDOG,
        "self._silent_s += min(max(0.0, now - self._now), _MAX_ADVANCE_S)",
        "self._silent_s += max(0.0, now - self._now)",
        f"{_TESTS}/test_watchdog.py::test_silence_counts_looks_not_pauses",
    ),
    Mutant(
        "an inquiry that was called off goes on",
        "orchestrator/coordination/guard.py",
        "            self._inquiry = None  # it moves again: slow, not stuck\n",
        "",
        f"{_TESTS}/test_guard.py::test_a_step_during_the_inquiry_calls_it_off",
    ),
    Mutant(
        "an order during the start is forgotten",
        _HALTING,
        "        self._training = True\n        if self.order is not None:",
        "        self._training = True\n        if self.order is None:",
        f"{_TESTS}/test_halting.py::test_an_order_during_the_start_waits_for_the_first_step",
    ),
    Mutant(
        "rank 0 goes on before the others know where to stop",
        _HALTING,
        "if len(self._told) == self._world_size - 1:",
        "if self._told or self._world_size == 1:",
        f"{_TESTS}/test_halting.py::test_rank_0_goes_on_only_when_all_others_have_been_told",
    ),
    Mutant(
        "a node that is drained is not left",
        _CONTROL,
        "sorted(set(group.values()) & set(draining))",
        "sorted(set(draining) - set(group.values()))",
        "tests/orchestrator/cluster/test_control.py::test_what_the_nodes_of_a_cluster_make_of_it",
    ),
    Mutant(
        "a node that is lost is taken for room",
        _CONTROL,
        "if self._roomy_polls >= 2:",
        "if self._roomy_polls >= 1:",
        "tests/orchestrator/cluster/test_control.py::test_what_the_nodes_of_a_cluster_make_of_it",
    ),
    Mutant(
        "a controller that dies again and again is started for ever",
        "orchestrator/driver.py",
        "deaths = deaths + 1 if step == stalled_at else 1",
        "deaths = deaths + 1 if step != stalled_at else 1",
        "tests/orchestrator/test_driver.py",
    ),
    Mutant(
        "a driver that could not hear once hears nothing any more",
        _CONTROL,
        "                continue  # whatever it was: nobody else would hear of the outcome",
        "                return",
        f"{_CLUSTER}/test_control.py::test_a_mailbox_that_fails_once_is_asked_again",
    ),
    Mutant(
        "what others use is room for more workers",
        _CONTROL,
        "room = min(count_workers(self._resources, nodes, self._max_workers), len(group) + more)",
        "room = count_workers(self._resources, nodes, self._max_workers)",
        f"{_CLUSTER}/test_control.py::test_what_somebody_else_uses_is_no_room",
    ),
    Mutant(
        "a mailbox that was started again waits for events that are lost",
        "orchestrator/cluster/mailbox.py",
        "number if self._again else 0",
        "0",
        f"{_CLUSTER}/test_mailbox.py::test_one_that_takes_the_place_of_another_goes_on_where_that_was",
    ),
    Mutant(
        "agents that begin nothing are replaced for ever",
        "orchestrator/cluster/placing.py",
        "if (num_idle := self._num_idle()) >= self._most:",
        "if (num_idle := self._num_idle()) > self._most:",
        f"{_CLUSTER}/test_placing.py::test_groups_of_agents_that_begin_nothing_are_not_replaced_for_ever",
    ),
    Mutant(
        "a warm process that is stopped before its first fork is waited for",
        "orchestrator/agents/forkserver.py",
        "            if stop.lasts_s(self.process.pid) >= STOPPED_LIMIT_S:\n                self.process.kill()",
        "            if False:\n                self.process.kill()",
        "tests/orchestrator/agents/test_forkserver.py::test_one_that_is_stopped_before_its_first_fork_is_ended",
    ),
    Mutant(
        "a worker that is to start on a drained node is waited for",
        "orchestrator/cluster/placing.py",
        "if draining and any(",
        "if False and any(",
        "tests/orchestrator/test_node_lost.py::test_a_worker_that_is_to_start_on_a_drained_node_is_not_waited_for",
    ),
    Mutant(
        "an agent waits for the rest of a message of a trainer that is stopped",
        "orchestrator/agents/heartbeat.py",
        "if pid is not None and stopped >= _GIVEN_UP_S:",
        "if False:",
        "tests/orchestrator/test_hang.py::test_stopped_in_the_middle_of_a_message",
    ),
    Mutant(
        "a stop counts from the last look before it",
        "orchestrator/agents/stop.py",
        "if before and self._seen:",
        "if self._seen:",
        "tests/orchestrator/agents/test_stop.py",
    ),
    Mutant(
        "who is at work beside a rank that is stopped is named",
        "orchestrator/coordination/blame.py",
        "elif not one_is_stopped and not _waits(stack.text):",
        "elif not _waits(stack.text):",
        "tests/orchestrator/coordination/test_blame.py",
    ),
    Mutant(
        "a trainer that is gone is listened to as long as its pipe is open",
        "orchestrator/agents/supervisor.py",
        "            if self._trainer.poll(BEAT_S):",
        "            if True:",
        "tests/orchestrator/agents/test_supervisor.py::test_a_trainer_is_gone_though_what_it_had_started_holds_its_pipe",
    ),
)
