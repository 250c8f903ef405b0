"""The sources as these tests read them: every module of ours and what it imports."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron"


@dataclass(frozen=True)
class Import:
    """One imported name, at its place in a file."""

    importer: str  # dotted name of the module that imports
    name: str  # dotted name of what is imported; of `from a import b`: a.b
    line: int
    is_at_module_level: bool  # runs whenever the importer is imported

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name}"


def our_modules() -> dict[str, Path]:
    """Return every module under ``megatron/`` by its dotted name."""
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = path
    return modules


def imports() -> Iterator[Import]:
    """Yield every import of every module of ours, those inside of functions too."""
    for name, path in our_modules().items():
        yield from _imports_of(name, path.read_text())


def imports_below(*places: str) -> Iterator[Import]:
    """Yield every import of the Python files at or below ``places`` of the repository."""
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield from _imports_of(str(file.relative_to(ROOT)), file.read_text())


def _imports_of(importer: str, source: str) -> Iterator[Import]:
    tree = ast.parse(source)
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        is_at_module_level = id(node) not in inside_functions
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(importer, alias.name, node.lineno, is_at_module_level)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                for alias in names:
                    target = f"{module}.{alias.name}"
                    yield Import(importer, target, node.lineno, is_at_module_level)
            case ast.ImportFrom():
                raise AssertionError(f"{importer}:{node.lineno}: relative import; write megatron.…")
