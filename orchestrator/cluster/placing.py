"""How Ray Train places a group of agents, and replaces it: on nodes that answer, waiting for none that is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import state as cluster
from ray._raylet import RAY_NODE_ID_KEY, PlacementGroupID  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from orchestrator.cluster.mailbox import Outbox
from orchestrator.cluster.silent_nodes import silent_nodes
from orchestrator.messages.attempts import Event

_ANSWER_S = 30.0
_AT_ONCE, _LONGEST_PAUSE_S = 3, 60.0
"""Groups that never began an attempt are replaced without a pause so often, then with longer and longer ones."""
_LOOK_S = 0.2
"""Between two looks for nodes, as long as there are too few."""
_DRAIN_LOOK_S = 1.0
"""Between two looks for nodes that are being drained, as long as a group is being placed."""


def live_nodes(ask: bool = False) -> dict[str, dict[str, float]]:
    """Total resources of every node that is alive and not being drained.

    Args:
        ask: without those that do not answer.
    """
    draining = cluster.get_draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    if ask:
        silent = silent_nodes(nodes)
        nodes = [node for node in nodes if node["NodeID"] not in silent]
    return {node["NodeID"]: node["Resources"] for node in nodes}


def count_workers(worker: Mapping[str, float], nodes: Mapping[str, Mapping[str, float]], most: int) -> int:
    """How many workers fit onto these nodes, up to `most`."""
    needs = {name: amount for name, amount in worker.items() if amount > 0}
    if not needs:
        return most if nodes else 0
    # The smallest amount that Ray can count is 1/10000; without it 3 * 0.1 does not fit into 0.3.
    fits = [min(int((has.get(name, 0.0) + 1e-4) / need) for name, need in needs.items()) for has in nodes.values()]
    return min(most, sum(fits))


class LiveNodesPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy on what the cluster has now.

    Ray's own looks at reservations that are renewed every 20 s, so after the loss of a node it asks for the lost
    workers again and waits for them in vain. And it resizes a running group at once, which loses the steps since the
    last checkpoint; here the driver orders growth, and the group stops at a checkpoint.
    """

    def __init__(self, scaling_config: Any) -> None:
        super().__init__(scaling_config)
        self._starts = 0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._starts += 1
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(_LOOK_S)  # the controller asks again at once: it would take half a core from a node that starts
        return decision

    def make_decision_for_running_worker_group(self, *_: Any, **__: Any) -> ScalingDecision:
        self._starts = 0
        self._maybe_send_resource_request()
        return NoopDecision()

    def _get_reserved_resources(self) -> Any:
        nodes = live_nodes(ask=True)
        if self._starts <= 1:
            return nodes
        # It did not start: somebody else may hold a part of the cluster. Take what is free.
        free = cluster.available_resources_per_node()
        return {node: resources for node, resources in free.items() if node in nodes}


class Persevering(DefaultFailurePolicy):
    """Ray Train's own policy, which replaces groups of agents as often as they die, with an end to what helps nobody.

    Who has begun an attempt is counted by that, in storage. Agents that fail before leave no trace there. It may be the
    network between them: the pauses make half an hour of the usual 30 groups.
    """

    def __init__(self, config: Any, mailbox: Any, most: int) -> None:
        """
        Args:
            mailbox: the actor handle that the groups' events go to.
            most: groups in a row that may end without having begun an attempt.
        """
        super().__init__(config)
        self._mailbox = mailbox
        self._most = most

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if isinstance(training_failed_error, WorkerGroupError):
            if (num_idle := self._num_idle()) >= self._most:
                return FailureDecision.RAISE
            if num_idle > _AT_ONCE:
                time.sleep(min(_LONGEST_PAUSE_S, 2.0 ** (num_idle - _AT_ONCE)))
        return super().make_decision(training_failed_error)

    def _num_idle(self) -> int:
        try:
            return ray.get(self._mailbox.num_idle.remote(), timeout=_ANSWER_S)
        except RayError:  # then the next time
            return 0


def why_given_up(error: Exception | None, most: int) -> str | None:
    """The reason, if `Persevering` has ended Ray Train with this error."""
    if not isinstance(error, WorkerGroupError):
        return None
    failures = error.worker_failures
    # That others have lost their connections to it says nothing.
    rank = min(failures, key=lambda rank: (isinstance(failures[rank], ConnectionError), rank))
    what = (str(failures[rank]).strip().splitlines() or [""])[0]
    return (
        f"{most} groups of agents in a row ended before they had begun an attempt (failures.agents={most}); last,"
        f" rank {rank}: {type(failures[rank]).__name__}: {what}"
    )


