"""`python -m bench [ROW ...] [--quick]`: measure, print the table, and write `bench/results/ROW.json` and the README.

`python -m bench readme`: write README and plots anew from the results that are stored. `--quick` tries the benchmarks
out on small models and keeps nothing.

Rows, in the order in which they run; all of them take about an hour:
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
import traceback

ROWS = {
    "throughput": "a training step, beside bare torch, accelerate and Lightning",
    "overhead": "Ray Train with EMA, beside torchrun without",
    "reduction": "the invariant reduction, beside torch's own",
    "ema": "an EMA update, beside others and the memory's bandwidth",
    "recovery": "from SIGKILL to the next step, beside torchrun, plain Ray Train and torchft",
    "nodes": "from the loss of an agent or a node to the next step, beside the bare cost of a start",
    "goodput": "useful time under one schedule of kills, beside the best interval in hindsight and torch's DCP",
    "save": "what a save costs the training, beside a copy, torch's DCP, torch_checkpointing and others",
    "s3": "saves to S3, beside boto3, obstore and s3fs",
    "tracking": "a step with every tracking sink, beside none",
    "scale": "the control path at 8 to 16,384 ranks; 10,000 nodes on a simulated clock",
    "gpu": "SD 2's UNet and DiT-XL/2 in bf16 beside a bare loop and the GPU's limits, where there is a GPU",
}


def main(arguments: list[str] | None = None) -> None:
    described = "\n".join(f"  {row:<12}{what}" for row, what in ROWS.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{__doc__}\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="any of the above, or readme; without: all rows")
    parser.add_argument("--quick", action="store_true", help="try the benchmarks out; the figures mean nothing")
    parser.add_argument("--only", metavar="PART", help="of the row gpu: sd2-unet, dit-xl-2, or one of them -compiled")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - {*ROWS, "readme"}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}, and readme")
    rows = [row for row in options.rows or ROWS if row != "readme"]
    if rows != ["gpu"]:
        if options.only is not None:
            parser.error("--only is for the row gpu, measured alone")
        if "RANK" in os.environ:
            parser.error("under torchrun only the row gpu can be measured; all others start their ranks themselves")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through the blocks that end what was started
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread a rank; read when torch is imported, so before the rows are
    from bench import report

    failed = []
    rows = sorted(rows, key=lambda row: row != "gpu")  # the others hide the GPU, which a process finds but once
    for number, row in enumerate(rows, start=1):
        print(f"{number}/{len(rows)} {row}: {ROWS[row]} ...", file=sys.stderr, flush=True)
        if row != "gpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what they compare is on CPUs; ours would take a GPU, others not
        try:
            failed += _measure(row, options.quick, options.only)
        except Exception:  # what other rows have taken an hour to find is not to be lost
            traceback.print_exc()
            failed.append(row)
    if not options.quick and _rank() == 0:
        report.write_readme(tuple(ROWS), report.README, report.RESULTS)
        print(f"written: {report.README}", file=sys.stderr)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


def _measure(row: str, quick: bool, only: str | None) -> list[str]:
    """Measure, store and print a row. Returns what was required of it, and is not so."""
    from bench import report

    where, began, results = report.conditions(on_gpu=row == "gpu"), time.monotonic(), []
    module = importlib.import_module(f"bench.{row}")
    if only is not None and only not in module.PARTS:
        raise ValueError(f"no such part: {only}; parts of {row} are {', '.join(module.PARTS)}")
    for result in module.measure(quick) if only is None else module.measure(quick, only):
        results.append(result)
        where["minutes"] = round((time.monotonic() - began) / 60, 1)
        if not quick and _rank() == 0:  # as soon as it is known: a row may be ended from outside
            report.store(row, where, results, report.RESULTS, only)
    if _rank() == 0:
        print(report.reasons(row, results) or report.section(row, where, results), flush=True)
    return report.broken_requirements(results)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    main()
