"""`unbroken deploy render`."""

from __future__ import annotations

from pathlib import Path

import click

from orchestrator.commands.json_output import JSON, print_json


@click.group()
def deploy() -> None:
    """Put a run on a cluster."""


@deploy.command()
@click.argument("target")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", metavar="DIR", help="Folder for the files; it is made.  [default: deploy-<run.name>]")
@click.option("--with", "components", multiple=True, metavar="NAME", help="kuberay: add a component; may be repeated.")
@JSON
def render(
    target: str, config: str, overrides: tuple[str, ...], out: str | None, components: tuple[str, ...], as_json: bool
) -> None:
    """Write the files that put a run on a cluster, filled in from its config.

    TARGET is kuberay, aws (`ray up`), slurm, skypilot, systemd, compose, or s3 (bucket policies). Workers, resources,
    grace times and retries come from the config, its section `deploy` included, so they agree; a contradiction is
    refused. Nothing is started: each folder's files say how, and deploy/README.md what happens when something is lost.

    \b
      unbroken deploy render slurm config.yaml storage=s3://bucket/runs
      unbroken deploy render kuberay config.yaml --with spot --with s3-role --out k8s

    Components of kuberay: spot, kueue, gcs-fault-tolerance, token-auth, s3-role, s3-secret, retention, prometheus.
    Workers that may vary add the autoscaler.
    """
    from orchestrator.config import load_config
    from orchestrator.deploy.plan import COMPONENTS, TARGETS
    from orchestrator.deploy.render import render as write
    from orchestrator.preflight import check_trainable

    if target not in TARGETS:
        raise click.BadParameter(f"{target!r} is no target; give one of {', '.join(TARGETS)}", param_hint="TARGET")
    if components and target != "kuberay":
        raise click.BadParameter(
            f"{components[0]!r} is for kuberay, not for {target}; leave it out", param_hint="--with"
        )
    for name in components:
        if name not in COMPONENTS:
            known = ", ".join(COMPONENTS)
            raise click.BadParameter(f"{name!r} is no component; give some of {known}", param_hint="--with")
    loaded = load_config(config, overrides)
    check_trainable(loaded)
    folder = Path(out or f"deploy-{loaded.run.name}")
    try:
        written = [str(path) for path in write(loaded, target, folder, frozenset(components))]
    except OSError as error:
        raise click.UsageError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from None
    if as_json:
        return print_json({"out": str(folder), "files": written})
    click.echo("\n".join(written))
