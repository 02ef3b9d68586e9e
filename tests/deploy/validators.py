"""What each kind of file in `deploy/` is checked with: the tool of its own world, offline. Empty list: no problems."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.kubernetes import DATA

BIN = Path(sys.executable).parent
S3_ACTIONS = {
    "s3:GetObject",
    "s3:PutObject",
    "s3:DeleteObject",
    "s3:ListBucket",
    "s3:ListBucketMultipartUploads",
    "s3:AbortMultipartUpload",
}


def _tool(name: str) -> str:
    found = BIN / name if (BIN / name).exists() else shutil.which(name)
    assert found, f"no {name}: make install-test"
    return str(found)


def _output(*command: str | Path) -> list[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return [*result.stdout.splitlines(), *result.stderr.splitlines()]


def dockerfile(path: Path, root: Path) -> list[str]:
    """hadolint's rules; what is copied exists in `root` and is not ignored; extras are those of the project."""
    # DL3059 wants one RUN for all; two here are two layers on purpose. DL3013: constraints.txt pins.
    found = _output(_tool("hadolint"), "--no-color", "--ignore", "DL3013", "--ignore", "DL3059", path)
    kept = {line[1:] for line in path.with_name("Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    for line in path.read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not any(word.startswith("--from") for word in words):
            for source in [word for word in words[1:-1] if not word.startswith("--")]:
                if not (root / source).exists():
                    found.append(f"COPY {source}: no such file")
                elif source.split("/")[0] not in kept:
                    found.append(f"COPY {source}: left out by .dockerignore")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = {extra for extras in re.findall(r'"\.\[(.+)\]"', path.read_text()) for extra in extras.split(",")}
    return found + [f"no such extra: {extra}" for extra in sorted(wanted - project["optional-dependencies"].keys())]


def shell(path: Path) -> list[str]:
    return _output(_tool("shellcheck"), "--format=gcc", path)


def ray_up(path: Path) -> list[str]:
    """Ray's own validation of `ray up`, with its defaults filled in; and the files to be mounted exist."""
    config = yaml.safe_load(path.read_text())
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (ValueError, jsonschema.ValidationError, KeyError) as error:
        return [str(error)]
    missing = [source for source in config["file_mounts"].values() if not (path.parent / source).exists()]
    return [f"{source} is mounted and does not exist" for source in missing]


def compose(path: Path) -> list[str]:
    document = yaml.safe_load(path.read_text())
    schema = json.loads((DATA / "compose-spec.json").read_text())
    found = [error.message[:200] for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]
    for name, service in document["services"].items():
        found += [
            f"{name} waits for {other}" for other in set(service.get("depends_on", ())) - set(document["services"])
        ]
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source[0] == "." and not (path.parent / source).exists():
                found.append(f"{name} mounts {source}, which does not exist")
            elif source[0] != "." and source not in document["volumes"]:
                found.append(f"{name} mounts {source}, which is no volume")
    return found


def skypilot(path: Path) -> list[str]:
    task, schemas = yaml.safe_load(path.read_text()), json.loads((DATA / "skypilot.json").read_text())
    pairs = ((schemas["task"], task), (schemas["resources"], task.get("resources", {})))
    return [
        error.message[:200]
        for schema, value in pairs
        for error in jsonschema.Draft7Validator(schema).iter_errors(value)
    ]


def systemd(folder: Path, scratch: Path) -> list[str]:
    """systemd-analyze's complaints; it reports unknown keys but ends with 0. Programs of other machines stand for."""
    copies = []
    for unit in sorted(folder.glob("*.service")):
        text = re.sub(r"/opt/unbroken/bin/\w+", "/bin/true", unit.read_text())
        text = text.replace("User=ray\n", "").replace("EnvironmentFile=/etc/unbroken/env\n", "")
        copies.append(scratch / unit.name)
        copies[-1].write_text(text)
    lines = _output("systemd-analyze", "verify", "--man=no", *copies)
    return [line for line in lines if any(copy.name in line for copy in copies)]


def policy(path: Path) -> list[str]:
    """Only what the store's code calls, only on the bucket that is named, everything over TLS."""
    document, found = json.loads(path.read_text()), []
    if document.get("Version") != "2012-10-17":
        found.append("Version is not 2012-10-17")
    buckets = set()
    for statement in document["Statement"]:
        if unknown := set(statement) - {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}:
            found.append(f"unknown keys {sorted(unknown)}")
        resources = [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]
        buckets |= {resource.partition(":::")[2].partition("/")[0] for resource in resources}
        if statement["Effect"] != "Allow":
            continue
        actions = {statement["Action"]} if isinstance(statement["Action"], str) else set(statement["Action"])
        found += [f"{action} is not needed" for action in sorted(actions - S3_ACTIONS)]
        if statement["Principal"] == "*":
            found.append("allowed to everybody")
        on_bucket = {action for action in actions if action.startswith("s3:ListBucket")}
        for resource in resources:
            if (on_bucket and "/" in resource) or (actions - on_bucket and "/" not in resource):
                found.append(f"{sorted(actions)} do not act on {resource}")
    if len(buckets) != 1 or "*" in "".join(buckets):
        found.append(f"buckets {sorted(buckets)}")
    if not any(
        statement["Effect"] == "Deny" and statement.get("Condition") == {"Bool": {"aws:SecureTransport": "false"}}
        for statement in document["Statement"]
    ):
        found.append("unencrypted requests are not denied")
    return found


def deleters(path: Path) -> dict[str, list[str]]:
    """Role -> the resources that it may delete."""
    found: dict[str, list[str]] = {}
    for statement in json.loads(path.read_text())["Statement"]:
        if statement["Effect"] == "Allow" and "s3:DeleteObject" in statement["Action"]:
            role = statement["Principal"]["AWS"].rpartition("/")[2]
            found.setdefault(role, []).append(statement["Resource"])
    return found


def prometheus(path: Path) -> list[str]:
    """Unknown keys and wrong times, of the part of Prometheus's configuration that we use."""
    schema: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["scrape_configs"],
        "properties": {
            "global": {
                "additionalProperties": False,
                "properties": {"scrape_interval": {"type": "string", "pattern": r"^\d+(ms|s|m)$"}},
            },
            "scrape_configs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["job_name"],
                    "properties": {
                        "job_name": {"type": "string"},
                        "file_sd_configs": {
                            "items": {
                                "required": ["files"],
                                "additionalProperties": False,
                                "properties": {"files": {"type": "array"}},
                            }
                        },
                        "dns_sd_configs": {
                            "items": {
                                "required": ["names", "type", "port"],
                                "additionalProperties": False,
                                "properties": {
                                    "names": {"type": "array"},
                                    "type": {"enum": ["A", "AAAA", "SRV"]},
                                    "port": {"type": "integer"},
                                    "refresh_interval": {"type": "string"},
                                },
                            }
                        },
                    },
                },
            },
        },
    }
    document = yaml.safe_load(path.read_text())
    return [error.message[:200] for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]
