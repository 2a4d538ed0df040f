"""Everything a test by force needs, around one database."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from application import Application
from daemons import Program
from proof import Proof
from subscribers import Subscribers

TIMEOUT_S = "5"  # what was out at a crash may be due as late as 10 s behind it


class Siege:
    """Writers on one side, subscribers on the other, daemons between them, and the moments to strike."""

    def __init__(
        self, dsn: str, directory: Path, subscribers: Subscribers, dice: random.Random, tell: Callable[[str], None]
    ) -> None:
        self.dsn = dsn
        self.subscribers = subscribers
        self.dice = dice
        self.tell = tell
        self.application = Application(dsn, dice)
        self.proof = Proof(dsn, self.application, subscribers)
        self.daemons: list[Program] = []
        self._directory = directory

    def daemon(self, **settings: str) -> Program:
        name = f"daemon-{len(self.daemons) + 1}"  # by which subscribers tell who sent what
        settings = {"DISPATCHER_BRAND_USER_AGENT": name, "DISPATCHER_DELIVERY_TIMEOUT_S": TIMEOUT_S, **settings}
        self.daemons.append(Program(self._directory, self.dsn, **settings))
        return self.daemons[-1]

    async def serving(self, *, start: dict[str, Any] | None = None, **settings: str) -> Program:
        """A daemon that is ready and has the webhooks of the proof. `start` is what Popen is told."""
        daemon = self.daemon(**settings)
        daemon.start(**(start or {}))
        await daemon.is_ready()
        await self.proof.subscribe(daemon)
        return daemon

    def end(self) -> None:
        for daemon in self.daemons:
            daemon.end()
