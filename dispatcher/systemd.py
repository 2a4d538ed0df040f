"""What passes between the service manager and us, if there is one.

We tell it how we are: sd_notify(3), a datagram each. It may hand us sockets that it listens on: sd_listen_fds(3).
"""

from __future__ import annotations

import os
import socket
import time
from typing import Final

FIRST_PASSED: Final = 3  # the descriptor that sockets are counted from


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


def take_sockets() -> list[tuple[str, socket.socket]]:
    """The listening sockets that were passed to us, each with its name (`FileDescriptorName=`), in order.

    They are ours from then on: a second call, and a child of ours, finds none. Raises OSError if a descriptor is none
    of a socket.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if not count.isdigit() or pid != str(os.getpid()):
        return []
    names += [""] * (int(count) - len(names))
    taken = []
    for descriptor, name in enumerate(names[: int(count)], FIRST_PASSED):
        os.set_inheritable(descriptor, False)
        taken.append((name, socket.socket(fileno=descriptor)))
    return taken
