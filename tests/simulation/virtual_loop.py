"""An event loop whose clock jumps to the next timer, and processes that can be killed or frozen between two callbacks.

Nothing here waits and nothing here is random: callbacks run in the order they were scheduled, timers of one instant in
the order they were set, so a run is a function of what is put into it. Time passes only while nothing is ready.

A *process* is what dies or freezes together: every callback whose context says so. A killed one runs nothing more, not
even its `finally`s, exactly as after SIGKILL; a frozen one (SIGSTOP) finds everything that came meanwhile when it
thaws. Networking is whatever `network` makes of it.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

STARTED_AT = 1000.0
STEPS_PER_INSTANT_MAX = 200_000  # more than that without time passing is a loop that spins


class State(Enum):
    """What becomes of a process's callbacks."""

    RUNNING = "running"
    FROZEN = "frozen"
    DEAD = "dead"


class Process:
    """A unit of failure."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = State.RUNNING
        self.missed: list[asyncio.Handle] = []  # what would have run

    def __repr__(self) -> str:
        return self.name


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Deadlock(AssertionError):
    """Nothing will ever happen again, and somebody still waits."""


class Network(Protocol):
    """What stands behind the loop's sockets."""

    async def sock_connect(self, sock: Any, address: Any) -> None: ...

    async def create_connection(self, factory: Callable[[], Any], sock: Any) -> tuple[Any, Any]: ...


class NumberedTask(asyncio.Task[T]):
    """A task that hashes by its number: asyncio keeps tasks in sets, and walks over them."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], *, number: int, process: Process | None, **more: Any) -> None:
        self.number = number
        self.process = process
        super().__init__(coroutine, **more)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.AbstractEventLoop):
    """The loop. `on_step` is called after each callback."""

    def __init__(self) -> None:
        self.now = STARTED_AT
        self.steps = 0
        self.on_step: Callable[[], None] = lambda: None
        self.network: Network | None = None
        self.faults: list[dict[str, Any]] = []  # what callbacks raised
        self._ready: deque[tuple[asyncio.Handle, Process | None]] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle, Process | None]] = []
        self._numbers = itertools.count(1)
        self._instant_steps = 0
        self._closed = False

    # ── what asyncio asks for ──────────────────────────────────────────────────────────────────────────────────────

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self

    def is_closed(self) -> bool:
        return self._closed

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        process = PROCESS.get() if context is None else context.get(PROCESS)
        number = next(self._numbers)
        return NumberedTask(coro, number=number, process=process, loop=self, name=name, context=context)

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        if context is None:
            context = contextvars.copy_context()
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((handle, context.get(PROCESS)))
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        if context is None:
            context = contextvars.copy_context()
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle, context.get(PROCESS)))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are skipped when their time comes."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.faults.append(context)

    async def sock_connect(self, sock: Any, address: Any) -> None:
        assert self.network is not None
        await self.network.sock_connect(sock, address)

    async def create_connection(self, protocol_factory: Any, *, sock: Any = None, **_: Any) -> Any:  # type: ignore[override]
        assert self.network is not None
        return await self.network.create_connection(protocol_factory, sock)

    def close(self) -> None:
        self._ready.clear()
        self._timers.clear()
        self._closed = True

    def run_until_complete(self, future: Coroutine[Any, Any, T]) -> T:  # type: ignore[override]
        task = self.create_task(future, name="main")
        asyncio._set_running_loop(self)
        try:
            while not task.done():
                self._turn()
        finally:
            asyncio._set_running_loop(None)
        return task.result()

    # ── turns ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _turn(self) -> None:
        timers = self._timers
        if not self._ready:
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            if not timers:
                raise Deadlock("nothing will ever happen again")
            if timers[0][0] > self.now:
                self.now = timers[0][0]
                self._instant_steps = 0
        while timers and timers[0][0] <= self.now:
            _, _, timer, process = heapq.heappop(timers)
            self._ready.append((timer, process))
        handle, process = self._ready.popleft()
        if handle.cancelled():
            return
        if process is not None and process.state is not State.RUNNING:
            process.missed.append(handle)
            return
        self.steps += 1
        self._instant_steps += 1
        assert self._instant_steps < STEPS_PER_INSTANT_MAX, f"a loop that spins: {handle}"
        handle._run()
        self.on_step()

    # ── processes ──────────────────────────────────────────────────────────────────────────────────────────────────

    def spawn(self, process: Process, main: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `main` as that process."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        return self.create_task(main, name=name, context=context)

    def thaw(self, process: Process) -> None:
        """Go on where it was frozen; also buries the dead, once nothing they do can matter any more."""
        process.state = State.RUNNING
        missed, process.missed = process.missed, []
        self._ready.extend((handle, process) for handle in missed)

    def tasks_of(self, process: Process) -> list[asyncio.Task[Any]]:
        """Its unfinished tasks, oldest first."""
        own = [task for task in asyncio.all_tasks(self) if isinstance(task, NumberedTask) and task.process is process]
        return sorted(own, key=lambda task: task.number)
