"""What a Kubernetes API server and the operators would refuse, found without them."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

DATA = Path(__file__).parent / "data"
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_POD_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["selector", "podMetricsEndpoints"],
            "additionalProperties": False,
            "properties": {
                "selector": {"type": "object", "required": ["matchLabels"]},
                "podMetricsEndpoints": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["port"],
                        "properties": {
                            "port": {"type": "string"},
                            "interval": {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"},
                        },
                    },
                },
            },
        }
    },
}
"""The keys that we use, of the Prometheus operator's PodMonitor."""


def problems(text: str) -> list[str]:
    """One line for each thing wrong with the documents of a YAML stream."""
    return [line for document in yaml.safe_load_all(text) if document for line in document_problems(document)]


def document_problems(document: dict[str, Any]) -> list[str]:
    match document.get("apiVersion"), document.get("kind"):
        case "ray.io/v1", "RayJob":
            found = _schema_problems(_rayjob_schema(), document)
            return found or _rayjob_problems(document) + _pod_problems(document["spec"]["rayClusterSpec"])
        case "monitoring.coreos.com/v1", "PodMonitor":
            return _schema_problems(_POD_MONITOR, document)
        case _:
            try:
                kubernetes_validate.validate(document, "1.36", strict=True)
            except kubernetes_validate.SchemaNotFoundError:
                return [f"no kind {document.get('kind')} in {document.get('apiVersion')}"]
            except kubernetes_validate.ValidationError as error:
                return [str(error).splitlines()[0]]
            return []


@cache
def _rayjob_schema() -> dict[str, Any]:
    return _strict(json.loads((DATA / "rayjob-v1.json").read_text()), top=True)


def _strict(schema: Any, top: bool = False) -> Any:
    """OpenAPI's dialect as JSON schema, in which an unknown key is an error, as with kubectl's strict validation."""
    if not isinstance(schema, dict):
        return schema
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    schema.pop("format", None)
    if schema.pop("nullable", False) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    for key, value in schema.get("properties", {}).items():
        if not (top and key == "metadata"):
            schema["properties"][key] = _strict(value)
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not open_ended:
        schema["additionalProperties"] = False
    for key in ("additionalProperties", "items"):
        if isinstance(schema.get(key), dict):
            schema[key] = _strict(schema[key])
    return schema


def _schema_problems(schema: dict[str, Any], document: dict[str, Any]) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def _rayjob_problems(job: dict[str, Any]) -> list[str]:
    """What the operator checks beyond its schema, as far as our files touch it."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
    autoscaled = cluster.get("enableInTreeAutoscaling", False)
    environment = {entry["name"] for entry in head["template"]["spec"]["containers"][0].get("env", ())}
    name = job["metadata"]["name"]
    queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    ends = spec.get("shutdownAfterJobFinishes", False)
    rules = {
        f"name {name} is no DNS-1035 label of at most 47 characters": not _DNS_1035.fullmatch(name) or len(name) > 47,
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished") and not ends,
        "suspend needs shutdownAfterJobFinishes": spec.get("suspend") and not ends,
        "backoffLimit is negative": spec.get("backoffLimit", 0) < 0,
        "unknown submissionMode": spec.get("submissionMode", "K8sJobMode")
        not in {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "InteractiveMode takes no backoffLimit": spec.get("submissionMode") == "InteractiveMode"
        and spec.get("backoffLimit", 0) > 0,
        "one of rayClusterSpec and clusterSelector": "clusterSelector" in spec,
        "runtimeEnvYAML is no mapping": not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict),
        "Kueue takes no job with an autoscaler": queue and autoscaled,
        "Kueue needs suspend": queue and not spec.get("suspend"),
        "token authentication needs Ray 2.52": cluster.get("authOptions", {}).get("mode") == "token"
        and tuple(map(int, cluster.get("rayVersion", "0.0.0").split("."))) < (2, 52, 0),
        "gcsFaultToleranceOptions and RAY_REDIS_ADDRESS": "gcsFaultToleranceOptions" in cluster
        and environment & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"},
        "RAY_enable_autoscaler_v2 beside autoscalerOptions": "RAY_enable_autoscaler_v2" in environment,
    }
    found = [rule for rule, broken in rules.items() if broken]
    for group in (head, *workers):
        if autoscaled and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            found.append("autoscaler v2 needs restartPolicy Never")
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"]):
            found.append("resources in the group and in rayStartParams")
    for group in workers:
        fewest, most = group.get("minReplicas"), group.get("maxReplicas")
        if fewest is None or most is None or not fewest <= group.get("replicas", 0) <= most:
            found.append("replicas are not between minReplicas and maxReplicas")
    return found


def _pod_problems(cluster: dict[str, Any]) -> list[str]:
    """The pods that the operator makes, as if they were ours: mounts without a volume, requests above limits, ..."""
    found = []
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):
        spec = group["template"]["spec"]
        found += document_problems({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec})
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        for container in spec["containers"]:
            found += [
                f"no volume {mount['name']}" for mount in container["volumeMounts"] if mount["name"] not in volumes
            ]
            if container["resources"]["requests"]["memory"] != container["resources"]["limits"]["memory"]:
                found.append("memory that is not requested can be taken away")
        grace = spec["terminationGracePeriodSeconds"]
        for entry in (entry for container in spec["containers"] for entry in container.get("env", ())):
            if entry["name"] == "DRAIN_S" and not 0 < int(entry["value"]) < grace:
                found.append(f"DRAIN_S={entry['value']} is not inside the grace of {grace} s")
    return found
