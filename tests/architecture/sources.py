"""What the architecture tests know of the tree: which files there are and what each of them imports."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("service", "models", "training")


class Use(NamedTuple):
    """One import in one file.

    Attributes:
        file: path from the repository's root, with slashes.
        module: dotted name of what is imported; a name taken from one of our packages is followed to its module.
    """

    file: str
    module: str


@cache
def source_files() -> tuple[str, ...]:
    """Return every Python file of the three packages, from the repository's root."""
    return tuple(
        sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    )


@cache
def parse(file: str) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse((ROOT / file).read_text(), file)


@cache
def uses() -> tuple[Use, ...]:
    """Return every import of every source file, wherever in the file it stands."""
    return tuple(Use(file, module) for file in source_files() for module in sorted(_imports(parse(file))))


def doors(library: str) -> set[str]:
    """Return the source files that import a library or a part of it."""
    return {use.file for use in uses() if belongs(use.module, library)}


def belongs(module: str, package: str) -> bool:
    """Tell whether a dotted name is a package or lies inside it."""
    return module == package or module.startswith(f"{package}.")


def module_of(file: str) -> str:
    """Return the dotted name of a source file."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that a reader sees from where"
            found |= {_followed(str(node.module), alias.name) for alias in node.names}
    return found


def _followed(package: str, name: str) -> str:
    """Follow `from service.routes import lines` to the module `service.routes.lines`, where there is one."""
    place = ROOT / package.replace(".", "/") / name
    return f"{package}.{name}" if place.with_suffix(".py").is_file() or place.is_dir() else package
