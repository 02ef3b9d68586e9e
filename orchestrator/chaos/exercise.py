"""A drill from end to end: two copies of a run, faults on one of them, and the scorecard."""

from __future__ import annotations

import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import FrameType

from orchestrator.chaos import namespaces
from orchestrator.chaos.drill import Drill, DrillPlan
from orchestrator.chaos.faults import NAN_POSITIONS, NODE_KINDS, Fault, FaultKind, draw, poisoned, steps_needed
from orchestrator.chaos.nodes import LocalNodes, Nodes
from orchestrator.chaos.process import DrilledProcess
from orchestrator.chaos.scores import Score, Scorecard
from orchestrator.chaos.slow_store import SlowStore
from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
from orchestrator.checkpoint.reader import verify
from orchestrator.checkpoint.store import Store
from orchestrator.config import RunConfig, run_url, to_yaml
from orchestrator.errors import UnbrokenError
from orchestrator.prove import prove
from orchestrator.tracking.config import TrackingConfig
from trainers.errors import ConfigError

_Say = Callable[[str], None]
_ENDPOINT = "AWS_ENDPOINT_URL_S3"
_POISON = "orchestrator.chaos.poison"
_NODE_S = 30.0
"""Until a node that was lost is replaced and the run has grown again, about."""


@dataclass(frozen=True, kw_only=True)
class DrillRequest:
    """What `unbroken chaos` was asked for."""

    seed: int = 0
    kinds: str | None = None
    """Kinds of fault, separated by commas; None: all that can be caused."""
    count: int | None = None
    """None: one of each kind."""
    cluster: Nodes | None = None
    """Nodes of somebody else to drill on; None: our own on this machine."""
    patience_s: float = 600.0
    """Longest time from a fault to the end of its recovery."""


def drill(config: RunConfig, request: DrillRequest, say: _Say) -> Scorecard:
    """Run the drill. Takes as long as two runs of `config`, and the recoveries.

    Args:
        say: told line by line what happens.

    Raises:
        ConfigError: unknown kinds, or too short a run.
        UnbrokenError: the undisturbed run failed, or there are no nodes to drill on.
    """
    kinds, skipped = choose_kinds(config, request)
    for kind, reason in skipped.items():
        say(f"skipped: {kind}: {reason}")
    if not kinds:
        raise ConfigError(f"none of the faults can be caused here: {'; '.join(map(str, skipped.values()))}")
    faults = draw(kinds, request.count or len(kinds), request.seed, config.train.num_steps, config.max_workers)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    undisturbed, drilled = (copy_of(config, f"{role}-{stamp}") for role in ("undisturbed", "drilled"))
    say(f"undisturbed run: {run_url(undisturbed)}")
    say(f"drilled run: {run_url(drilled)}, {len(faults)} faults, seed {request.seed}")
    scores, error, left_running = _run_both(undisturbed, drilled, request, faults, say)
    same, proof = _compare(run_url(drilled), run_url(undisturbed)) if error is None else (None, error)
    num_verified, damaged = _verify(run_url(drilled))
    return Scorecard(
        seed=request.seed,
        drilled=run_url(drilled),
        undisturbed=run_url(undisturbed),
        scores=scores,
        skipped=skipped,
        same_bits=same,
        proof=proof,
        num_verified=num_verified,
        damaged=damaged,
        left_running=left_running,
    )


