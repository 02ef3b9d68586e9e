"""`python -m orchestrator` is `unbroken`, where the script is not on the PATH."""

from __future__ import annotations

from orchestrator.cli import main

main()
