"""DESIGN §5's import rules, enforced by reading the imports of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("protos", "kernels", "worker", "cluster")
MAY_IMPORT = {
    "protos": {"protos"},
    "kernels": {"kernels"},
    "worker": {"worker", "kernels", "protos"},
    "cluster": {"cluster", "protos"},
}
# Ray is imported only where actors are defined or placed.
RAY_FILES = {
    "worker/rank_actor.py", "cluster/head.py", "cluster/application.py", "cluster/serve_app.py", "cluster/cli/serve.py",
    "cluster/launcher/on_ray.py", "cluster/launcher/placement.py",
}
GRPC_FILES = {"protos/inference_pb2_grpc.py", "protos/generate.py"}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, lazily or not; ours begin with `kvarto.`."""
    package = ("kvarto", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                yield submodule if is_module(submodule) else module


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return name.startswith("kvarto.") and (path.with_suffix(".py").exists() or path.is_dir())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_folders_import_only_what_they_may(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    in_launcher = relative(path).startswith("cluster/launcher/")
    allowed = MAY_IMPORT[folder] | ({"worker"} if in_launcher else set())
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("kvarto.")}
    assert ours & set(FOLDERS) <= allowed


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    name = relative(path)
    assert "transformers" not in tops
    assert "torch" not in tops or not name.startswith(("cluster/", "protos/"))
    assert "ray" not in tops or name in RAY_FILES
    assert not tops & {"grpc", "grpc_tools", "grpc_health"} or name in GRPC_FILES or name.startswith("cluster/grpc/")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_of_our_own_are_relative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "kvarto" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.split(".")[0] != "kvarto"


def test_there_is_no_import_cycle() -> None:
    graph = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("kvarto", *(parts[:-1] if parts[-1] == "__init__" else parts)))
        graph[name] = {found for found in imports(path) if found.startswith("kvarto.")}
    graph = {name: {found for found in names if found in graph and found != name} for name, names in graph.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name):], name])
        if name not in done:
            for found in graph[name]:
                visit(found, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_importing_kvarto_is_light() -> None:
    code = "import sys, kvarto; print(sorted({'torch', 'ray', 'fastapi', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_head_does_not_load_torch() -> None:
    code = "import sys, kvarto.cluster.head; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