def _run_both(
    undisturbed: RunConfig, drilled: RunConfig, request: DrillRequest, faults: Sequence[Fault], say: _Say
) -> tuple[Sequence[Score], str | None, Sequence[int]]:
    """What became of each fault, why the drilled run did not end well, and what outlived it."""
    with ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, _terminated)
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = Path(tempfile.mkdtemp(prefix="unbroken-drill-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        kinds = {fault.kind for fault in faults}
        positions = poisoned(faults, request.seed, drilled.train.global_batch_size)
        variables = {NAN_POSITIONS: ",".join(map(str, positions))}
        slow = SlowStore(_http_endpoint(drilled)) if FaultKind.SLOW_STORE in kinds else None
        if slow is not None:
            stack.callback(slow.close)
            variables[_ENDPOINT] = slow.endpoint
        nodes = _open_nodes(drilled, request, faults, variables)
        stack.callback(nodes.close)

        def start(copy: RunConfig) -> DrilledProcess:
            path = folder / f"{copy.run.name}.yaml"
            path.write_text(to_yaml(copy), encoding="utf-8")
            preload = [_POISON] if FaultKind.NAN in kinds else []
            return DrilledProcess(path, preload, nodes.environment, path.with_suffix(".log"))

        num_workers, step_s = _train_undisturbed(start(undisturbed), say)
        if (warning := _too_short(drilled, faults, num_workers, step_s)) is not None:
            say(warning)
        plan = _plan(drilled, request, faults, num_workers)
        causing = Drill(plan, nodes, lambda: start(drilled), say, slow.slow_down if slow else None)
        scores, error = causing.run()
        left_running = causing.left_running() if request.cluster is None else []
        return scores, error, left_running


def _plan(config: RunConfig, request: DrillRequest, faults: Sequence[Fault], num_workers: int) -> DrillPlan:
    return DrillPlan(
        faults=faults,
        run_url=run_url(config),
        num_workers=num_workers,
        patience_s=request.patience_s,
        sizes=(config.min_workers, config.max_workers),
    )


def choose_kinds(config: RunConfig, request: DrillRequest) -> tuple[list[FaultKind], dict[FaultKind, str]]:
    """The kinds that can be caused, and why the others cannot.

    Raises:
        ConfigError: there is no such kind.
    """
    known = ", ".join(FaultKind)
    try:
        named = [FaultKind(word.strip()) for word in request.kinds.split(",")] if request.kinds is not None else None
    except ValueError as error:
        raise ConfigError(f"--faults={request.kinds}: {error}; the kinds are {known}") from None
    skipped: dict[FaultKind, str] = {}
    for kind in named or list(FaultKind):
        if (reason := _obstacle(kind, config, request, named is not None)) is not None:
            skipped[kind] = reason
    return [kind for kind in dict.fromkeys(named or list(FaultKind)) if kind not in skipped], skipped


def _obstacle(kind: FaultKind, config: RunConfig, request: DrillRequest, named: bool) -> str | None:
    """Why a kind cannot be caused here; None: it can."""
    if request.cluster is not None:
        if kind is FaultKind.PARTITION:
            return "the network of a cluster that is yours is not touched"
        if kind in (FaultKind.NAN, FaultKind.SLOW_STORE, FaultKind.RESIZE):
            return "it needs nodes that the drill has started itself, without --address"
        if kind in NODE_KINDS and not named:
            return f"it takes a node of your cluster; allow it with --faults {kind}"
    elif kind in NODE_KINDS and config.resources.gpu:
        return "several nodes on one machine cannot share its GPUs; drill on a cluster with --address"
    elif kind is FaultKind.RESIZE and config.min_workers == config.max_workers:
        return "the number of workers is fixed; workers={min: 1, max: 4} lets it change"
    elif kind is FaultKind.PARTITION:
        return namespaces.why_not()
    elif kind is FaultKind.SLOW_STORE and not _http_endpoint(config):
        return "the store is no S3 server at a plain http:// endpoint (AWS_ENDPOINT_URL_S3), so nothing fits in between"
    return None


def _http_endpoint(config: RunConfig) -> str:
    """Of the S3 server that holds the run, if a relay can be put before it; else empty."""
    found = os.environ.get(_ENDPOINT) or os.environ.get("AWS_ENDPOINT_URL") or ""
    return found if config.storage_url.startswith("s3") and found.startswith("http://") else ""


def copy_of(config: RunConfig, role: str) -> RunConfig:
    """The same run under another name, in the same storage, not tracked."""
    name = f"{config.run.name[:60]}-{role}"
    return replace(config, run=replace(config.run, name=name), tracking=TrackingConfig())


def _open_nodes(
    config: RunConfig, request: DrillRequest, faults: Sequence[Fault], variables: Mapping[str, str]
) -> Nodes:
    """Args: variables: of every process on nodes of our own."""
    if request.cluster is not None:
        return request.cluster
    kinds = {fault.kind for fault in faults}
    cpus = max(1, math.ceil(config.resources.cpu))
    several = any(kind in kinds for kind in NODE_KINDS)
    return LocalNodes(
        num_nodes=config.max_workers if several else 0,
        cpus=cpus if several else max(1, math.ceil(config.max_workers * config.resources.cpu)),
        variables=variables,
        namespaces=FaultKind.PARTITION in kinds,
    )


def _train_undisturbed(process: DrilledProcess, say: _Say) -> tuple[int, float]:
    """Let it run to its end. Returns the number of workers, and the seconds that a step took."""
    num_workers, began = 0, time.monotonic()
    times_s: list[float] = []
    try:
        while (event := process.events.get()) is not None:
            if event.kind == "attempt":
                num_workers = event.fields["world_size"]
            elif event.kind in ("training", "step"):
                times_s.append(event.time_s)
        if code := process.wait():
            raise UnbrokenError(f"the undisturbed run ended with exit code {code}: {process.last_words()}")
    finally:
        process.end()
    say(f"undisturbed run: done in {time.monotonic() - began:.0f} s")
    return num_workers, median([after - before for before, after in pairwise(times_s)] or [0.0])


def _too_short(config: RunConfig, faults: Sequence[Fault], num_workers: int, step_s: float) -> str | None:
    """A warning, if the run may be over before all faults are caused: fewer workers go on while nodes start."""
    if config.min_workers == config.max_workers:
        return None
    node_steps, spare = round(_NODE_S / max(step_s, 1e-3)), num_workers - config.min_workers - 1
    needed = steps_needed(faults, max(0, spare), node_steps)
    if needed <= config.train.num_steps:
        return None
    return (
        f"warning: a lost node is back after some {_NODE_S:g} s, which is {node_steps} steps of this run; until all"
        f" faults are caused it takes about {needed}, and train.num_steps={config.train.num_steps}: those that are not"
        " caused will count as failed. Give more steps, or fewer faults (--count)"
    )


def _compare(drilled: str, undisturbed: str) -> tuple[bool | None, str]:
    try:
        proof = prove(Store.open(drilled), Store.open(undisturbed))
    except UnbrokenError as error:
        return None, str(error)
    if proof.first_difference is not None:
        return False, f"first difference: {proof.first_difference}"
    checkpoints = f"{proof.num_tensors} tensors in {proof.num_checkpoints} checkpoints up to step {proof.last.step}"
    return True, f"{checkpoints}; fingerprint {proof.fingerprint}"


def _verify(run: str) -> tuple[int, list[str]]:
    """How many checkpoints are right in every byte; what is wrong with the others that a run could go on from."""
    store, num_right, damaged = Store.open(run), 0, []
    for info in list_checkpoints(store):
        if info.state in (CheckpointState.STABLE, CheckpointState.DAMAGED):
            problems = verify(store, info.ref) or ([info.detail] if info.state is CheckpointState.DAMAGED else [])
            num_right += not problems
            damaged += [f"{info.ref}: {'; '.join(problems)}"] if problems else []
    return num_right, damaged


def _terminated(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
