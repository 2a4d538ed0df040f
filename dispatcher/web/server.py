"""Listening."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Final

from aiohttp import web

from dispatcher.config import host_and_port
from dispatcher.errors import ConfigurationError
from dispatcher.web.door import Door

SHUTDOWN_S: Final = 5.0
"""How long requests that are being answered may still take after the listener closed."""


async def serve(
    app: web.Application, listen: str, *, key: str = "[server] listen", sockets: Sequence[socket.socket] = ()
) -> web.AppRunner:
    """Serve `app` at `listen` ("host:port"; port 0 takes a free one, `runner.addresses` says which).

    `sockets` that somebody else listens on already take the place of `listen`. The runner's `cleanup` ends it. Raises
    ConfigurationError, naming `key`, when nobody can listen there.
    """
    runner = Door(app, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        if not sockets:
            host, port = host_and_port(listen)
            await web.TCPSite(runner, host, port).start()
        for each in sockets:
            await web.SockSite(runner, each).start()
    except (OSError, ValueError) as error:
        await runner.cleanup()
        what = f'{key} = "{listen}"' if not sockets else f"{key}: the socket that was passed in its place"
        raise ConfigurationError([f"{what}: cannot listen there: {_reason(error)}"]) from None
    return runner


def _reason(error: OSError | ValueError) -> str:
    # asyncio repeats the address in a sentence of its own around what the system says.
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number).lower() if number is not None and number > 0 else str(error)
