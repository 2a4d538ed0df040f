"""What the service manager is told, if there is one: sd_notify(3) over a datagram socket, and nothing else."""

from __future__ import annotations

import os
import socket
import time


def notify(*assignments: str) -> bool:
    """Send assignments like `READY=1` in one datagram; False when nobody listens. Never raises."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return False
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0)) as out:
            out.sendto("\n".join(assignments).encode(), address)
    except OSError:
        return False
    return True


def reloading() -> None:
    """Say that a reload begins, with the clock that `Type=notify-reload` insists on."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def watchdog_s() -> float | None:
    """How often to say that we live, half the service manager's limit; None if it does not ask us."""
    usec, pid = os.environ.get("WATCHDOG_USEC"), os.environ.get("WATCHDOG_PID")
    if not usec or not usec.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2e6
