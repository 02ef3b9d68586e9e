"""A server that speaks the calls of W&B's protocol that wandb 0.31 makes in a run, on loopback, in memory.

GraphQL (`POST /graphql`), the stream of history rows (`POST /files/<entity>/<project>/<run>/file_stream`), and uploads
(`PUT`). What the server answers is what the client needs to go on; the rows that it got are what tests look at.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4
_ENTITY, _HISTORY, _EVENTS = "tester", "wandb-history.jsonl", "wandb-events.jsonl"


class Run:
    """What the server knows of one run."""

    def __init__(self, name: str, project: str) -> None:
        self.name, self.project = name, project
        self.id = base64.b64encode(f"Run:v1:{name}:{project}:{_ENTITY}".encode()).decode()
        self.lines: dict[str, dict[int, str]] = {}
        self.config, self.summary, self.tags, self.group = "{}", "{}", [], None
        self.exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history, in the order of W&B's charts."""
        history = self.lines.get(_HISTORY, {})
        return [json.loads(history[offset]) for offset in sorted(history)]

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.rows]

    def keep(self, files: dict[str, Any]) -> None:
        for name, part in files.items():
            lines = self.lines.setdefault(name, {})
            if name == "wandb-summary.json":
                self.summary = part["content"][-1]
            else:
                lines.update({part["offset"] + i: line for i, line in enumerate(part["content"])})

    def bucket(self) -> dict[str, Any]:
        tails = {name: list(self.lines.get(name, {}).items()) for name in (_HISTORY, _EVENTS, "output.log")}
        tail = {name: json.dumps([line for _, line in sorted(lines)][-1:]) for name, lines in tails.items()}
        return {
            "id": self.id,
            "name": self.name,
            "displayName": self.name,
            "description": None,
            "config": self.config,
            "sweepName": None,
            "project": {"id": "P", "name": self.project, "entity": {"id": "E", "name": _ENTITY}},
            "summaryMetrics": self.summary,
            "tags": self.tags,
            "notes": None,
            "wandbConfig": '{"t": 1}',
            "historyLineCount": len(tails[_HISTORY]),
            "eventsLineCount": len(tails[_EVENTS]),
            "logLineCount": len(tails["output.log"]),
            "historyTail": tail[_HISTORY],
            "eventsTail": tail[_EVENTS],
        }


class WandbServer:
    """Serves in a thread until it is closed."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.alerts: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The data of a GraphQL call; None for one that is not known."""
        simple = {
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "Viewer": {
                "viewer": {"id": "U", "entity": _ENTITY, "username": _ENTITY, "flags": "{}", "teams": {"edges": []}}
            },
            "RunStoppedStatus": {"project": {"run": {"stopped": False}}},
        }
        if operation in simple:
            return simple[operation]
        method = getattr(self, f"_{operation}", None)
        return method(variables) if method else None

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        project = {"id": "P", "name": variables["project"], "entity": {"id": "E", "name": _ENTITY}}
        return {"model": {**project, "bucket": run.bucket() if run else None}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name")
        run = self.runs.get(name) if name else next(r for r in self.runs.values() if r.id == variables["id"])
        inserted = run is None
        if run is None:
            run = self.runs[name] = Run(name, variables["project"])
        run.config = variables.get("config") or run.config
        run.tags = variables.get("tags") or run.tags
        run.group = variables.get("groupName") or run.group
        run.summary = variables.get("summaryMetrics") or run.summary
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": inserted}}

    def _RewindRun(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[variables["runName"]]
        kept = [row for row in run.rows if row["_step"] <= variables["metricValue"]]
        run.lines[_HISTORY] = {i: json.dumps(row) for i, row in enumerate(kept)}
        return {"rewindRun": {"rewoundRun": run.bucket()}}

    def _NotifyScriptableRunAlert(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(variables)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        key = base64.b64encode(f"Artifact:{len(self.artifacts)}".encode()).decode()
        self.artifacts[key] = variables["input"]
        artifact = {"id": key, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        key = variables.get("artifactID", "x")
        file = {"id": "F", "uploadUrl": f"{self.url}/storage/manifest/{key}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "M", "file": file}}}

    def _CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for spec in variables["input"]["artifactFiles"]:
            url = f"{self.url}/storage/artifact/{spec['name']}"
            node = {"id": "F", "name": spec["name"], "storagePath": None, "uploadUrl": url, "uploadHeaders": []}
            node |= {"displayName": spec["name"], "uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]}}
            nodes.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        key = variables["artifactID"]
        self.artifacts[key]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": key, "digest": self.artifacts[key].get("digest")}}}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionResetError):  # a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: WandbServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send({}, 404)

    def do_PUT(self) -> None:
        body = self._body()
        with self.state.lock:
            self.state.uploads[self.path.removeprefix("/storage/")] = body
        self._send({})

    def do_POST(self) -> None:
        request = json.loads(self._body())
        with self.state.lock:
            if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                run = self.state.runs[stream[1]]
                run.keep(request.get("files") or {})
                run.exit_code = request.get("exitcode", run.exit_code)
                self._send({"limits": {}, "stopped": False})
                return
            found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            operation = found[1] if found else "?"
            data = self.state.answer(operation, request.get("variables") or {})
            if data is None:
                self.state.unknown.append(operation)
                self._send({"errors": [{"message": f"unknown operation {operation}"}]})
            else:
                self._send({"data": data})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, document: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