class Replacing(ControllerCallback, WorkerGroupCallback):
    """Keeps Ray Train from waiting for what is lost when it replaces a group, and tells how far it is."""

    def __init__(self, mailbox: Any) -> None:
        """Args: mailbox: the actor handle that takes `Event`s."""
        self._outbox = Outbox(mailbox)
        self._placed: threading.Event | None = None
        """Of the group that was placed last: it is, or will never be."""

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._tell("group_lost")
        if self._placed is not None:
            self._placed.set()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        # Each is asked to end next, and has 5 s to answer. Those on a lost node never do, and Ray takes them for alive
        # until its health checks have failed; of those that are ended here it knows.
        for worker in worker_group.get_workers():
            ray.kill(worker.actor)

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        self._tell("placing", num_workers=num_workers)
        self._placed = threading.Event()
        threading.Thread(target=_leave_drained, args=(self._placed,), daemon=True).start()
        # A lost node looks free as long as Ray takes it for alive. What is placed there waits until it does not.
        silent = silent_nodes([node for node in ray.nodes() if node["Alive"]])
        return {RAY_NODE_ID_KEY: f"!in({','.join(sorted(silent))})"} if silent else None

    def after_worker_group_start(self, worker_group: Any) -> None:
        assert self._placed is not None
        self._placed.set()
        self._tell("placed")

    def _tell(self, kind: str, /, **fields: Any) -> None:
        self._outbox.put(Event(kind=kind, fields=fields, time_s=time.time()))


def _leave_drained(placed: threading.Event) -> None:
    """Until `placed`: have a group placed anew of which a worker is to start on a node that is being drained.

    Its room there is from before the notice. Ray keeps it, and starts nothing in it until the node is gone; Ray Train
    waits for its workers without end. One that will never start is an error to it, as any that dies.
    """
    worker = ray.get_runtime_context().worker
    while not placed.wait(_DRAIN_LOOK_S):
        with suppress(RayError):  # the head is away
            draining = cluster.get_draining_nodes().keys()
            if draining and any(
                room["state"] == "CREATED" and draining & set(room["bundles_to_node_id"].values())
                for _, room in _rooms()
            ):
                for actor, known in cluster.actor_table(None, worker.current_job_id, "PENDING_CREATION").items():
                    if known["ActorClassName"] == RayTrainWorker.__name__:
                        worker.core_worker.kill_actor(ray.ActorID(bytes.fromhex(actor)), True)


def _free_what_is_left() -> None:
    """Give back the room that an earlier controller of this driver held when it died: nobody else could start in it.

    Ray does so itself only when the whole job ends. Ray Train has an actor that does it before, but that one can die
    with the controller: Ray's memory monitor ends many processes at once.
    """
    for group, _ in _rooms():
        remove_placement_group(group)


def _rooms() -> Iterator[tuple[PlacementGroup, Mapping[str, Any]]]:
    """What is reserved for groups of agents of this driver, and what Ray says of it."""
    job = ray.get_runtime_context().get_job_id()
    for name, room in placement_group_table().items():
        if name.endswith(job) and room["state"] != "REMOVED":
            yield PlacementGroup(PlacementGroupID(bytes.fromhex(name))), room


class _ByValue:
    """The train function as Ray Train wants it, and as a part of the calls that take it to the workers.

    Ray Train's own way is an object in the store of the nodes. A new worker may ask a node for it that has just been
    lost, and hears of that after 10 s.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        return self._value


class Trainer(DataParallelTrainer):
    """Ray Train with our choice of the number of workers, where that is elastic, and our way to the workers."""

    def __init__(self, train: Any, mailbox: Any, most_idle: int, **arguments: Any) -> None:
        """Args: mailbox, most_idle: as for `Persevering`."""
        super().__init__(train, **arguments)
        self._policy = Persevering(self.run_config.failure_config, mailbox, most_idle)

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        _free_what_is_left()
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = LiveNodesPolicy(self.scaling_config)
        arguments["failure_policy"] = self._policy
        arguments["train_fn_ref"] = _ByValue(arguments["train_fn_ref"].get())
        return super()._initialize_and_run_controller(**arguments)
