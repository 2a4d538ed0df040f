"""A process that accepts whatever connects and never says a word. Prints its ports; ends with its standard input."""

from __future__ import annotations

import asyncio
import resource
import sys

import uvloop

PORTS = 8  # so that no two connections need to share a listener's queue for long


class Silent(asyncio.Protocol):
    """One connection, for ever."""


async def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Silent, "127.0.0.1", 0, backlog=4096) for _ in range(PORTS)]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


uvloop.run(main())
