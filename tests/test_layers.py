"""The rules of the house in docs/design.md: imports go down, heavy libraries stay in the rooms that may have them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "opensloth"

HEAVY = {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "accelerate"}
MAY_BE_HEAVY = ("engine", "rollout", "training", "evaluation")

# A room may import from itself, from errors, hardware, paths, log, and from the rooms named here.
MAY_IMPORT = {
    "errors": set(),
    "hardware": set(),
    "paths": set(),
    "log": set(),
    "config": set(),
    "data": {"config"},
    "rewards": {"config", "data"},
    "launch": {"config", "data"},
    "engine": {"config", "data", "launch"},
    "rollout": {"config", "data", "launch", "engine"},
    "evaluation": {"config", "data", "rewards", "launch", "engine", "rollout"},
    "training": {"config", "data", "rewards", "launch", "engine", "rollout", "evaluation"},
    "cli": {
        "config",
        "data",
        "rewards",
        "launch",
        "engine",
        "rollout",
        "evaluation",
    },  # training runs in its own processes
}
GROUND = {"errors", "hardware", "paths", "log"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """`data.plan.packing` for src/opensloth/data/plan/packing.py, `data` for its __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> list[str]:
    """Absolute names of all modules that the nodes below `tree` import."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            module = node.module or ""
            # `from opensloth import paths` imports the module opensloth.paths
            names += [f"opensloth.{a.name}" for a in node.names] if module == "opensloth" else [module]
    return names


def at_import(tree: ast.Module) -> list[str]:
    """What runs when the module is imported: everything outside functions and `if TYPE_CHECKING:` blocks."""

    class Shallow(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...
        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...
        def visit_If(self, node: ast.If) -> ast.AST | None:
            if "TYPE_CHECKING" in ast.dump(node.test):
                return None
            return self.generic_visit(node)

    return imported(Shallow().visit(tree))


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down(path: Path) -> None:
    name = dotted(path)
    if not name:
        return  # the package itself: version and docstring
    room = name.split(".")[0]
    allowed = MAY_IMPORT[room] | GROUND | {room}
    for target in imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = target.split(".")
        if parts[0] == "opensloth" and len(parts) > 1 and parts[1] in MAY_IMPORT:
            assert parts[1] in allowed, f"{name} imports {target}, which is not below it"


@pytest.mark.parametrize("path", [p for p in MODULES if dotted(p).startswith("training")], ids=dotted)
def test_the_methods_know_nothing_of_each_other_and_what_they_share_knows_neither(path: Path) -> None:
    methods = {"sft", "grpo"}
    own = dotted(path).split(".")[1:2]
    targets = imported(ast.parse(path.read_text(encoding="utf-8")))
    known = {target.split(".")[2] for target in targets if re.match(r"opensloth\.training\.(sft|grpo)\b", target)}
    assert known & methods <= set(own)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_only_the_model_rooms_import_heavy_libraries_at_the_top(path: Path) -> None:
    name = dotted(path)
    if any(name == room or name.startswith(f"{room}.") for room in MAY_BE_HEAVY):
        return
    tops = {target.split(".")[0] for target in at_import(ast.parse(path.read_text(encoding="utf-8")))}
    assert not tops & HEAVY, f"{name} imports {sorted(tops & HEAVY)} at module level"


@pytest.mark.parametrize("path", [p for p in MODULES if dotted(p).startswith("cli")], ids=dotted)
def test_cli_never_imports_training_or_a_model_room_at_the_top(path: Path) -> None:
    tops = at_import(ast.parse(path.read_text(encoding="utf-8")))
    assert not [t for t in tops if t.startswith(tuple(f"opensloth.{room}" for room in MAY_BE_HEAVY))]


def test_a_forbidden_import_would_be_seen() -> None:
    source = "import torch.nn\nfrom opensloth import cli\ndef f():\n    import peft\n"
    assert at_import(ast.parse(source)) == ["torch.nn", "opensloth.cli"]
    assert imported(ast.parse(source)) == ["torch.nn", "opensloth.cli", "peft"]


@pytest.mark.parametrize("command", ["train", "data", "sft", "grpo", "eval"])
def test_commands_load_no_model_library(command: str) -> None:
    code = f"import sys, opensloth.cli.{command}; print(*{HEAVY!r} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "sample:arithmetic", "--model", "./no-model"],
        ["eval", "no-rows.jsonl", "--model", "sample:tiny"],
    ],
)
def test_what_is_not_there_is_told_before_a_model_library_is_loaded(words: list[str]) -> None:
    lines = [
        "import sys",
        f"from opensloth.cli import {words[0]}, program",
        f"code = program.run({words[0]}.app, {words[1:]!r})",
        f"print(code, *{HEAVY!r} & sys.modules.keys())",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"], done.stderr
