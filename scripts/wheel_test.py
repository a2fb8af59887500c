"""Build the wheel and test it as a user gets it: ``python -m scripts.wheel_test``.

It is installed, not editable, in a virtual environment of its own, first without torch and then with it, and tested
from a folder that holds the tests and none of the source: by those tests that an installation can make fail, or with
``--all`` by every one, as another Python than the source tree's deserves. Each runs once, without torch where it needs
none. Everything happens in a temporary folder.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parent.parent

# What the command line and an init container pay before anything happens. The best of several counts: the first one
# compiles, and any of them can be disturbed.
_IMPORT_LIMIT_S = 0.2
_IMPORT_TRIES = 7

# What the tests need beside themselves.
_TEST_FILES = ("tests", "examples", "README.md", "pyproject.toml")
# The tests of what no wheel has stay out: of the benchmarks, the image and deploy/. So do those beside engines, which
# need what is not installed here.
_NOT_COPIED = shutil.ignore_patterns("__pycache__", "bench", "deploy", "engines", "image")

# What the wheel puts beside other packages: the package, and what its program begins with.
_INSTALLED = {"streamload", "streamload_command.py"}

# What a file, a package or torch that is missing would break: the package's face, its programs, one suite for every
# source, and a load of each kind. The others see nothing but code that they have been run on in the source tree.
_OF_AN_INSTALLATION = (
    *("tests/cli", "tests/service", "tests/stage", "tests/vllm", "tests/sources/test_conformance.py"),
    *("tests/sources/test_open_source.py", "tests/test_architecture.py", "tests/test_demo.py", "tests/test_doctor.py"),
    *("tests/test_example_source.py", "tests/test_load_s3.py", "tests/test_loader.py", "tests/test_manifests.py"),
    *("tests/test_package.py", "tests/test_presharded.py", "tests/test_transformers.py"),
)

# What needs more than Python packages is tested elsewhere.
_HERE = "not gpu and not root and not cloud and not image"

_TIME_THE_IMPORT = """
import time
began = time.perf_counter()
import streamload
print(time.perf_counter() - began)
"""
_SHOW_THE_PLACE = "import streamload; print(streamload.__file__)"
_FIND_TORCH = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"


def main() -> None:
    """Build, install, test.

    Raises:
        SystemExit: A check failed; the text says which.
    """
    parser = argparse.ArgumentParser(prog="python -m scripts.wheel_test", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="test on this interpreter, such as python3.13")
    parser.add_argument("--without-torch", action="store_true", help="leave out the second part, which needs torch")
    parser.add_argument("--all", action="store_true", help="every test, not only those of an installation")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="streamload-wheel-") as name:
        folder = Path(name)
        wheel = _build(folder / "dist")
        tests = _copy_tests(folder / "tests")
        _run([arguments.python, "-m", "venv", folder / "venv"])
        python = folder / "venv" / "bin" / "python"

        _headline("The wheel, without torch")
        _install(python, f"{wheel}[test]")
        _check_without_torch(python, tests)
        torchless, others = _split_tests(tests, ("tests",) if arguments.all else _OF_AN_INSTALLATION)
        _run_tests(python, tests, f"{_HERE} and not torch", torchless)

        if not arguments.without_torch:
            _headline("The wheel, with torch")
            _install(python, f"{wheel}[test,torch,runai,transformers]")
            _run_tests(python, tests, f"{_HERE} and torch", torchless)
            _run_tests(python, tests, _HERE, others)


def _build(dist: Path) -> Path:
    _headline("Building the sdist, and the wheel from it")
    _run([sys.executable, "-m", "build", "--outdir", dist, _ROOT], quiet=True, PIP_CONSTRAINT=_ROOT / "constraints.txt")
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        _check_contents(wheel, archive.namelist(), ("streamload/py.typed", ".dist-info/licenses/LICENSE"))
        strangers = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" not in name} - _INSTALLED
    if strangers:
        sys.exit(f"{wheel.name} would install more than streamload: {', '.join(sorted(strangers))}")
    with tarfile.open(sdist) as archive:
        _check_contents(
            sdist, archive.getnames(), ("/LICENSE", "/README.md", "/pyproject.toml", "/tests/test_package.py")
        )
    print(f"{sdist.name}, {wheel.name} ({wheel.stat().st_size / 1024:.0f} KiB)", flush=True)
    return wheel


def _check_contents(archive: Path, names: Iterable[str], wanted: Iterable[str]) -> None:
    names = list(names)
    for suffix in wanted:
        if not any(name.endswith(suffix) for name in names):
            sys.exit(f"{archive.name} holds no {suffix.lstrip('/')}")


def _copy_tests(folder: Path) -> Path:
    folder.mkdir()
    for name in _TEST_FILES:
        if (_ROOT / name).is_dir():
            shutil.copytree(_ROOT / name, folder / name, ignore=_NOT_COPIED)
        else:
            shutil.copy(_ROOT / name, folder / name)
    return folder


def _install(python: Path, requirement: str) -> None:
    pip: list[str | Path] = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    _run([*pip, "--constraint", _ROOT / "constraints.txt", requirement])


def _check_without_torch(python: Path, folder: Path) -> None:
    if subprocess.run([python, "-c", _FIND_TORCH], cwd=folder, env=_environment(), check=False).returncode:
        sys.exit("torch is installed although nobody asked for it")
    place = _run([python, "-c", _SHOW_THE_PLACE], cwd=folder, quiet=True).strip()
    if not Path(place).is_relative_to(python.parent.parent):
        sys.exit(f"not the installed package: {place}")
    best = min(float(_run([python, "-c", _TIME_THE_IMPORT], cwd=folder, quiet=True)) for _ in range(_IMPORT_TRIES))
    print(f"import streamload: {best:.3f} s at best, {_IMPORT_LIMIT_S} s allowed", flush=True)
    if best >= _IMPORT_LIMIT_S:
        sys.exit("import streamload takes too long")
    _run([python, "--version"])
    _run([python.parent / "streamload", "--version"], cwd=folder)


def _split_tests(folder: Path, chosen: Sequence[str]) -> tuple[list[str], list[str]]:
    """The chosen test files that import no torch, neither themselves nor through other modules, and those that do."""
    if missing := [path for path in chosen if not (folder / path).exists()]:
        sys.exit(f"there are no tests called {', '.join(missing)}")
    tests = _modules(folder, "tests")
    imports = {
        name: set(_imports(ast.parse(path.read_text(encoding="utf-8"))))
        for name, path in (tests | _modules(_ROOT, "streamload")).items()
    }
    needing = {"torch"}
    while more := {name for name, imported in imports.items() if imported & needing} - needing:
        needing |= more
    files = {
        name: str(path.relative_to(folder))
        for name, path in tests.items()
        if path.name.startswith("test_") and any(path.is_relative_to(folder / each) for each in chosen)
    }
    return (
        [path for name, path in files.items() if name not in needing],
        [path for name, path in files.items() if name in needing],
    )


def _modules(root: Path, package: str) -> dict[str, Path]:
    """Every module under a folder, by its name."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((root / package).rglob("*.py"))
    }


def _imports(tree: ast.Module) -> Iterator[str]:
    """The modules imported where a module is loaded: with ``tests.a.b``, ``tests.a`` and ``tests`` as well."""
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _run_tests(python: Path, folder: Path, marks: str, files: Sequence[str]) -> None:
    _run([python, "-m", "pytest", "-n", "auto", "-m", marks, *files], cwd=folder)


def _run(command: Sequence[str | Path], *, cwd: Path | None = None, quiet: bool = False, **environment: Path) -> str:
    """Run a command; where it fails, end the program with its exit code, and its output if that was not shown yet."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=_environment() | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout or "", done.stderr or "", sep="", end="", file=sys.stderr)
        print(f"failed: {' '.join(map(str, command))}", file=sys.stderr)
        sys.exit(done.returncode)
    return done.stdout or ""


def _environment() -> dict[str, str]:
    # PYTHONPATH could bring the source tree back, or another torch.
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
