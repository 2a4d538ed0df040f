"""One HTTP request and what came of it."""

from __future__ import annotations

from dispatcher.model import Result


class Attempt:
    """One HTTP request and what came of it. Made by the transport, once per request; never an exception.

    A plain slotted class, not a dataclass: one is made per delivery on the hot path.
    """

    __deletable__ = ["result"]  # noqa: RUF012  what a Released lacks; the compiler wants a list
    __slots__ = ("body", "duration_s", "error", "head", "result", "retry_after", "sent_at", "status")

    def __init__(  # noqa: PLR0917  by position on the hot path
        self,
        result: Result,
        status: int = 0,
        error: str | None = None,
        retry_after: bytes | None = None,
        head: bytes = b"",
        body: bytes = b"",
        sent_at: float = 0.0,
        duration_s: float = 0.0,
    ) -> None:
        self.result = result
        self.status = status  # 0: no final status line was read
        self.error = error  # None on a complete response of any status
        self.retry_after = retry_after  # the raw field value
        self.head = head  # the raw response head, at most 4 KiB
        self.body = body  # the first 4 KiB of the body, any bytes
        self.sent_at = sent_at  # loop time of the first byte written; 0.0 if none was
        self.duration_s = duration_s  # from submission to the end of the response

    def __repr__(self) -> str:
        what = self.error if self.error is not None else f"{self.status}"
        return f"<Attempt {self.result} {what} in {self.duration_s * 1e3:.1f} ms>"
