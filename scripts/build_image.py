"""Build an image of the Dockerfile's where no registry can be asked: ``python -m scripts.build_image init``.

Needs root on Debian 12, and its packages buildah and debootstrap. In the place of the base image stands a Debian of the
same release with Debian's own Python: that proves the Dockerfile's steps, not its exact base. What is built, and the
base, stay in build/image, where podman finds them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["BASE", "TARGETS", "build", "podman", "size_bytes"]

_ROOT = Path(__file__).resolve().parent.parent
_STORE = _ROOT / "build" / "image"

TARGETS = ("init", "loader")
BASE = "localhost/python:3.11-slim-bookworm"

_SUITE = "bookworm"
_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# buildah ignores what the environment says of the driver beside --root.
_WHERE = ("--root", str(_STORE / "store"), "--runroot", str(_STORE / "run"), "--storage-driver", "overlay")


def build(target: str) -> str:
    """Build a target of the Dockerfile; the base first, where it is not there yet.

    Returns:
        The image's name.

    Raises:
        CalledProcessError: A command failed; it has said why.
    """
    _STORE.mkdir(parents=True, exist_ok=True)
    if subprocess.run([*_buildah(), "inspect", "--type", "image", BASE], capture_output=True, check=False).returncode:
        _build_base()
    tag = f"localhost/streamload:{target}"
    with _machines_own() as mounts:
        # Chroot: a build needs no more isolation than the rest of this script. Docker's format, since it is Docker's.
        options = ["--isolation", "chroot", "--pull=never", "--layers", "--format", "docker", *mounts]
        _run([*_buildah(), "build", *options, "--build-arg", f"BASE={BASE}", "--target", target, "--tag", tag, _ROOT])
    return tag


def podman(*arguments: str) -> list[str]:
    """The command line that has podman do something with what is built."""
    # runc knows both versions of cgroups, and a machine that has both.
    run_by = ("--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc")
    return ["podman", *_WHERE, *run_by, *arguments]


def size_bytes(image: str) -> int:
    """How large an image is, its base included."""
    shown = _run(podman("image", "inspect", image), quiet=True)
    found: int = json.loads(shown)[0]["Size"]
    return found


def _build_base() -> None:
    mirrors = _run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", f"Release: {_SUITE}"], quiet=True
    ).split()
    if not mirrors:
        sys.exit(f"this needs a Debian {_SUITE}, whose own mirror is then asked")
    with tempfile.TemporaryDirectory(dir=_STORE) as name:
        folder = Path(name)
        _run(
            ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, folder, sorted(mirrors)[0]],
            quiet=True,
        )
        for left in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(folder / left)
            (folder / left).mkdir()
        # As the image for which it stands has it: pip installs where it is told to, and there is a `python`.
        for marker in folder.glob("usr/lib/python3.*/EXTERNALLY-MANAGED"):
            marker.unlink()
        (folder / "usr/bin/python").symlink_to("python3")
        (folder / "etc/pip.conf").touch()  # mounted over while an image is built, so that a build leaves nothing new
        container = _run([*_buildah(), "from", "scratch"], quiet=True).strip()
        _run([*_buildah(), "add", "--quiet", container, folder, "/"], quiet=True)
        _run([*_buildah(), "config", "--env", f"PATH={_PATH}", container], quiet=True)
        _run([*_buildah(), "commit", "--quiet", "--format", "docker", "--rm", container, BASE], quiet=True)


@contextmanager
def _machines_own() -> Iterator[list[str]]:
    """What leads pip to the indexes that this machine is set to, and to no others; nothing of it enters the image."""
    shown = _run([sys.executable, "-m", "pip", "config", "list"], quiet=True)
    settings = dict(re.findall(r"^(?:global|:env:)\.([a-z-]+)='(.*)'$", shown, re.MULTILINE))
    kept = {name: settings[name] for name in ("index-url", "cert", "timeout", "find-links") if name in settings}
    mounts = ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    if Path(kept.get("find-links", "")).is_absolute():
        mounts += ["--volume", "{0}:{0}:ro".format(kept["find-links"])]
    with tempfile.NamedTemporaryFile("w", dir=_STORE, suffix=".conf") as file:
        file.write("\n".join(["[global]", *(f"{name} = {value}" for name, value in kept.items()), ""]))
        file.flush()
        yield [*mounts, "--volume", f"{file.name}:/etc/pip.conf:ro"]


def _buildah() -> list[str]:
    return ["buildah", *_WHERE]


def _run(command: Sequence[str | Path], *, quiet: bool = False) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE if quiet else None, text=True, check=False)
    if done.returncode:
        print(done.stdout or "", end="", file=sys.stderr)
        done.check_returncode()
    return done.stdout or ""


def main() -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m scripts.build_image", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    target = parser.parse_args().target
    tag = build(target)
    print(f"{tag}: {(size_bytes(tag) - size_bytes(BASE)) / 1e6:.0f} MB over {BASE}", flush=True)


if __name__ == "__main__":
    main()
