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
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - {*ROWS, "readme"}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}, and readme")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through the blocks that end what was started
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread a rank; read when torch is imported, so before the rows are
    from bench import report

    rows = [row for row in options.rows or ROWS if row != "readme"]
    for number, row in enumerate(rows, start=1):
        print(f"{number}/{len(rows)} {row}: {ROWS[row]} ...", file=sys.stderr, flush=True)
        where, began = report.conditions(), time.monotonic()
        results = importlib.import_module(f"bench.{row}").measure(options.quick)
        where["minutes"] = round((time.monotonic() - began) / 60, 1)
        if not options.quick:
            report.store(row, where, results)
            where, results = report.load(row)
        print(report.section(row, where, results), flush=True)
    if not options.quick:
        report.write_readme(tuple(ROWS))
        print(f"written: {report.README}", file=sys.stderr)


if __name__ == "__main__":
    main()
