"""What this machine, or the container in it, allows: memory, processes on the node, open files."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HostLimits", "host_limits"]

# cgroup v1 says "no limit" with the largest multiple of a page that fits 63 bits.
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Limits that a load has to live within.

    Attributes:
        available_bytes: Memory that can still be had: the least of what the machine has and what the control group's
            limit leaves.
        bound_by: Which of the two it is: ``machine``, ``cgroup v1`` or ``cgroup v2``.
        open_files: The soft limit on open files.
        locked_bytes: The soft limit on locked memory; None where there is none.
    """

    available_bytes: int
    bound_by: str
    open_files: int
    locked_bytes: int | None


def host_limits(root: Path = Path("/")) -> HostLimits:
    """Read the limits of the process that calls.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.

    Source: proc(5), and the kernel's "Control Group v2" and "Memory Resource Controller" documents.
    """
    available = _machine_available(root)
    bound_by = "machine"
    for kind, headroom in _cgroup_headrooms(root):
        if headroom < available:
            available, bound_by = headroom, kind
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return HostLimits(
        available_bytes=available,
        bound_by=bound_by,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
    )


def _machine_available(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return _UNLIMITED


def _cgroup_headrooms(root: Path) -> list[tuple[str, int]]:
    """The headroom in each control group that this process is in, from the innermost to the root."""
    found: list[tuple[str, int]] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, limit, usage, kind = root / "sys/fs/cgroup", "memory.max", "memory.current", "cgroup v2"
        elif "memory" in controllers.split(","):
            base, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            usage, kind = "memory.usage_in_bytes", "cgroup v1"
        else:
            continue
        folder = base / path.lstrip("/")
        # In a container the path may be the host's, which is not visible: the mount's own root is then the group.
        if not folder.is_dir():
            folder = base
        while True:
            headroom = _headroom(folder / limit, folder / usage, folder / "memory.stat")
            if headroom is not None:
                found.append((kind, headroom))
            if folder == base:
                break
            folder = folder.parent
    return found


def _headroom(limit: Path, usage: Path, stat: Path) -> int | None:
    """What a group's limit leaves; page cache that can be dropped counts as free."""
    most, used = _number(limit), _number(usage)
    if most is None or most >= _UNLIMITED or used is None:
        return None
    droppable = 0
    for line in _text(stat).splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            droppable = int(value)
    return max(0, most - used + droppable)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
