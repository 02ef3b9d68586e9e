"""`unbroken prove`."""

from __future__ import annotations

from dataclasses import asdict

import click

from orchestrator.commands.json_output import JSON, print_json


@click.command()
@click.argument("run_a")
@click.argument("run_b")
@JSON
def prove(run_a: str, run_b: str, as_json: bool) -> int:
    """Compare two runs bit by bit.

    Exit code 0 if they are the same, else 3 and the first difference.

    Compared are the fingerprints of every tensor (weights, every EMA profile, optimizer moments) and every scalar, in
    every checkpoint that both runs have. A fingerprint depends on every bit of a tensor and not on how it was spread
    over workers, so runs with other workers or strategies compare as well.
    """
    from orchestrator.checkpoint.store import Store
    from orchestrator.prove import prove as compare

    proof = compare(Store.reach(run_a), Store.reach(run_b))
    if as_json:
        print_json({"equal": proof.equal, **asdict(proof)})
    elif proof.first_difference is None:
        replays = f", {proof.num_replays} replayed checkpoints too" if proof.num_replays else ""
        click.echo(
            f"bitwise the same: {proof.num_tensors} tensors in {proof.num_checkpoints} checkpoints up to step"
            f" {proof.last.step}{replays}; fingerprint {proof.fingerprint}"
        )
    else:
        click.echo(f"different: {proof.first_difference}")
    return 0 if proof.equal else 3
