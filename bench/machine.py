"""What the operating system knows: CPU and memory of processes, and what machine this is.

Read from /proc, so only on Linux; elsewhere figures are None and the tables show a dash.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Final

from dispatcher.build import IS_COMPILED

TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
ROOT: Final = Path(__file__).resolve().parent.parent


def _stat(pid: int | str) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the third on; the second is a name and may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None


def cpu_s(pid: int | None) -> float | None:
    """User and system time of a process and all its threads, in seconds; 10 ms steps."""
    fields = _stat(pid) if pid else None
    return None if fields is None else (int(fields[11]) + int(fields[12])) * TICK_S


def tree_cpu_s(pid: int | None) -> float | None:
    """The same with its children, living and buried: all of a PostgreSQL, given its postmaster."""
    fields = _stat(pid) if pid else None
    if fields is None or pid is None:
        return None
    total = sum(int(fields[at]) for at in (11, 12, 13, 14)) * TICK_S
    return total + sum(cpu_s(child) or 0.0 for child in children(pid))


def children(pid: int) -> list[int]:
    """The processes whose parent this is."""
    found = defaultdict(list)
    for name in (path.name for path in Path("/proc").iterdir()):
        if name.isdigit() and (fields := _stat(name)) is not None:
            found[int(fields[1])].append(int(name))
    return found[pid]


def parent(pid: int) -> int | None:
    """Who started a process."""
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def rss_bytes(pid: int | None) -> int | None:
    """Resident memory."""
    fields = _stat(pid) if pid else None
    return None if fields is None else int(fields[21]) * PAGE_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What a figure cannot be read without."""

    cpu: str
    cores: int
    memory_mb: int | None
    kernel: str
    python: str
    uvloop: str
    asyncpg: str
    dispatcher: str
    git: str


def facts() -> Facts:
    """This machine and these versions."""
    versions = {name: _version(name) for name in ("uvloop", "asyncpg", "trackpost-dispatcher")}
    return Facts(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_mb=os.sysconf("SC_PHYS_PAGES") * PAGE_BYTES >> 20 if "SC_PHYS_PAGES" in os.sysconf_names else None,
        kernel=f"{platform.system()} {platform.release()}",
        python=f"{platform.python_implementation()} {platform.python_version()}",
        uvloop=versions["uvloop"],
        asyncpg=versions["asyncpg"],
        dispatcher=f"{versions['trackpost-dispatcher']}, {'compiled' if IS_COMPILED else 'not compiled'}",
        git=_revision(),
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _revision() -> str:
    """The commit, with a plus sign when the tree differs from it."""
    try:
        said = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "-"
    return said.stdout.strip()


def python() -> str:
    """The interpreter that this runs on."""
    return sys.executable
