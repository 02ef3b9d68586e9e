"""Settings of the whole test session; they must stand before torch and ray are imported."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # CPU kernels split sums by thread: one thread, one answer
os.environ["RAY_AUTH_MODE"] = "disabled"  # no token file on a test machine
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # tests call nobody
