"""The one door to W&B: one run over all attempts, every step once, whatever was killed in between.

The sink is fed with the whole journal, from its first event, and finds out by itself what W&B has already: online the
server says at which step the run goes on, offline the local logs of earlier processes tell it. What W&B has is not
logged again, what it lacks is; so a killed process loses nothing. A row stays open until the next step, so that samples
and validation of a step join it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import wandb
from wandb.proto import wandb_internal_pb2
from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
from wandb.sdk.lib.paths import LogicalPath

from orchestrator.checkpoint.keys import CheckpointRef
from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError
from orchestrator.messages.attempts import Event
from orchestrator.tracking import wandb_files
from orchestrator.tracking.media import load_image
from orchestrator.tracking.rows import Row, Rows

Mode = Literal["online", "offline"]
WandbError = wandb.Error

_FINISH_TIMEOUT_S = 60
_STOPPED = 143  # the exit code of a run that was ended before its last step and can go on
_ALERTS = {
    # kind of event -> title (at most 64 characters), level
    "storage_trouble": ("storage does not answer", "WARN"),
    "save_failed": ("a checkpoint could not be stored", "WARN"),
    "quarantined": ("a checkpoint is damaged", "WARN"),
    "corrupted": ("a memory or a processor is faulty", "ERROR"),
}
_DIVERGED = ("not finite", "diverged")


def hide_replaced_logs(folder: Path, run_id: str) -> None:
    """Mark the offline logs of a run as uploaded, as `wandb sync` does: the server gets their rows from the journal."""
    for path in wandb_files.logs(folder / "wandb", run_id):
        if path.parent.name.startswith("offline-"):
            path.with_name(f"{path.name}.synced").touch()


def newest_logged_step(folder: Path, run_id: str) -> int:
    """The last step in the local logs of a run, 0 if there is none."""
    for path in wandb_files.logs(folder / "wandb", run_id):
        for read in (wandb_files.last_records, wandb_files.records):
            parsed = map(_parse, read(path))
            newest = max((record.history.step.num for record in parsed if record.HasField("history")), default=None)
            if newest is not None:
                return newest
    return 0


class WandbSink:
    """Not to be used from several threads."""

    def __init__(self, opened: Event, folder: Path, mode: Mode, say: Callable[[str], None]) -> None:
        """Open the run. Takes up to `init_timeout_s`.

        Args:
            opened: the driver's introduction.
            folder: where W&B may write.
            say: takes a line for the user.

        Raises:
            wandb.Error: W&B cannot be reached, or refuses the key.
        """
        self._about = opened.fields
        self._config = opened.fields["tracking"]["wandb"]
        self._folder = folder
        self._mode: Mode = mode
        self._say = say
        for name in ("cache", "data", "config"):  # not in the home folder, unless the user says so
            os.environ.setdefault(f"WANDB_{name.upper()}_DIR", str(folder / "wandb" / name))
        self._run = self._open(resume="allow")
        # Online the server counts; offline nobody but the files knows what a killed process had written.
        known = self._run.starting_step - 1 if mode == "online" else newest_logged_step(folder, self._about["run_id"])
        self._logged = self._known = max(0, known)
        self._num_logged = 0
        self._open_step: int | None = None
        self._fresh = self._logged == 0
        """Whether what comes is newer than what W&B has."""
        self._live = False
        self._rows = Rows(self._about["config"]["train"]["global_batch_size"])
        self._pending: dict[str, Any] = {}
        self._checkpoints: dict[int, Mapping[str, Any]] = {}
        self._best: tuple[int, float] | None = None
        self._ending: str | None = None

    @property
    def num_logged(self) -> int:
        """Steps that this sink has logged."""
        return self._num_logged

    @property
    def url(self) -> str | None:
        return self._run.url

    def caught_up(self) -> None:
        """From here events are news: worth an alert."""
        self._live = True

    def take(self, event: Event) -> None:
        """Raises what wandb raises when its service is gone; a new process then goes on."""
        row = self._rows.take(event)
        if row is not None:
            self._take_row(row)
        match event.kind:
            case "opened":
                self._ending = None
            case "training" if self._config["rewind"] and self._live and event.fields["step"] < self._logged:
                self._rewind(event.fields["step"])
            case "validation":
                self._take_validation(event)
            case "samples" if self._is_new(event.fields["step"]):
                self._take_samples(event)
            case "saved" if event.fields.get("tier", "storage") == "storage":  # what is in memory has no URL
                self._checkpoints[event.fields["step"]] = event.fields
                if self._fresh or self._live:
                    self._log_artifact(event.fields["step"], ["latest", "stable"])
            case "outcome" if event.fields["ending"] != "stopped":
                self._ending = event.fields["ending"]
        if self._live:
            self._alert(event)

    def close(self) -> None:
        """Upload what is left, for a minute at most."""
        if self._pending and self._open_step is not None:
            self._run.log(self._pending, step=self._open_step)
        if self._ending is None:
            self._run.mark_preempting()
        self._run.finish(exit_code={None: _STOPPED, "finished": 0}.get(self._ending, 1))

    def _open(self, **how: Any) -> wandb.Run:
        about, config = self._about, self._config
        run = wandb.init(
            id=about["run_id"],
            project=config["project"],
            entity=config["entity"],
            group=config["group"],
            tags=list(config["tags"]) or None,
            name=about["config"]["run"]["name"],
            job_type="train",
            mode=self._mode,
            dir=str(self._folder),
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=config["init_timeout_s"],
                finish_timeout=_FINISH_TIMEOUT_S,
                x_disable_stats=True,  # of the driver's machine: they say nothing of the training
                x_transaction_log_flush_interval=0.5,  # 15 s unless set: that much less to catch up after a kill
            ),
            **how,
        )
        run.config.update(
            {**about["config"], "code": about["code"], "run_url": about["run_url"]}, allow_val_change=True
        )
        run.define_metric("validation/*", step_metric="validation/step")
        return run

    def _rewind(self, step: int) -> None:
        self._run.finish(exit_code=_STOPPED)
        try:
            self._run = self._open(resume_from=f"{self._about['run_id']}?_step={step}")
            self._logged = step
        except wandb.Error as error:
            self._say(f"W&B cannot rewind this run ({_line(error)}); repeated steps are not logged again")
            self._run = self._open(resume="allow")
        self._open_step = None

    def _take_row(self, row: Row) -> None:
        if row.step > self._logged:
            values = {**row.values, **self._pending, "_timestamp": row.time_s}
            self._run.log(values, step=row.step)
            self._pending, self._open_step, self._logged = {}, row.step, row.step
            self._num_logged += 1
        if row.step >= self._logged:
            self._fresh = True

    def _is_new(self, step: int) -> bool:
        """Whether W&B lacks what was made at this step."""
        return self._live or (self._fresh and step > self._known)

    def _join_row(self, step: int, values: dict[str, Any]) -> None:
        """Add values to the row of `step`; to the next one, if that row is not open: rows never change afterwards."""
        if step == self._open_step:
            self._run.log(values, step=step)
        else:
            self._pending |= values

    def _take_samples(self, event: Event) -> None:
        step, title = event.fields["step"], event.fields["title"]
        if (image := load_image(event.fields["path"], self._say)) is not None:
            self._join_row(step, {f"samples/{title}": wandb.Image(image, caption=f"step {step}")})

    def _take_validation(self, event: Event) -> None:
        step, metrics = event.fields["step"], event.fields["metrics"]
        if new := self._is_new(step):
            values = {f"validation/{name}": value for name, value in metrics.items()}
            self._join_row(step, {**values, "validation/step": step})
        best = self._config["best"]
        if best is None or best["metric"] not in metrics:
            return
        value = metrics[best["metric"]]
        if is_better(value, None if self._best is None else self._best[1], best["mode"]):
            self._best = (step, value)
            if new and step in self._checkpoints:
                self._log_artifact(step, [])

    def _log_artifact(self, step: int, aliases: list[str]) -> None:
        """The checkpoint of a step, by reference: nothing of it is uploaded but a summary of its manifest.

        W&B takes a second artifact with the same reference for the same version, so doing this twice is harmless.
        """
        if not self._config["artifacts"]:
            return
        saved = self._checkpoints[step]
        ref = CheckpointRef.parse(saved["checkpoint"])
        assert ref is not None
        url = f"{self._about['run_url']}/{ref.folder}"
        summary = {"step": step, "attempt": saved["attempt"], "size_bytes": saved["bytes"], "url": url}
        summary |= self._describe(ref)
        artifact = wandb.Artifact(f"{self._about['config']['run']['name']}-checkpoint", type="model", metadata=summary)
        # `add_reference` would want the cloud's client, and would walk a local folder file by file.
        uri = url if "://" in url else f"file://{url}"
        artifact.manifest.add_entry(
            ArtifactManifestEntry(path=LogicalPath(str(ref)), ref=uri, digest=uri, size=saved["bytes"])
        )
        with artifact.new_file("checkpoint.json") as file:
            json.dump(summary, file, indent=2)
        if self._best and self._best[0] == step:
            aliases = [*aliases, "best"]
        self._run.log_artifact(artifact, aliases=[*aliases, f"step-{step}"])

    def _describe(self, ref: CheckpointRef) -> dict[str, Any]:
        """What is worth knowing of the manifest; nothing, if the checkpoint is gone or cannot be read."""
        try:
            data = Store.open(self._about["run_url"]).read(ref.manifest)
            manifest = json.loads(data)
        except (UnbrokenError, ValueError):
            return {}
        kept = ("created_at", "world_size", "strategy", "config_hash", "versions", "files")
        return {"manifest_sha256": hashlib.sha256(data).hexdigest(), **{key: manifest.get(key) for key in kept}}

    def _alert(self, event: Event) -> None:
        fields, name = event.fields, self._about["config"]["run"]["name"]
        title, level = _ALERTS.get(event.kind, (None, ""))
        text = str(fields.get("message") or fields.get("error") or fields.get("reason"))
        if event.kind == "outcome" and fields["ending"] not in ("finished", "stopped"):
            title, level = f"the run ended: {fields['ending']}", "ERROR"
        elif event.kind == "failure" and fields["kind"] in _DIVERGED:
            title, level = "training diverged", "ERROR"
        if title:
            self._run.alert(title=title, text=f"{name}: {text}", level=level)


def is_better(value: float, best: float | None, mode: str) -> bool:
    """Whether `value` takes the place of `best`, if there is one: what is not finite never does."""
    if not math.isfinite(value):
        return False
    return best is None or (value < best if mode == "min" else value > best)


def _parse(data: bytes) -> Any:
    record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
    record.ParseFromString(data)
    return record


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
