"""The one direction of imports, read off the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qformer"
LAYERS = {
    0: ("errors", "resources", "hub"),
    1: ("keyed", "config", "cards", "text", "sample", "untokenized", "presets"),
    2: ("devices", "nn", "tensorfiles"),
    3: ("images", "videos", "features", "backbones"),
    4: (
        "assemble", "vlm", "objectives", "weights", "loading", "published_models", "saved", "named", "instruction",
        "checkpoints", "exporting", "modelcard", "starting", "plugging", "processes", "rollcall",
    ),
    5: ("data",),
    6: ("train", "evaluate"),
    7: (
        "comparison", "stages", "demo", "report", "charts", "gallery", "results", "render", "listing", "dryrun",
        "planning", "dataroot", "run", "origin", "harness", "lmms", "cli", "__init__", "__main__",
    ),
}  # fmt: skip
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
HEAVY = {"torch", "torchvision", "transformers", "timm", "accelerate", "torchmetrics", "datasets", "matplotlib"}


def module_name(file: Path) -> str:
    """`nn.qformer` for qformer/nn/qformer.py, `nn` for qformer/nn/__init__.py, `__init__` for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST, everywhere: bool = True, types: bool = True) -> Iterator[str]:
    """Dotted names that a module imports; `from a import b` gives a.b.

    Args:
        tree: the parsed module.
        everywhere: whether imports inside functions count.
        types: whether imports below `if TYPE_CHECKING` count.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            if everywhere:
                yield from imports(node, everywhere, types)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if types:
                yield from imports(node, everywhere, types)
        else:
            yield from imports(node, everywhere, types)


def own(tree: ast.AST, types: bool = True) -> set[str]:
    """The modules of this package that a module imports, `nn.qformer` for qformer.nn.qformer."""
    found = set()
    for name in imports(tree, types=types):
        if name == "qformer.__version__" or not (name == "qformer" or name.startswith("qformer.")):
            continue
        inner = name.removeprefix("qformer").removeprefix(".")
        while inner and inner not in MODULES:
            inner = inner.rpartition(".")[0]  # the last part names something inside a module
        found.add(inner or "__init__")
    return found


def layer(module: str) -> int:
    return LAYER.get(module.partition(".")[0], max(LAYERS))


def test_every_module_has_a_layer() -> None:
    assert {module.partition(".")[0] for module in MODULES} <= set(LAYER), "name the layer of the new module above"


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_the_same_layer_or_below(module: str) -> None:
    upward = {name for name in own(MODULES[module]) if layer(name) > layer(module)}
    assert not upward, f"qformer.{module} (layer {layer(module)}) imports from above: {sorted(upward)}"


def test_no_module_leads_back_to_itself() -> None:
    graph = {module: own(tree, types=False) - {module} for module, tree in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(("one", "other"), [("train", "evaluate"), ("evaluate", "train")])
def test_training_and_evaluation_are_strangers(one: str, other: str) -> None:
    for module, tree in MODULES.items():
        if module.partition(".")[0] == one:
            assert not {name for name in own(tree) if name.partition(".")[0] == other}, module


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) <= 1 or name in ("cli", "__init__")])
def test_the_light_layers_import_nothing_heavy_at_module_level(module: str) -> None:
    heavy = {name for name in imports(MODULES[module], everywhere=False, types=False) if name.split(".")[0] in HEAVY}
    assert not heavy


def test_data_never_imports_a_model() -> None:
    for module, tree in MODULES.items():
        if module.partition(".")[0] == "data":
            assert not own(tree, types=False) & {"vlm", "weights", "loading", "published_models"}, module
            models = ("nn", "backbones.language", "backbones.decoder_only", "backbones.encoder_decoder")
            assert not {name for name in own(tree) if name.startswith(models)}, module


def test_importing_the_light_layers_pulls_in_nothing_heavy() -> None:
    light = [f"qformer.{name}" for name in MODULES if layer(name) <= 1 or name == "cli"]
    code = f"import sys, {', '.join(['qformer', *light])}; print(*sorted({HEAVY} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.split() == []


def test_importing_a_model_does_not_wait_for_transformers() -> None:
    """Which takes two seconds more, and is asked for when an LLM is read."""
    code = "import sys, qformer.vlm; print('transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.split() == ["False"]


@pytest.mark.skipif("cli" not in MODULES, reason="there is no command line yet")
def test_help_answers_at_once() -> None:
    """Half a second once files are cached; processor time, so that a busy machine does not fail it."""
    spent = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "qformer.cli", "--help"], capture_output=True, cwd=ROOT, check=True)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(spent) < 0.5
