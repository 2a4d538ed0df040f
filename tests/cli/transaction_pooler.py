"""A pooler in transaction mode, as a client sees it: server connections are lent for one transaction at a time."""

from __future__ import annotations

import asyncio
from typing import Any

SSL_REQUEST = (80877103).to_bytes(4, "big")


class TransactionPooler:
    """Listens on loopback, and lends two connections to the server at `path`, the last returned first.

    Like newer poolers it makes prepared statements known to whichever connection it lends, so that only what truly
    belongs to a session is lost.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._idle: asyncio.LifoQueue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.LifoQueue()
        self._greeting = b""
        self._server: Any = None
        self._writers: list[asyncio.StreamWriter] = []
        self._prepared: dict[bytes, bytes] = {}  # name → the message that prepares it; names differ between clients
        self._unasked = 0
        self._known: dict[int, set[bytes]] = {}  # to which connection

    async def start(self) -> int:
        """Listen; return the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self._writers.append(to_client)
        try:
            await self._greet(client, to_client)
            await self._relay(client, to_client)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            to_client.close()

    async def _greet(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        startup = await _startup(client)
        if startup[4:8] == SSL_REQUEST:
            to_client.write(b"N")
            startup = await _startup(client)
        while not self._greeting or self._idle.qsize() + len(self._writers) < 4:
            server, to_server = await asyncio.open_unix_connection(self._path)
            self._writers.append(to_server)
            to_server.write(startup)
            greeting = b""
            while True:
                message = await _message(server)
                greeting += message
                if message[:1] == b"Z":
                    break
            self._greeting = greeting
            self._idle.put_nowait((server, to_server))
        to_client.write(self._greeting)

    async def _relay(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        lent: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        done = asyncio.Event()
        done.set()
        pump: asyncio.Task[None] | None = None
        while True:
            message = await _message(client)
            if message[:1] == b"X":
                return
            if done.is_set():
                lent = await self._idle.get()
                done.clear()
                pump = asyncio.create_task(self._pump(lent, to_client, done))
            assert lent is not None
            assert pump is not None
            self._prepare(message, lent[1])
            lent[1].write(message)

    def _prepare(self, message: bytes, to_server: asyncio.StreamWriter) -> None:
        known = self._known.setdefault(id(to_server), set())
        if message[:1] == b"P":
            name = message[5:].split(b"\0")[0]
            self._prepared[name] = message
            known.add(name)
            return
        name = message[5:].split(b"\0")[1] if message[:1] == b"B" else message[6:].split(b"\0")[0]
        if message[:1] in {b"B", b"D"} and name in self._prepared and name not in known:
            known.add(name)
            to_server.write(self._prepared[name])
            self._unasked += 1

    async def _pump(self, lent: Any, to_client: asyncio.StreamWriter, done: asyncio.Event) -> None:
        """Pass answers on until the transaction is over; notifications have nobody to go to."""
        while True:
            message = await _message(lent[0])
            if message[:1] == b"1" and self._unasked:  # ParseComplete, for what we prepared
                self._unasked -= 1
                continue
            if message[:1] == b"A":
                continue
            is_over = message[:1] == b"Z" and message[5:6] == b"I"
            if is_over:
                self._idle.put_nowait(lent)
                done.set()
            to_client.write(message)
            if is_over:
                return


async def _startup(client: asyncio.StreamReader) -> bytes:
    length = await client.readexactly(4)
    return length + await client.readexactly(int.from_bytes(length, "big") - 4)


async def _message(stream: asyncio.StreamReader) -> bytes:
    head = await stream.readexactly(5)
    return head + await stream.readexactly(int.from_bytes(head[1:], "big") - 4)
