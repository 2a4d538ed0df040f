"""The command lines as their users have them: processes of their own, and terminals."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRAMS = {"dispatcher": "dispatcher.cli.operator", "trackpost": "dispatcher.cli.customer"}
PATIENCE_S = 60.0  # before a program that hangs is called that


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a program left."""

    code: int
    out: str
    err: str = ""

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


class Shell:
    """Runs our programs in an environment that has nothing of the machine's own settings."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environ = {
            "HOME": str(home),
            "TMPDIR": str(home),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONWARNINGS": "error",
            "PYTHONUTF8": "1",
        }
        if binaries := os.environ.get("DISPATCHER_TEST_BIN"):
            self.environ["DISPATCHER_EMBEDDED_BIN"] = binaries

    def start(self, program: str, *arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> Any:
        start = f"from {PROGRAMS[program]} import main; main(prog_name={program!r})"
        command = [sys.executable, "-c", start, *arguments]
        environ = {**self.environ, **(env or {})}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environ, cwd=self.home, encoding="utf-8", **(streams | options))

    def run(
        self, program: str, *arguments: str, given: str | None = None, env: Mapping[str, str] | None = None
    ) -> Ended:
        options = {} if given is None else {"stdin": subprocess.PIPE}
        with self.start(program, *arguments, env=env, **options) as process:
            try:
                out, err = process.communicate(given, timeout=PATIENCE_S)
            except BaseException:
                process.kill()
                raise
        return Ended(process.returncode, out, err)

    def run_on_terminal(
        self, program: str, *arguments: str, typed: str = "", columns: int = 120, env: Mapping[str, str] | None = None
    ) -> Ended:
        """All three streams are one terminal, on which `typed` has been typed."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        env = {"TERM": "xterm", "NO_COLOR": "1", **(env or {})}
        with self.start(program, *arguments, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            os.write(ours, typed.encode())
            shown = _until_closed(ours)
            return Ended(process.wait(PATIENCE_S), shown.replace("\r\n", "\n"))


def _until_closed(terminal: int) -> str:
    shown = b""
    try:
        while block := os.read(terminal, 65536):
            shown += block
    except OSError:  # how Linux says that the other side is gone
        pass
    finally:
        os.close(terminal)
    return shown.decode()
