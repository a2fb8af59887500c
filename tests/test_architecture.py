"""Which part of the package may import which: the data goes one way, the core is pure, one place reads the environment.

The rules are about the source text, imports inside functions and for type checking included.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

import streamload

_PACKAGE = Path(streamload.__file__).parent
_FILES = sorted(_PACKAGE.rglob("*.py"))

# Modules at the bottom: what to raise, how to name, show and sum up things, what is lent, what is told.
_BOTTOM = {"checksums", "errors", "events", "loan", "units", "uris"}
# Which parts of streamload each folder may import beside itself; "" is the package's public face.
_MAY_IMPORT = {
    "checkpoint": {"errors"},
    "plan": {"checkpoint", "errors"},
    "wire": {"errors"},
    "sources": {*_BOTTOM, "checkpoint", "plan", "wire"},
    # Which tensors have memory, and which share it, is asked where they are filled and where they are saved.
    "sinks": {*_BOTTOM, "checkpoint", "plan", "shared_memory"},
    # What it finds out is where elements go, and that is the sinks' matter; whose code it runs is the caller's.
    "recording": {*_BOTTOM, "checkpoint", "plan", "shared_memory", "sinks", "slicing"},
    # The two contracts, and no concrete source or sink.
    "pipeline": {*_BOTTOM, "checkpoint", "plan", "report", "sources.base", "sinks.base"},
    # A file's layout and checksums are the checkpoint's; S3 is asked as it is for reading.
    "save": {*_BOTTOM, "checkpoint", "plan", "sources", "shared_memory", "sinks.dtypes"},
    # Reads as a load does, and writes what it has read.
    "stage": {*_BOTTOM, "checkpoint", "host", "options", "pipeline", "planning", "report", "sources"},
    # Stages, and says on HTTP how far it is.
    "service": {*_BOTTOM, "deadlines", "options", "progress", "sources", "stage"},
    "integrations": {""},
    # A loader like those at the top, for what an engine says.
    "vllm": {"", *_BOTTOM, "checkpoint", "loader", "options", "pipeline", "planning", "report", "slicing"},
    # Sizes are read and written on the command line as they are in messages; what it can be told comes from the
    # environment as well, which one module reads.
    "cli": {"", "options", "units"},
}
# Folders that hold pure functions: the same arguments give the same result, and nothing outside is touched.
_PURE = ("checkpoint", "plan")
_IMPURE_MODULES = {
    *("aiofiles", "asyncio", "concurrent", "http", "io", "logging", "mmap", "multiprocessing", "os", "pathlib"),
    *("queue", "random", "select", "shutil", "signal", "socket", "subprocess", "sys", "tempfile", "threading"),
    *("time", "torch", "urllib", "uvloop"),
}
_IMPURE_CALLS = {"breakpoint", "input", "open", "print"}
# What an init container runs, without torch.
_WITHOUT_TORCH = ("checkpoint", "plan", "service", "sources", "stage", "wire")
# Run:ai's engine takes its settings from the environment and from nowhere else.
_TELLS_THE_ENGINE = _PACKAGE / "sources" / "runai_settings.py"
_ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"}


@cache
def _nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def _folder(path: Path) -> str:
    """The folder under ``streamload`` that a file belongs to; empty for a module at the top."""
    parts = path.relative_to(_PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def _files_of(*folders: str) -> list[Path]:
    return [path for path in _FILES if _folder(path) in folders]


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports; for ``from package import module``, both."""
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if (_PACKAGE.parent / name.replace(".", "/")).with_suffix(".py").is_file():
                    yield name


def _inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _breaches(files: list[Path], of: Callable[[Path], Iterator[str]], allowed: Callable[[str], bool]) -> list[str]:
    return [f"{path.relative_to(_PACKAGE)}: {what}" for path in files for what in of(path) if not allowed(what)]


@pytest.mark.parametrize("folder", _MAY_IMPORT)
def test_folders_import_only_what_they_may(folder: str) -> None:
    parts = {folder, *_MAY_IMPORT[folder]}

    def allowed(name: str) -> bool:
        return not _inside(name, "streamload") or any(
            _inside(name, f"streamload.{part}") if part else name == "streamload" for part in parts
        )

    assert _breaches(_files_of(folder), _imports, allowed) == []


@pytest.mark.parametrize("folder", _PURE)
def test_pure_folders_touch_nothing(folder: str) -> None:
    def allowed(name: str) -> bool:
        return name.split(".")[0] not in _IMPURE_MODULES

    assert _breaches(_files_of(folder), _imports, allowed) == []
    assert _breaches(_files_of(folder), _calls, lambda name: name not in _IMPURE_CALLS) == []


@pytest.mark.parametrize("folder", _WITHOUT_TORCH)
def test_folders_without_torch(folder: str) -> None:
    assert _breaches(_files_of(folder), _imports, lambda name: not _inside(name, "torch")) == []


def test_only_the_command_line_prints() -> None:
    others = [path for path in _FILES if _folder(path) != "cli"]
    assert _breaches(others, _calls, lambda name: name not in ("breakpoint", "input", "print")) == []


def test_only_the_options_read_the_environment() -> None:
    # What testing ships starts servers, and hands them the environment they run in.
    may = {_PACKAGE / "options.py", _TELLS_THE_ENGINE}
    others = [path for path in _FILES if path not in may and _folder(path) != "testing"]
    assert _breaches(others, _environment, lambda _: False) == []


def test_nothing_writes_the_environment() -> None:
    others = [path for path in _FILES if path != _TELLS_THE_ENGINE]
    assert _breaches(others, _environment_writes, lambda _: False) == []


def _calls(path: Path) -> Iterator[str]:
    for node in _nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def _environment(path: Path) -> Iterator[str]:
    for node in _nodes(path):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in _ENVIRONMENT:
            yield f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if f"os.{alias.name}" in _ENVIRONMENT:
                    yield f"line {node.lineno}"


def _environment_writes(path: Path) -> Iterator[str]:
    for node in _nodes(path):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changes = node.func.attr in ("clear", "pop", "popitem", "setdefault", "update")
            targets = [node.func.value] if changes else [node.func]
        for target in targets:
            owner = ast.unparse(target.value if isinstance(target, ast.Subscript) else target)
            if owner in ("os.environ", "os.environb", "os.putenv", "os.unsetenv"):
                yield f"line {target.lineno}"
