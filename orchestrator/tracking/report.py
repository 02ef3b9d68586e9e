"""`unbroken report`: one page about a run, with everything in it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from html import escape

from orchestrator.checkpoint.catalog import CheckpointInfo
from orchestrator.checkpoint.keys import CONFIG, SAMPLES
from orchestrator.checkpoint.store import Store
from orchestrator.errors import MissingObjectError
from orchestrator.tracking.charts import line_chart, shares, timeline
from orchestrator.tracking.goodput import Bucket, Span
from orchestrator.tracking.overview import Overview, State
from orchestrator.tracking.page import cards, folded, frame, paragraph, section, table
from orchestrator.tracking.record import of_the_owner
from orchestrator.tracking.telling import told

MOST_CHECKPOINTS = 100
_CURVE_POINTS = 500
_MOST_RECOVERIES = 50
_MOST_EVENTS = 200
_MOST_IMAGES = 12
_MOST_VALIDATIONS = 12
_MOST_IMAGE_BYTES = 2 << 20
_TYPES = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif"}


def page(seen: Overview, store: Store) -> str:
    """The HTML of a report.

    Args:
        seen: with the losses of all steps.
        store: the run's, for config and samples.

    Raises:
        StorageError: the store could not be read.
    """
    name = seen.run.config.get("run", {}).get("name") or seen.url
    return frame(
        f"{name}: {seen.state}",
        [
            *_heading(seen, name),
            _loss(seen),
            _validation(seen),
            *_time(seen),
            _recoveries(seen),
            _checkpoints(seen),
            _samples(store),
            _events(seen),
            _environment(seen),
            section("Config", folded("config.yaml", _config(seen, store))),
        ],
    )


def _heading(seen: Overview, name: str) -> Iterator[str]:
    goodput, rate = seen.goodput, seen.steps_per_s
    yield f"<h1>{escape(name)}</h1>"
    sign = "" if seen.since_s is None else f"; last sign of life {_clock(seen.since_s)}"
    yield paragraph(f"{seen.url}; run {seen.run.run_id}{sign}; this page: {_clock(time.time())}", "note")
    if seen.why:
        yield paragraph(seen.why, "why")
    for line in seen.damaged:
        yield paragraph(line, "why")
    facts = [
        ("state", str(seen.state)),
        (f"of {seen.num_steps:,} steps", f"{seen.step:,}"),
        ("goodput", "-" if goodput.share is None else f"{goodput.share:.1%}"),
        ("wall time", _duration(goodput.wall_s)),
        ("attempts", f"{goodput.attempts:,}"),
        ("restarts", f"{len(goodput.recoveries):,}"),
        ("lost steps", f"{goodput.lost_steps:,}"),
        ("samples/s, at last", "-" if rate is None else f"{rate * seen.global_batch_size:,.0f}"),
    ]
    if seen.state is State.TRAINING and seen.eta_s is not None:
        facts.append(("to go", _duration(seen.eta_s)))
    yield cards(facts)


def _loss(seen: Overview) -> str:
    losses = seen.losses
    if losses.newest is None:
        none = "No step has a finite loss." if losses.num_steps else "No step is recorded yet."
        return section("Loss", paragraph(none))
    redone = [
        (
            recovery.to_step,
            recovery.from_step,
            f"{recovery.cause} after step {recovery.from_step}; attempt {recovery.attempt} went on from step"
            f" {recovery.to_step}",
        )
        for recovery in seen.goodput.recoveries
    ]
    step, loss = losses.newest
    last = f"{loss:.4g} at step {step:,}"  # a point of the curve is the mean of several steps
    missing = losses.last_step - losses.first_step + 1 - losses.num_steps
    gaps = f"; {missing:,} steps are not in the record" if missing else ""
    gaps += f"; {losses.num_without:,} steps have no finite loss" if losses.num_without else ""
    restarts = "; dashed: a failure; shaded: steps that were done again" if redone else ""
    return section(
        "Loss", line_chart(losses.points(_CURVE_POINTS), redone), paragraph(f"{last}{restarts}{gaps}", "note")
    )


def _validation(seen: Overview) -> str:
    by_step = {e.fields["step"]: e.fields["metrics"] for e in of_the_owner(seen.events) if e.kind == "validation"}
    if not by_step:
        return ""
    names, steps = sorted({name for metrics in by_step.values() for name in metrics}), sorted(by_step)
    count = min(_MOST_VALIDATIONS, len(steps))
    chosen = [steps[round(index * (len(steps) - 1) / max(1, count - 1))] for index in range(count)]
    rows = [
        (f"{step:,}", *("-" if (value := by_step[step].get(name)) is None else f"{value:.4g}" for name in names))
        for step in chosen
    ]
    more = paragraph(f"{count} of {len(steps)}, evenly spaced", "note") if len(steps) > count else ""
    return section("Validation", table(("step#", *(f"{name}#" for name in names)), rows), more)


def _time(seen: Overview) -> Iterator[str]:
    goodput = seen.goodput
    if goodput.share is None:
        return
    claims = [event.time_s for event in of_the_owner(seen.events) if event.kind == "attempt"]
    ends = [*claims[1:], goodput.end_s]
    attempts = [Span(begin_s=a, end_s=b, bucket=Bucket.PRODUCTIVE) for a, b in zip(claims, ends, strict=False)]
    saves = [event.time_s for event in seen.events if event.kind == "saved"]
    restarts = [recovery.time_s for recovery in goodput.recoveries]
    between = f"{_clock(goodput.begin_s)} to {_clock(goodput.end_s)}"
    yield section("Timeline", timeline(goodput, attempts, saves, restarts), paragraph(between, "note"))
    rows = "".join(
        f'<tr><td><i class="{bucket}"></i>{bucket}</td><td class="n">{_duration(seconds)}</td>'
        f'<td class="n">{seconds / goodput.wall_s:.1%}</td><td>{_MEANINGS[bucket]}</td></tr>'
        for bucket, seconds in goodput.seconds.items()
    )
    yield section("Where the time went", shares(goodput), f'<div class="scroll"><table>{rows}</table></div>')


_MEANINGS = {
    Bucket.PRODUCTIVE: "steps whose result is in the run",
    Bucket.STALL: "training waited for a save",
    Bucket.EVALUATE: "training drew samples or validated",
    Bucket.LOST: "steps that had to be done again",
    Bucket.DETECT: "until a failure was noticed",
    Bucket.RESTART: "from there until the state was restored",
    Bucket.START: "from the start of a driver until training",
    Bucket.DOWN: "no driver",
}


def _recoveries(seen: Overview) -> str:
    recoveries = seen.goodput.recoveries
    if not recoveries:
        return ""
    rows = [
        (
            recovery.cause,  # what matters most comes first: a phone shows no more without scrolling
            f"{recovery.lost_steps:,}",
            f"{recovery.seconds:.2f}",
            f"{recovery.from_step:,}",
            f"{recovery.to_step:,}",
            _clock(recovery.time_s),
        )
        for recovery in reversed(recoveries[-_MOST_RECOVERIES:])
    ]
    more = len(recoveries) - len(rows)
    return section(
        "Restarts",
        table(("cause", "lost steps#", "seconds#", "reached#", "went on from#", "last step at_"), rows),
        paragraph(f"and {more:,} earlier ones" if more else "seconds: last step before to first step after", "note"),
    )


def _checkpoints(seen: Overview) -> str:
    if not seen.num_checkpoints:
        return section("Checkpoints", paragraph("None yet."))
    newest = seen.newest_stable
    stable = f"newest stable: step {newest.step:,}" if newest else "none is stable"
    more = seen.num_checkpoints - len(seen.checkpoints)
    rest = f"; {more:,} older ones are not shown" if more > 0 else ""
    columns = ("step", "state", "checkpoint_", "MB#", "workers#", "made_")
    return section("Checkpoints", table(columns, map(_cells, seen.checkpoints)), paragraph(f"{stable}{rest}", "note"))


def _cells(info: CheckpointInfo) -> tuple[str, ...]:
    pin = "" if info.pinned is None else f", pinned: {info.pinned}"
    state = f"{info.state}{pin}{': ' if info.detail else ''}{info.detail}"
    manifest = info.manifest
    if manifest is None:
        return "-", state, str(info.ref), "-", "-", "-"
    size_mb = sum(file.size_bytes for file in manifest.files) / 1e6
    made = manifest.created_at
    return f"{info.step:,}", state, str(info.ref), f"{size_mb:,.1f}", str(manifest.world_size), made


def _samples(store: Store) -> str:
    keys = list(_image_keys(store))
    if not keys:
        return ""
    count = min(_MOST_IMAGES, len(keys))
    chosen = [keys[round(index * (len(keys) - 1) / max(1, count - 1))] for index in range(count)]
    figures = []
    for key in chosen:
        try:
            data = store.read(key, 0, _MOST_IMAGE_BYTES + 1)
        except MissingObjectError:
            continue
        name = escape(key.removeprefix(f"{SAMPLES}/"))
        if len(data) > _MOST_IMAGE_BYTES:
            figures.append(f"<figure><figcaption>{name}: too large for this page</figcaption></figure>")
            continue
        content = base64.b64encode(data).decode()
        source = f"data:{_TYPES[key.rsplit('.', 1)[1].lower()]};base64,{content}"
        figures.append(f'<figure><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>')
    more = paragraph(f"{count} of {len(keys)}, evenly spaced", "note") if len(keys) > count else ""
    return section("Samples", f'<div class="samples">{"".join(figures)}</div>', more)


def _image_keys(store: Store) -> Iterator[str]:
    for name in store.list(SAMPLES):
        inner = [name] if _is_image(name) else [f"{name}/{part}" for part in store.list(f"{SAMPLES}/{name}")]
        yield from (f"{SAMPLES}/{path}" for path in inner if _is_image(path))


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in _TYPES  # a profile may be called 0.999


def _events(seen: Overview) -> str:
    lines = list(told(seen.events, seen.num_steps, seen.global_batch_size))
    shown = "\n".join(f"{_clock(time_s)}  {line}" for time_s, line in lines[-_MOST_EVENTS:])
    return section("Events", folded(f"the last {min(len(lines), _MOST_EVENTS)} of {len(lines):,}", shown))


def _environment(seen: Overview) -> str:
    """Of the newest start."""
    facts = [("run", seen.run.run_id), ("created", seen.run.created_at)]
    started = next((event.fields for event in reversed(seen.events) if event.kind == "started"), {})
    facts += [(name, str(started[name])) for name in ("host", "system") if name in started]
    facts += [("workers", json.dumps(started.get("workers")))]
    facts += [(name, str(version)) for name, version in started.get("versions", {}).items()]
    return section("Environment", table(("of the newest start", ""), facts))


def _config(seen: Overview, store: Store) -> str:
    try:
        return store.read(CONFIG).decode(errors="replace")
    except MissingObjectError:
        return json.dumps(seen.run.config, indent=2, ensure_ascii=False)


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
