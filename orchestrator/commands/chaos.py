"""`unbroken chaos`."""

from __future__ import annotations

import click

from orchestrator.commands.json_output import JSON, print_json


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the schedule of faults.")
@click.option("--faults", metavar="KIND,...", help="Kinds of fault. Without it: all that can be caused here.")
@click.option("--count", type=click.IntRange(1), help="Number of faults; without it one of each kind.")
@click.option("--address", help="Address of a Ray cluster to drill on, such as head:6379; without it: one of its own.")
@JSON
def chaos(
    config: str,
    overrides: tuple[str, ...],
    seed: int,
    faults: str | None,
    count: int | None,
    address: str | None,
    as_json: bool,
) -> int:
    """Cause faults on a copy of a run, and show that they make no difference.

    Two runs are made of CONFIG, beside the one that it names: <run.name>-undisturbed-..., to which nothing happens, and
    <run.name>-drilled-..., which has the faults. Which fault happens after which step to which rank is drawn from the
    seed before anything starts. In the end there is a scorecard: when each fault was noticed, after how long the next
    step was made, how many steps were lost, whether both runs are bitwise the same, whether every checkpoint that is
    left verifies, and whether a process is left running.

    Exit code 0 if every fault was noticed and recovered from and all of that is well, else 3.

    The Ray cluster is one of its own on this machine, with a node for each worker; it is ended in the end. With
    --address it is yours: then processes are killed, but nodes are lost or drained only if --faults names these kinds,
    and nobody replaces them.

    \b
      unbroken chaos configs/digits.yaml train.num_steps=200 checkpoint.every_steps=20
      unbroken chaos configs/digits.yaml --seed 7 --faults kill-worker,hang,kill-driver --count 6
      unbroken chaos configs/digits.yaml workers='{min: 1, max: 4}' --count 100 --seed 1

    \b
    Kinds: kill-worker, kill-agent, kill-node, hang, partition, slow-store, corrupt-checkpoint, nan, drain, kill-driver,
    resize. Those that cannot be caused here are listed with the reason.
    """
    from orchestrator.chaos.exercise import DrillRequest, drill
    from orchestrator.config import load_config
    from orchestrator.preflight import check_trainable

    loaded = load_config(config, overrides)
    check_trainable(loaded)
    cluster = None
    if address is not None:
        from orchestrator.chaos.cluster import ClusterNodes  # imports ray: only if this process needs it

        cluster = ClusterNodes(address)
    request = DrillRequest(seed=seed, kinds=faults, count=count, cluster=cluster)
    card = drill(loaded, request, lambda line: click.echo(line, err=as_json))
    if as_json:
        print_json(card.as_json())
    else:
        click.echo("\n".join(card.lines()))
    return 0 if card.passed else 3
