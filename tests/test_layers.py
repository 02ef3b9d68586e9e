"""The rules of layers and sizes, checked on the source: who may import whom, and how long things may be."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("orchestrator", "trainers")
SOURCES = sorted(path for name in (*PACKAGES, "tests", "bench") for path in (ROOT / name).rglob("*.py"))
DOORS = {
    "omegaconf": {"orchestrator/config.py"},
    "fsspec": {"orchestrator/checkpoint/store.py"},
    "s3fs": set(),
    "wandb": {"orchestrator/tracking/wandb_sink.py"},
    "bitsandbytes": {"trainers/whole_tensor_optimizers.py"},
    "prodigyopt": {"trainers/whole_tensor_optimizers.py"},
    "torchmetrics": {"trainers/evaluation/metrics.py"},
    "pyarrow": {"trainers/data/tables.py"},
    "datasets": {"trainers/data/hugging_face.py"},
    "tensorboardX": {"orchestrator/tracking/tensorboard_sink.py"},
    "ray": {
        "orchestrator/driver.py",
        "orchestrator/agents/agent.py",
        "orchestrator/chaos/cluster.py",
        "orchestrator/cluster/control.py",
        "orchestrator/data/preparation.py",
        "orchestrator/jobs/job_server.py",
        "orchestrator/cluster/joining.py",
        "orchestrator/cluster/keepers.py",
        "orchestrator/cluster/mailbox.py",
        "orchestrator/cluster/peer_memory.py",
        "orchestrator/cluster/placing.py",
        "orchestrator/search/sweep.py",
        "orchestrator/tracking/ray_metrics.py",
    },
}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "util", "helper"}
MAX_LINES = {ast.FunctionDef: 50, ast.AsyncFunctionDef: 50, ast.ClassDef: 250}
MAX_FILE_LINES, MAX_PARAMETERS = 300, 7


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that the file imports, inside functions too; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names))


def violations(path: str, source: str) -> list[str]:
    """What `path` (relative to the root) does that its place does not allow."""
    tree, found = ast.parse(source), []
    package = path.split("/")[0]
    if package in PACKAGES:
        for top in {name.split(".")[0] for name in imports(tree)}:
            if package == "trainers" and top == "orchestrator":
                found.append("trainers imports orchestrator")
            if top in DOORS and path not in DOORS[top]:
                found.append(f"{top} imported outside {sorted(DOORS[top])}")
    if Path(path).stem in FORBIDDEN_NAMES:
        found.append("a file is named for the noun it owns")
    if len(source.splitlines()) > MAX_FILE_LINES:
        found.append(f"{len(source.splitlines())} lines in the file")
    for node in ast.walk(tree):
        if package in PACKAGES and isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("read_text", "write_text") and "encoding" not in [word.arg for word in node.keywords]:
                found.append("text without an encoding: the locale's may not know its letters")
        limit = MAX_LINES.get(type(node))
        if limit and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > limit:
                found.append(f"{node.name} has {length} lines")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len([name for name in names if name not in ("self", "cls")]) > MAX_PARAMETERS:
                found.append(f"{node.name} has more than {MAX_PARAMETERS} parameters")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_doors_and_sizes(path: Path):
    assert violations(str(path.relative_to(ROOT)), path.read_text()) == []


def module_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules among `sources` that it imports when it runs (not only for type checkers)."""
    graph = {}
    for name, source in sources.items():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        graph[name] = {found for found in imports(tree) if found in sources and found != name}
    return graph


def test_modules_import_each_other_in_one_direction():
    paths = [path.relative_to(ROOT) for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    graph = module_graph({name: (ROOT / path).read_text() for name, path in zip(names, paths, strict=True)})
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(names)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("trainers/a.py", "from orchestrator.config import x", "trainers imports orchestrator"),
        ("trainers/a.py", "def f():\n    import ray.train", "ray imported outside"),
        ("orchestrator/a.py", "from omegaconf import OmegaConf", "omegaconf imported outside"),
        ("orchestrator/checkpoint/a.py", "import fsspec", "fsspec imported outside"),
        ("orchestrator/checkpoint/utils.py", "", "named for the noun"),
        ("bench/a.py", "\n" * 301, "301 lines in the file"),
        ("trainers/a.py", "path.write_text(text)", "text without an encoding"),
        ("trainers/a.py", "def f():\n" + "    pass\n" * 50, "f has 51 lines"),
        ("trainers/a.py", "class C:\n" + "    a = 1\n" * 250, "C has 251 lines"),
        ("trainers/a.py", "class C:\n    def f(self, a, b, c, d, e, f, *, g, h): pass", "f has more than 7 parameters"),
    ],
)
def test_the_checker_finds_what_it_looks_for(path: str, source: str, expected: str):
    assert [found for found in violations(path, source) if expected in found]


def test_the_checker_lets_the_doors_open():
    assert violations("orchestrator/config.py", "import omegaconf") == []
    assert violations("orchestrator/cli.py", "import trainers.build\nimport torch") == []


def test_the_checker_finds_a_cycle():
    graph = module_graph({"a": "import b", "b": "def f():\n    from c import x", "c": "import a"})
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph).static_order())
    typing_only = {"a": "import b", "b": "if TYPE_CHECKING:\n    import a"}
    assert module_graph(typing_only) == {"a": {"b"}, "b": set()}
