"""A store that is a dict: fast enough to enumerate thousands of moments."""

from __future__ import annotations

from orchestrator.checkpoint.backend import Backend
from orchestrator.checkpoint.store import Store


class DictObjects(Backend):
    """A backend of `Store`."""

    kind = "dict"
    pieces_at_once = 1

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def read(self, path, begin, end, timeout_s):
        return self._get(path)[begin:end]

    def write(self, path, parts):
        self.objects[path[1:]] = b"".join(bytes(part) for part in parts)

    def create_once(self, path, data, timeout_s):
        if path[1:] in self.objects:
            raise FileExistsError(path)
        self.objects[path[1:]] = data

    def size(self, path):
        return len(self._get(path))

    def list(self, path):
        folder = f"{path[1:]}/"
        return list({key[len(folder) :].split("/")[0] for key in self.objects if key.startswith(folder)})

    def delete(self, path):
        self.objects.pop(path[1:], None)

    def _get(self, path):
        try:
            return self.objects[path[1:]]
        except KeyError:
            raise FileNotFoundError(path) from None


class DictStore(Store):
    """The real store over a dict."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = {} if objects is None else objects
        super().__init__("dict://run", "", DictObjects(self.objects))
