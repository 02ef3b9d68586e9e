"""Files that events point to."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image

from orchestrator.checkpoint.store import Store
from orchestrator.errors import UnbrokenError


def load_image(path: str, say: Callable[[str], None]) -> Image.Image | None:
    """The image at a path or URL, RGB; None, with a line for the user, if it cannot be read."""
    folder, _, name = path.rpartition("/")
    try:
        return Image.open(io.BytesIO(Store.open(folder or ".").read(name))).convert("RGB")
    except (UnbrokenError, OSError) as error:
        say(f"tracking: samples {path} are left out: {' '.join(str(error).split())}")
        return None
