from __future__ import annotations

import subprocess
import sys


def test_checkpoints_need_no_torch():
    """The agent imports all of this and must stay light."""
    modules = "attempts catalog keys manifest policy reader records retention run_record store writer"
    imports = "\n".join(f"import orchestrator.checkpoint.{name}" for name in modules.split())
    program = f"{imports}\nimport sys, orchestrator.prove\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
