"""`make mutants`: one mistake at a time is made in a copy of the code, and the tests have to notice.

python -m tests.mutants                    all of them
python -m tests.mutants manifest pruned    those with one of these words in their name or file
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import NoReturn

os.environ["OMP_NUM_THREADS"] = "1"  # as in tests/conftest.py, which comes too late for torch here

import pytest
import torch  # noqa: F401

from tests.mutants.mutant import Mutant
from tests.mutants.table import MUTANTS

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 240.0
"""For the tests of one mutant. One that hangs fails before, by a limit of its own."""
_HANG = "from pytest-timeout"
_OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "--timeout=150", "--no-header")


class Verdict(Enum):
    KILLED = "killed"
    """A test failed: the mistake was noticed."""
    SURVIVED = "SURVIVED"
    """All tests passed."""
    ERROR = "ERROR"
    """It could not be planted, or the tests not be run to an end: neither is known."""


class Tree:
    """A copy of the repository, for tests that may not touch the original."""

    def __init__(self, folder: Path) -> None:
        """Copy what git knows, and what it would not ignore, to `folder`."""
        self._folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)

    def judge(self, mutant: Mutant) -> tuple[Verdict, str]:
        """Whether the tests notice it, and what they said."""
        if (problem := mutant.problem(self._folder)) is not None:
            return Verdict.ERROR, problem
        path = self._folder / mutant.file
        whole = path.read_text()
        try:
            self._write(path, mutant.planted(whole))
            code, said = self.test(mutant.tests.split())
        except SyntaxError as error:
            return Verdict.ERROR, str(error)
        finally:
            self._write(path, whole)
        if _HANG in said:  # or the machine is busy
            return Verdict.ERROR, said
        return {0: Verdict.SURVIVED, 1: Verdict.KILLED}.get(code, Verdict.ERROR), said

    def test(self, selection: Iterable[str], limit_s: float = LIMIT_S) -> tuple[int, str]:
        """pytest's exit code, and its words. 1: a test failed; another one but 0: it did not get to a verdict."""
        with tempfile.TemporaryFile("w+") as said:
            # Forked: what takes longest, to import pytest and torch, was done once for all. Nothing of ours was.
            if not (pid := os.fork()):
                os.setsid()
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
                self._become_pytest(selection)
            end_s = time.monotonic() + limit_s
            while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end_s:
                time.sleep(0.02)
            with suppress(ProcessLookupError):  # also what the tests have left behind
                os.killpg(pid, signal.SIGKILL)
            if not ended[0]:
                os.waitpid(pid, 0)
                return -1, f"not done after {limit_s:g} s"
            said.seek(0)
            return os.waitstatus_to_exitcode(ended[1]), said.read()

    def _become_pytest(self, selection: Iterable[str]) -> NoReturn:
        """In the child: see the copy only. What the tests start, in whatever folder, is to import it too."""
        code: int = pytest.ExitCode.INTERNAL_ERROR
        try:
            os.chdir(self._folder)
            os.environ["PYTHONPATH"] = str(self._folder)
            sys.path[:] = [str(self._folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
            for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
                del sys.modules[name]
            code = pytest.main([*_OPTIONS, *selection])
            sys.stdout.flush()
        finally:
            os._exit(code)

    def _write(self, path: Path, source: str) -> None:
        """Also forgets its bytecode, which Python would take if it was as long and of the same second."""
        path.write_text(source)
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name or word in m.file for word in words)]
    with tempfile.TemporaryDirectory(prefix="unbroken-mutants-") as folder:
        tree = Tree(Path(folder))
        selection = sorted({test for mutant in chosen for test in mutant.tests.split()})
        code, said = tree.test(selection, 20 * LIMIT_S)
        if code:
            print(f"{said}\nthese tests fail without any mistake, so they prove nothing")
            return 2
        counts: Counter[Verdict] = Counter()
        for mutant in chosen:
            begun_s = time.monotonic()
            verdict, said = tree.judge(mutant)
            counts[verdict] += 1
            print(f"{verdict.value:8} {time.monotonic() - begun_s:5.1f} s  {mutant.name} ({mutant.file})", flush=True)
            if verdict is Verdict.ERROR:
                print(said)
    print(", ".join(f"{count} {verdict.value}" for verdict, count in counts.items()))
    return 0 if chosen and counts.keys() == {Verdict.KILLED} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
