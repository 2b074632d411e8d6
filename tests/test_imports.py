"""The import rule.

cli -> terminal -> bench -> serve -> plan -> llm -> engine -> (models, weights) -> layers -> (parallel, kernels)
-> settings -> mapping.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import jaxllm

ROOT = Path(jaxllm.__file__).parent

# From top to bottom. A module may import from its own group and from any group below, where a group is a line's entry.
LAYERS: list[list[set[str]]] = [
    [{"__init__"}],  # imports lazily, by name
    [{"__main__"}],
    [{"cli"}],
    [{"terminal"}],
    [{"bench"}],
    [{"serve"}],
    [{"plan"}],
    [{"llmapi"}],
    [{"options"}],
    [{"llm", "outputs", "result", "prompts", "requests"}],
    [{"engine"}],
    [{"models"}, {"weights"}],
    [{"layers"}],
    [{"parallel"}, {"kernels"}],
    [{"config", "moe_config", "settings"}, {"sampling_params", "structured"}],
    [{"mapping"}, {"cache"}, {"bins"}, {"formats"}, {"interrupts"}, {"placement"}],
]

NO_JAX = [
    "config",
    "mapping",
    "moe_config",
    "placement",
    "sampling_params",
    "settings",
    "structured",
    "engine.request",
    "engine.roster",
    "engine.running",
    "engine.blocks",
    "engine.chunks",
    "engine.grammar",
    "engine.grammar_check",
    "engine.limits",
    "engine.pages",
    "engine.prefill",
    "engine.scheduler",
    "engine.siblings",
    "engine.sizes",
    "engine.step",
    "engine.turns",
    "engine.waiting",
]
JAX = {"jax", "jaxlib", "flax", "orbax"}


def place(module: str) -> tuple[int, int]:
    """Number of the layer of a module such as "engine.runner", and of its group there."""
    top = module.split(".")[0] or "__init__"
    for number, groups in enumerate(LAYERS):
        for index, group in enumerate(groups):
            if top in group:
                return number, index
    raise AssertionError(f"jaxllm.{module} is in no layer: add it to LAYERS in tests/test_imports.py")


def modules(root: Path = ROOT) -> dict[str, str]:
    """The source of every module of the package, by its name without "jaxllm."."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path.read_text(encoding="utf-8")
    return found


@cache
def imports(source: str, known: frozenset[str], *, at_start: bool = False) -> set[str]:
    """What a module imports: "engine.runner" for jaxllm's own, "jax" for jax and everything in it.

    at_start: only what runs when the module is imported: not inside functions, not for type checkers.
    """
    found: set[str] = set()

    def own(name: str) -> str:
        name = name.removeprefix("jaxllm").lstrip(".")
        while name and name not in known:  # the last part is not a module but something in it
            name = name.rpartition(".")[0]
        return name or "__init__"

    def visit(node: ast.AST) -> None:
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if at_start and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they go"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top = name.split(".")[0]
            found.add(own(name) if top == "jaxllm" else top)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """Every import that goes up or sideways."""
    known = frozenset(sources)
    out = []
    for module, source in sources.items():
        layer, group = place(module)
        if module == "__init__":
            continue
        for target in sorted(imports(source, known) & known):
            if target == "__init__":
                if "__version__" not in source:
                    out.append(f"{module} imports the package itself")
                continue
            to_layer, to_group = place(target)
            if to_layer < layer or (to_layer == layer and to_group != group):
                out.append(f"{module} imports {target}")
    return out


def reaches_jax(module: str, sources: dict[str, str]) -> list[str]:
    """A chain of imports from a module to jax, or nothing."""
    known = frozenset(sources)
    paths = [[module]]
    seen = {module}
    while paths:
        path = paths.pop()
        for target in imports(sources[path[-1]], known, at_start=True):
            if target in JAX:
                return [*path, target]
            if target in known and target not in seen:
                seen.add(target)
                paths.append([*path, target])
    return []


def test_nothing_imports_upward() -> None:
    assert violations(modules()) == []


@pytest.mark.parametrize("module", NO_JAX)
def test_no_jax(module: str) -> None:
    assert reaches_jax(module, modules()) == []


@pytest.mark.parametrize("module", ["cli", "serve.frontend", "serve.supervisor", "serve.app"])
def test_starts_without_jax(module: str) -> None:
    assert reaches_jax(module, modules()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("engine.blocks", "from jaxllm.llm import LLM"),
        ("layers.norm", "import jaxllm.engine.batch"),
        ("kernels.paged_attention.api", "def f():\n    from jaxllm.models import config"),
        ("models.llama", "from jaxllm.weights.source import Source"),
        ("weights.source", "from jaxllm import models"),
        ("mapping", "from jaxllm.config import EngineConfig"),
        ("parallel.mesh", "from jaxllm.kernels.paged_attention.api import paged_attention"),
    ],
)
def test_the_rule_can_fail(module: str, line: str) -> None:
    sources = modules()
    sources[module] += "\n" + line + "\n"
    assert len(violations(sources)) == 1


def test_the_search_for_jax_can_fail() -> None:
    sources = modules()
    assert reaches_jax("engine.runner", sources)[-1] in JAX
    sources["engine.blocks"] += "\nimport jax.numpy as jnp\n"
    assert reaches_jax("engine.scheduler", sources) == ["engine.scheduler", "engine.blocks", "jax"]
    sources = modules()
    sources["engine.request"] += "\ndef f():\n    import jax\n"
    assert reaches_jax("engine.scheduler", sources) == []
