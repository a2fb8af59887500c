"""What the machine or the container allows, read from folders that look like /proc and /sys."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from streamload.host import host_limits

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
# cgroup v1's way to say that there is no limit.
_V1_UNLIMITED = 9223372036854771712


class Machine:
    """A root with a machine of so much available memory, to which control groups can be added."""

    def __init__(self, root: Path, available_bytes: int = 16 * _GIB) -> None:
        self.root = root
        self._write(
            "proc/meminfo", f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {available_bytes // 1024} kB\n"
        )

    def member_of(self, *lines: str) -> None:
        self._write("proc/self/cgroup", "".join(f"{line}\n" for line in lines))

    def v2(self, path: str, limit: int | str, usage: int, inactive_file: int = 0) -> None:
        folder = f"sys/fs/cgroup/{path}"
        self._write(f"{folder}/memory.max", f"{limit}\n")
        self._write(f"{folder}/memory.current", f"{usage}\n")
        self._write(f"{folder}/memory.stat", f"anon 1\nfile 2\ninactive_file {inactive_file}\nactive_file 3\n")

    def v1(self, path: str, limit: int, usage: int, inactive_file: int = 0) -> None:
        folder = f"sys/fs/cgroup/memory/{path}"
        self._write(f"{folder}/memory.limit_in_bytes", f"{limit}\n")
        self._write(f"{folder}/memory.usage_in_bytes", f"{usage}\n")
        self._write(f"{folder}/memory.stat", f"cache 1\ninactive_file 0\ntotal_inactive_file {inactive_file}\n")

    def _write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def available(self) -> tuple[int, str]:
        limits = host_limits(self.root)
        return limits.available_bytes, limits.bound_by


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_no_control_group(machine: Machine) -> None:
    assert machine.available() == (16 * _GIB, "machine")


class TestV2:
    def test_a_limit(self, machine: Machine) -> None:
        machine.member_of("0::/pod/container")
        machine.v2("pod/container", 4 * _GIB, 1 * _GIB)
        assert machine.available() == (3 * _GIB, "cgroup v2")

    def test_no_limit(self, machine: Machine) -> None:
        machine.member_of("0::/pod")
        machine.v2("pod", "max", 1 * _GIB)
        assert machine.available() == (16 * _GIB, "machine")

    def test_page_cache_that_can_be_dropped_is_free(self, machine: Machine) -> None:
        machine.member_of("0::/pod")
        machine.v2("pod", 4 * _GIB, 4 * _GIB, inactive_file=3 * _GIB)
        assert machine.available() == (3 * _GIB, "cgroup v2")

    def test_the_tightest_of_all_groups_around_counts(self, machine: Machine) -> None:
        machine.member_of("0::/kubepods/pod/container")
        machine.v2("kubepods/pod/container", "max", 0)
        machine.v2("kubepods/pod", 2 * _GIB, 1 * _GIB)
        machine.v2("kubepods", 8 * _GIB, 1 * _GIB)
        assert machine.available() == (1 * _GIB, "cgroup v2")

    def test_a_limit_above_what_the_machine_has(self, machine: Machine) -> None:
        machine.member_of("0::/pod")
        machine.v2("pod", 64 * _GIB, 1 * _GIB)
        assert machine.available() == (16 * _GIB, "machine")

    def test_a_group_that_is_over_its_limit(self, machine: Machine) -> None:
        machine.member_of("0::/pod")
        machine.v2("pod", 1 * _GIB, 2 * _GIB)
        assert machine.available() == (0, "cgroup v2")

    def test_inside_a_container_the_mount_is_the_group(self, machine: Machine) -> None:
        machine.member_of("0::/kubepods.slice/of-the-host")
        machine.v2("", 2 * _GIB, 1 * _GIB)
        assert machine.available() == (1 * _GIB, "cgroup v2")

    def test_a_group_above_the_mount(self, machine: Machine) -> None:
        machine.member_of("0::/../../other")
        machine.v2("", 2 * _GIB, 1 * _GIB)
        assert machine.available() == (1 * _GIB, "cgroup v2")

    def test_a_name_with_colons(self, machine: Machine) -> None:
        machine.member_of("0::/a:b:c")
        machine.v2("a:b:c", 2 * _GIB, 1 * _GIB)
        assert machine.available() == (1 * _GIB, "cgroup v2")


class TestV1:
    def test_a_limit(self, machine: Machine) -> None:
        machine.member_of("12:cpu,cpuacct:/docker/abc", "5:memory:/docker/abc", "1:name=systemd:/docker/abc", "0::/")
        machine.v1("docker/abc", 4 * _GIB, 3 * _GIB, inactive_file=1 * _GIB)
        assert machine.available() == (2 * _GIB, "cgroup v1")

    def test_no_limit(self, machine: Machine) -> None:
        machine.member_of("5:memory:/docker/abc")
        machine.v1("docker/abc", _V1_UNLIMITED, 3 * _GIB)
        assert machine.available() == (16 * _GIB, "machine")

    def test_inside_a_container_the_mount_is_the_group(self, machine: Machine) -> None:
        machine.member_of("5:memory:/docker/of-the-host")
        machine.v1("", 4 * _GIB, 3 * _GIB)
        assert machine.available() == (1 * _GIB, "cgroup v1")

    def test_memory_shares_its_hierarchy(self, machine: Machine) -> None:
        machine.member_of("5:cpu,memory:/docker/abc")
        machine.v1("docker/abc", 4 * _GIB, 3 * _GIB)
        assert machine.available() == (1 * _GIB, "cgroup v1")


@pytest.mark.parametrize("text", ["", "no colons\n", "::\n", "0::\n", "x:memory:\n"])
def test_files_that_make_no_sense(machine: Machine, text: str) -> None:
    machine.member_of(text)
    assert machine.available() == (16 * _GIB, "machine")


def test_nothing_can_be_read(tmp_path: Path) -> None:
    assert host_limits(tmp_path).available_bytes > 1 << 50


def test_this_machine() -> None:
    limits = host_limits()
    assert limits.available_bytes > 0
    assert limits.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@pytest.mark.parametrize(("soft", "locked_bytes"), [(64 * _KIB, 64 * _KIB), (resource.RLIM_INFINITY, None)])
def test_locked_memory(monkeypatch: pytest.MonkeyPatch, soft: int, locked_bytes: int | None) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
    assert host_limits().locked_bytes == locked_bytes
