"""The package as a whole: its public names, what importing it costs, and whether the README's examples hold."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamload

_PACKAGE = Path(streamload.__file__).parent
_README = Path(__file__).parent.parent / "README.md"
# What is made of torch's own classes, and imported only by those who have it.
_OF_TORCH = ("streamload.recording",)
_MODULES = [
    pytest.param(module.name, marks=[pytest.mark.torch] if module.name.startswith(_OF_TORCH) else [])
    for module in pkgutil.walk_packages(streamload.__path__, "streamload.")
    if not any(part.startswith("_") for part in module.name.split("."))
]

# Imported only when it is needed: each costs more than streamload itself, and none is needed by everybody.
_LATE = (
    "aiobotocore",
    "aiofiles",
    "aiohttp",
    "awscrt",
    "botocore",
    "huggingface_hub",
    "numpy",
    "rich",
    "safetensors",
    "torch",
    "uvloop",
)


def _python(code: str) -> str:
    """What a fresh interpreter prints; it must exit with code 0 and warn of nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class TestPublicNames:
    @pytest.mark.parametrize("name", ["streamload", *_MODULES])
    def test_all_names_exist_once(self, name: str) -> None:
        module = importlib.import_module(name)
        names = list(getattr(module, "__all__", ()))
        assert len(set(names)) == len(names)
        assert [each for each in names if not hasattr(module, each)] == []

    @pytest.mark.parametrize("name", _MODULES)
    def test_every_public_name_is_declared(self, name: str) -> None:
        module = importlib.import_module(name)
        assert module.__file__ is not None
        defined = _defined(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        declared = set(getattr(module, "__all__", ()))
        assert defined - declared == set()
        if not hasattr(module, "__path__"):
            assert declared - defined == set()

    def test_the_version_is_one(self) -> None:
        assert re.fullmatch(r"\d+\.\d+\.\d+(\.?[a-z]+\d+)*", streamload.__version__)

    def test_type_information_is_shipped(self) -> None:
        assert (_PACKAGE / "py.typed").is_file()


def _defined(module: ast.Module) -> set[str]:
    """The public names that a module defines itself; type variables are nobody's interface."""
    names: set[str] = set()
    for node in module.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(value=ast.Call(func=ast.Name(id="TypeVar" | "ParamSpec"))):
                pass
            case ast.Assign(targets=targets):
                names.update(target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return {name for name in names if not name.startswith("_")}


class TestImporting:
    def test_needs_no_torch(self) -> None:
        _python("import sys; sys.modules['torch'] = None; import streamload.cli; from streamload import *")

    def test_brings_in_nothing_large(self) -> None:
        loaded = json.loads(_python("import json, sys, streamload; print(json.dumps(sorted(sys.modules)))"))
        assert [name for name in _LATE if name in loaded] == []

    def test_starts_no_thread_and_prints_nothing(self) -> None:
        assert _python("import streamload, threading; assert threading.active_count() == 1") == ""


class TestReadme:
    def _blocks(self) -> list[str]:
        text = _README.read_text(encoding="utf-8")
        return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)

    def test_examples_compile(self) -> None:
        blocks = self._blocks()
        assert len(blocks) >= 3
        for block in blocks:
            compile(block, str(_README), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    def test_examples_use_names_that_exist(self) -> None:
        used = {
            node.attr
            for block in self._blocks()
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "streamload"
        }
        assert used - set(streamload.__all__) == set()
