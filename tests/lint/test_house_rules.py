"""The rules of the house, held by machines: style, types, layers, and what product code may not contain."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "sextant").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
HEAVY = {"triton", "transformers", "matplotlib", "pyarrow", "zstandard", "tensorboard", "fastapi", "datasets"}


def command(*words: str) -> str:
    """Run a tool of this environment; its output when it fails, else nothing."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def places(found: Iterator[tuple[Path, ast.AST]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}" for path, node in found]


def nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield path, node


def test_ruff():
    assert command(sys.executable, "-m", "ruff", "check", "--no-cache", ".") == ""


def test_pyright():
    assert command(sys.executable, "-m", "pyright", "sextant", "bench") == ""


def test_imports_point_downward():
    linter = str(Path(sys.executable).with_name("lint-imports"))
    assert command(linter, "--no-cache") == ""


def imported(node: ast.AST) -> set[str]:
    """Top-level packages that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()


def test_heavy_packages_are_imported_where_they_are_used():
    """At module level they would slow ``sextant --help`` and make an extra compulsory."""
    at_module_level = ((path, node) for path, tree in TREES.items() for node in tree.body if imported(node) & HEAVY)
    assert places(at_module_level) == []


def test_nothing_unpickles_or_evaluates_text():
    def bad(node: ast.AST) -> bool:
        if isinstance(node, ast.Import | ast.ImportFrom):
            return bool(imported(node) & {"pickle", "cloudpickle", "dill", "shelve", "marshal"})
        if not isinstance(node, ast.Call):
            return False
        return ast.unparse(node.func) in {"eval", "exec", "torch.load", "torch.save", "yaml.unsafe_load", "os.system"}

    assert places((path, node) for path, node in nodes(ast.Import, ast.ImportFrom, ast.Call) if bad(node)) == []


def test_no_bare_except():
    assert places((path, node) for path, node in nodes(ast.ExceptHandler) if not getattr(node, "type", None)) == []


def test_no_assert_in_product_code():
    """Asserts vanish under ``-O`` and say nothing to a user; errors have a class, a place and a remedy."""
    assert places(nodes(ast.Assert)) == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"\b(TODO|FIXME|XXX|HACK)\b",
        r"(?<![\w.~])/(home|root|Users|tmp|mnt|work)/",
        r"\.\./",
        r"type: ignore(?!\[)",
        r"\bnoqa(?!:)",
    ],
)
def test_text_is_clean(pattern):
    """No promises, no paths of one machine, no blanket silencing."""
    lines = ((path, n, line) for path in FILES for n, line in enumerate(path.read_text("utf-8").splitlines(), 1))
    assert [f"{path.relative_to(ROOT)}:{n}" for path, n, line in lines if re.search(pattern, line)] == []


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield path, node


def test_functions_are_short():
    lengths = {f"{path.name}:{node.name}": (node.end_lineno or 0) - node.lineno + 1 for path, node in functions()}
    assert {name: length for name, length in lengths.items() if length > 80} == {}
    assert statistics.median(lengths.values()) <= 12


def test_every_function_is_annotated():
    """Arguments and results, but for ``self`` and ``cls``."""

    def bare(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        has_result = node.returns is not None or node.name == "__init__"
        return not has_result or any(argument.annotation is None for argument in named)

    assert places((path, node) for path, node in functions() if bare(node)) == []


def test_every_module_says_what_it_is():
    empty = [path for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    assert [str(path.relative_to(ROOT)) for path in empty] == []
