from __future__ import annotations

import pytest
from click.testing import CliRunner

from orchestrator.cli import main


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(
    "command",
    [
        ["sample", "RUN", "out.png", "--guidance"],
        ["evaluate", "RUN", "--guidance"],
        ["status", "RUN", "--watch", "--every"],
        ["checkpoints", "prune", "RUN", "--grace-s"],
    ],
)
def test_what_is_no_finite_number_is_refused_before_anything_is_done(command: list[str], number: str) -> None:
    result = CliRunner().invoke(main, [*command, number])
    assert result.exit_code == 2 and f"Invalid value for '{command[-1]}': {number} is" in result.stderr, result.stderr
