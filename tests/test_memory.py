"""Memory that is left: the machine's, or what the limits of its containers leave of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lilt.memory import available

MIB = 2**20
Group = Callable[..., None]
NAMES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
# as the kernel writes it: of all kinds in version 1, one line in version 2, both side by side
WHERE = {
    2: "0::{}\n",
    1: "9:name=systemd:/other\n4:cpu,memory:{}\n0::/other\n",
}


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine with 4 GiB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 4096 * MIB}))
    return 4096 * MIB


def write(root: Path, version: int, path: str, limit: str, used: int = 0, inactive: int = 0) -> None:
    """Write the files of a control group."""
    folder = root / "sys/fs/cgroup" / ("" if version == 2 else "memory") / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    names = NAMES[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_anon 7\n{names[2]} {inactive}\nactive_file 9\n")


def belongs(root: Path, version: int, path: str) -> None:
    """Say where the process belongs."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(WHERE[version].format(path))


versions = pytest.mark.parametrize("version", [1, 2])


@versions
def test_what_the_own_group_leaves_counts_with_what_it_can_give_back(tmp_path: Path, version: int) -> None:
    belongs(tmp_path, version, "/docker/one")
    write(tmp_path, version, "/docker/one", str(1024 * MIB), 300 * MIB, 100 * MIB)
    assert available(tmp_path) == 824 * MIB


@versions
def test_the_tightest_of_the_groups_around_counts(tmp_path: Path, version: int) -> None:
    belongs(tmp_path, version, "/pod/inner")
    write(tmp_path, version, "/pod/inner", str(1024 * MIB), 100 * MIB)
    write(tmp_path, version, "/pod", str(512 * MIB), 200 * MIB)
    write(tmp_path, version, "/elsewhere", str(1 * MIB))
    assert available(tmp_path) == 312 * MIB


@versions
def test_a_container_that_sees_its_own_group_as_the_root_has_its_limit(tmp_path: Path, version: int) -> None:
    for path in ("/", "/docker/named/outside", "/../../outside"):
        belongs(tmp_path, version, path)
        write(tmp_path, version, "/", str(256 * MIB), 56 * MIB)
        assert available(tmp_path) == 200 * MIB


@versions
@pytest.mark.parametrize("limit", ["max", "9223372036854771712", str(10**15)])
def test_without_a_limit_the_machine_counts(tmp_path: Path, free: int, version: int, limit: str) -> None:
    if limit == "max" and version == 1:
        return  # version 1 writes its largest number
    belongs(tmp_path, version, "/user")
    write(tmp_path, version, "/user", limit, 100 * MIB)
    assert available(tmp_path) == free


@versions
def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path, version: int) -> None:
    belongs(tmp_path, version, "/full")
    write(tmp_path, version, "/full", str(100 * MIB), 130 * MIB, 10 * MIB)
    assert available(tmp_path) == 0


def test_version_two_may_be_mounted_beside_version_one(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("3:cpuset:/\n0::/slice\n")
    write(tmp_path, 2, "unified/slice", str(64 * MIB), 4 * MIB)
    assert available(tmp_path) == 60 * MIB


def test_elsewhere_there_are_no_groups(tmp_path: Path, free: int) -> None:
    assert available(tmp_path) == free
    belongs(tmp_path, 2, "/named")  # and no file system of theirs
    assert available(tmp_path) == free


def test_here_it_is_at_most_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0 < available() <= psutil.virtual_memory().total
