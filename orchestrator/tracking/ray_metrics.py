"""Metrics for operators, on the Prometheus endpoint that every Ray node has.

Ray puts `ray_` before each name, and `_total` behind counters. deploy/grafana/unbroken.json shows them.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from orchestrator.messages.attempts import Event
from orchestrator.tracking.rows import Rows

_SAVE_BOUNDARIES_S = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]


class RayMetrics:
    """Lives in the driver, which Ray must know (`ray.init`)."""

    def __init__(self, run: str, global_batch_size: int) -> None:
        tags = {"tag_keys": ("run",)}
        self._steps = Counter("unbroken_steps", "Steps computed, repeated ones included.", **tags)
        self._step = Gauge("unbroken_step", "The newest completed step.", **tags)
        self._rate = Gauge("unbroken_samples_per_second", "Samples trained a second, by the newest step.", **tags)
        self._restarts = Gauge("unbroken_restarts", "Attempts of the run after its first one.", **tags)
        self._save_s = Histogram(
            "unbroken_save_seconds",
            "From the end of a step to the commit of its checkpoint.",
            boundaries=_SAVE_BOUNDARIES_S,
            **tags,
        )
        self._save_failures = Counter("unbroken_save_failures", "Checkpoints that could not be stored.", **tags)
        self._lag = Gauge("unbroken_stable_lag_steps", "Steps that a failure now would repeat.", **tags)
        self._goodput = Gauge("unbroken_goodput", "Productive part of the time since the driver's start.", **tags)
        progress = (self._steps, self._step, self._rate, self._lag, self._goodput)
        for metric in (*progress, self._restarts, self._save_s, self._save_failures):
            metric.set_default_tags({"run": run})
        self._rows = Rows(global_batch_size)
        self._stable = 0
        self._reached = 0
        self._ended: dict[int, float] = {}

    def take(self, event: Event) -> None:
        row, fields = self._rows.take(event), event.fields
        match event.kind:
            case "attempt":
                self._restarts.set(fields["attempt"] - 1)
                self._ended.clear()
            case "training":
                self._stable = self._reached = fields["step"]
                self._show_progress()
            case "step":
                self._steps.inc()
                self._reached = fields["step"]
                self._ended[self._reached] = event.time_s
                self._show_progress()
                if row and (rate := row.values.get("run/samples_per_s")) is not None:
                    self._rate.set(rate)
                if row and (goodput := row.values.get("run/goodput")) is not None:
                    self._goodput.set(goodput)
            case "saved" if fields.get("tier", "storage") == "storage":
                self._stable = fields["step"]
                if (ended := self._ended.get(self._stable)) is not None:
                    self._save_s.observe(max(0.0, event.time_s - ended))
                self._ended = {step: at for step, at in self._ended.items() if step > self._stable}
                self._show_progress()
            case "save_failed":
                self._save_failures.inc()

    def close(self) -> None:
        pass  # the values go when the process does

    def _show_progress(self) -> None:
        self._step.set(self._reached)
        self._lag.set(max(0, self._reached - self._stable))
