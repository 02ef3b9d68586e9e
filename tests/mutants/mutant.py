"""A mistake that somebody could make, and the tests that must notice it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One change of one file. It compiles, and is no other way to write the same program."""

    name: str
    """What the code does wrong with it."""
    file: str
    """From the root of the repository."""
    old: str
    """Occurs once in the file."""
    new: str
    tests: str
    """What pytest is to run, separated by spaces: the cheapest that notice it."""

    def problem(self, root: Path) -> str | None:
        """What keeps it from being planted in the tree at `root`; None: nothing."""
        count = (root / self.file).read_text().count(self.old)
        if count != 1 or self.new == self.old:
            return f"{self.name}: its old text is {count} times in {self.file}, and has to be there once"
        for test in self.tests.split():
            path, _, node = test.partition("::")
            name = node.rpartition("::")[2].partition("[")[0]  # none: the whole file
            if not (root / path).exists() or not re.search(rf"\b{name}\b", (root / path).read_text()):
                return f"{self.name}: there is no test {test}"
        return None

    def planted(self, source: str) -> str:
        """The file with the mistake in it. Raises SyntaxError if that is no Python."""
        mutated = source.replace(self.old, self.new)
        compile(mutated, self.file, "exec")
        return mutated
