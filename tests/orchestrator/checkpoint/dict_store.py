"""A store that is a dict: fast enough to enumerate thousands of moments."""

from __future__ import annotations

from orchestrator.checkpoint.store import Store
from orchestrator.errors import AlreadyExistsError, MissingObjectError


class DictStore(Store):
    """Keeps what every store promises, in one process."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        super().__init__("dict://run", None, "")
        self.objects = {} if objects is None else objects

    def read(self, key, begin=None, end=None):
        try:
            return self.objects[key][begin:end]
        except KeyError:
            raise MissingObjectError(key) from None

    def write(self, key, parts):
        self.objects[key] = b"".join(bytes(part) for part in parts)

    def create(self, key, data):
        if self.objects.setdefault(key, data) != data:
            raise AlreadyExistsError(key)

    def size(self, key):
        return len(self.read(key))

    def list(self, folder):
        cut = len(folder) + 1
        return sorted({key[cut:].split("/")[0] for key in self.objects if key.startswith(f"{folder}/")})

    def delete(self, key):
        self.objects.pop(key, None)
