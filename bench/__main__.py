"""`python -m bench [ROW ...] [--quick]`: measure, print the table, and write `bench/results/ROW.json`.

Rows: reduction, ema, overhead, recovery, save, s3, tracking; all of them take about 30 minutes. `--quick` tries the
benchmarks out on small models and keeps nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys

ROWS = ("reduction", "ema", "overhead", "recovery", "save", "s3", "tracking")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}; without: all")
    parser.add_argument("--quick", action="store_true", help="try the benchmarks out; the figures mean nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; rows are {', '.join(ROWS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves through the blocks that end what was started
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread a rank; read when torch is imported, so before the rows are
    from bench import comparison

    for row in options.rows or ROWS:
        where = comparison.conditions()
        comparisons = importlib.import_module(f"bench.{row}").measure(options.quick)
        if not options.quick:
            comparison.store(row, where, comparisons)
            where, comparisons = comparison.load(row)
        print(comparison.section(row, where, comparisons), flush=True)


if __name__ == "__main__":
    main()
