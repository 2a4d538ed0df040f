"""Responses that no decent server sends, and what a request that gets one must come to.

One table for two stages: on a wire of our own, where each is also split into single bytes, and over sockets, behind
the whole deliverer.
"""

from __future__ import annotations

import dataclasses
import gzip
import random
from typing import Final

from dispatcher.model import Result

OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HEAD: Final = b"HTTP/1.1 200 OK\r\n"
NO_BODY: Final = b"Content-Length: 0\r\n\r\n"
NO_UTF_8: Final = b"\x00\xff\xfe\xc3\x28\x00"
EXABYTE: Final = HEAD + b"Content-Length: 1000000000000000000\r\n\r\n"
INTERIM: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNKED: Final = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BOMB: Final = gzip.compress(gzip.compress(bytes(64 << 20), 9, mtime=0), 9, mtime=0)  # 64 MiB, in a few hundred bytes

PROTOCOL, TIMEOUT, CONNECT = Result.PROTOCOL, Result.TIMEOUT, Result.CONNECT


@dataclasses.dataclass(frozen=True)
class Lie:
    """What a peer says once it has the request, and what that comes to."""

    name: str
    says: tuple[bytes, ...]
    result: Result
    status: int | None = None  # on record; None: whatever the pieces that it came in have shown
    words: str = ""  # the error holds them
    endless: bytes = b""  # said again and again after that
    closes: bool = True  # at the end, instead of keeping us waiting
    body: bytes | None = None  # what is kept of it

    def __str__(self) -> str:
        return self.name


def _garbage(name: str, text: bytes) -> Lie:
    return Lie(name, (text,), PROTOCOL, closes=False)


def _lengths() -> list[Lie]:
    """`Content-Length` and what it may be worth."""
    ok = Result.OK
    return [
        Lie("length short", (HEAD + b"Content-Length: 2\r\n\r\nok and ten more",), ok, 200, closes=False, body=b"ok"),
        Lie("length long, closes", (HEAD + b"Content-Length: 9\r\n\r\nok",), PROTOCOL, 200, "within the response body"),
        Lie("length long, holds", (HEAD + b"Content-Length: 9\r\n\r\nok",), TIMEOUT, 200, "(body)", closes=False),
        Lie("length of an exabyte", (EXABYTE,), ok, 200, endless=b"z" * 8192),
        Lie("length of an exabyte, and nothing", (EXABYTE,), TIMEOUT, 200,
            closes=False),
        _garbage("length negative", HEAD + b"Content-Length: -1\r\n\r\n"),
        _garbage("length beyond 64 bits", HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n"),
        _garbage("length hexadecimal", HEAD + b"Content-Length: 0x2\r\n\r\nok"),
        _garbage("length signed", HEAD + b"Content-Length: +2\r\n\r\nok"),
        _garbage("length with a fraction", HEAD + b"Content-Length: 2.0\r\n\r\nok"),
        _garbage("length as a list", HEAD + b"Content-Length: 2, 2\r\n\r\nok"),
        _garbage("length empty", HEAD + b"Content-Length: \r\n\r\n"),
        _garbage("length twice", HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok"),
        _garbage("length twice, and different", HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok"),
        _garbage("length with chunks", HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"),
        _garbage("length with a space before the colon", HEAD + b"Content-Length : 2\r\n\r\nok"),
        Lie("length folded", (HEAD + b"Content-Length:\r\n 2\r\n\r\nok",), PROTOCOL, closes=False),
    ]  # fmt: skip


def _chunks() -> list[Lie]:
    return [
        Lie("chunk beyond 64 bits", (CHUNKED + b"fffffffffffffffff\r\n",), PROTOCOL, 200, closes=False),
        Lie("chunk as large as 64 bits are", (CHUNKED + b"ffffffffffffffff\r\n",), Result.OK, 200, endless=b"z" * 8192),
        Lie("chunk negative", (CHUNKED + b"-1\r\n",), PROTOCOL, 200, closes=False),
        Lie("chunk of nothing hexadecimal", (CHUNKED + b"zz\r\n",), PROTOCOL, 200, closes=False),
        Lie("chunk longer than it says", (CHUNKED + b"2\r\nokok\r\n",), PROTOCOL, 200, closes=False, body=b"ok"),
        Lie("chunk that ends early", (CHUNKED + b"5\r\nab",), PROTOCOL, 200, "within the response body", body=b"ab"),
        Lie("chunk with an endless extension", (CHUNKED + b"1;x=",), Result.OK, 200, endless=b"y" * 8192),
        Lie("chunks of one byte without end", (CHUNKED,), Result.OK, 200, endless=b"1\r\nz\r\n" * 1000),
        Lie("trailers without end", (CHUNKED + b"0\r\n",), Result.OK, 200, endless=b"X-Trailer: y\r\n" * 500),
        Lie("last chunk missing", (CHUNKED + b"2\r\nok\r\n",), PROTOCOL, 200, "within the response body", body=b"ok"),
    ]  # fmt: skip


def _without_end() -> list[Lie]:
    return [
        Lie("headers without end", (HEAD,), PROTOCOL, words="longer than", endless=b"X-A: b\r\n" * 500),
        Lie("a header without end", (HEAD + b"X-A: ",), PROTOCOL, words="longer than", endless=b"y" * 8192),
        Lie("a status line without end", (b"HTTP/1.1 200 ",), PROTOCOL, words="longer than", endless=b"y" * 8192),
        Lie("empty lines without end", (), PROTOCOL, words="longer than", endless=b"\r\n" * 4096),
        Lie("a head of 40 kB at once", (HEAD + b"X-A: " + b"y" * 40_000 + b"\r\n" + NO_BODY,), PROTOCOL,
            200, "longer than", closes=False),
        Lie("two thousand headers", (HEAD + b"A:\r\n" * 2000 + NO_BODY,), PROTOCOL, 200,
            "response headers", closes=False),
        Lie("a body without end", (HEAD + b"\r\n",), Result.OK, 200, endless=b"z" * 8192, body=b"z" * 4096),
        Lie("an error's body without end", (b"HTTP/1.1 500 No\r\n\r\n",), Result.SERVER_ERROR, 500,
            endless=b"z" * 8192),
        Lie("interim responses without end", (), PROTOCOL, words="interim", endless=INTERIM * 100),
        Lie("a hundred interim responses, then the final one", (INTERIM * 100 + OK,), PROTOCOL,
            words="interim", closes=False),
        Lie("interim responses with much to say", (b"HTTP/1.1 103 E\r\nX: " + b"y" * 9000 + b"\r\n\r\n",) * 10,
            PROTOCOL, words="longer than", closes=False),
        Lie("an interim response and nothing more", (INTERIM,), TIMEOUT, words="(headers)", closes=False),
        Lie("an interim response and the end", (INTERIM,), PROTOCOL, words="within the response head"),
        Lie("a bomb of gzip", (HEAD + b"Content-Encoding: gzip, gzip\r\nContent-Length: %d\r\n\r\n%b"
            % (len(BOMB), BOMB),), Result.OK, 200, closes=False, body=BOMB[:4096]),
        Lie("gzip as a transfer coding", (HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + BOMB,), Result.OK, 200,
            body=BOMB[:4096]),
        Lie("nothing at all", (), TIMEOUT, words="(headers)", closes=False),
        Lie("the end at once", (), CONNECT, words="before any response"),
    ]  # fmt: skip


def _other_tongues() -> list[Lie]:
    noise = random.Random(4).randbytes(4096)
    return [
        _garbage("noise", noise),
        _garbage("three bytes of noise", b"\x00\xff\xfe"),
        _garbage("SSH", b"SSH-2.0-OpenSSH_9.6\r\n"),
        _garbage("SMTP", b"220 mail.test ESMTP\r\n"),
        _garbage("HTTP/0.9: a page without a head", b"<html>hello</html>"),
        _garbage("HTTP/0.9 by name", b"HTTP/0.9 200 OK\r\n" + NO_BODY),
        _garbage("HTTP/1.10", b"HTTP/1.10 200 OK\r\n" + NO_BODY),
        _garbage("HTTP/2.0 by name", b"HTTP/2.0 200 OK\r\n" + NO_BODY),
        _garbage("HTTP/2: the client's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        _garbage("HTTP/2: a SETTINGS frame", b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64"),
        _garbage("HTTP/2: an upgrade nobody asked for",
                 b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n"),
        _garbage("101 and then a response", b"HTTP/1.1 101 Switching\r\n\r\n" + OK),
        _garbage("TLS: an alert", b"\x15\x03\x03\x00\x02\x02\x28"),
        _garbage("RTSP", b"RTSP/1.0 200 OK\r\n" + NO_BODY),
        _garbage("ICE", b"ICE/1.0 200 OK\r\n" + NO_BODY),
        _garbage("a request", b"POST / HTTP/1.1\r\nHost: x\r\n" + NO_BODY),
        _garbage("a status that is no number", b"HTTP/1.1 2x0 OK\r\n\r\n"),
        _garbage("a status of four digits", b"HTTP/1.1 2000 OK\r\n\r\n"),
        _garbage("a status of two digits", b"HTTP/1.1 20 OK\r\n" + NO_BODY),
        Lie("a status of 000", (b"HTTP/1.1 000 No\r\n" + NO_BODY,), PROTOCOL, closes=False),
        Lie("a status of 600", (b"HTTP/1.1 600 No\r\n" + NO_BODY,), PROTOCOL, 600, closes=False),
        Lie("a status of 999", (b"HTTP/1.1 999 No\r\n" + NO_BODY,), PROTOCOL, 999, closes=False),
        _garbage("bare line feeds", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
        _garbage("a header without a colon", HEAD + b"nonsense\r\n\r\n"),
        _garbage("a header without a name", HEAD + b": x\r\n\r\n"),
        _garbage("NUL in a header", HEAD + b"X: a\x00b\r\n\r\n"),
        Lie("NUL and bytes that are no UTF-8 in the body", (HEAD + b"Content-Length: 6\r\n\r\n" + NO_UTF_8,), Result.OK,
            200, closes=False, body=NO_UTF_8),
        Lie("bytes that are no UTF-8 in the head", (b"HTTP/1.1 400 \xff\xfe\r\nX: \xc3\x28\r\n" + NO_BODY,),
            Result.CLIENT_ERROR, 400, closes=False),
        Lie("a broken body behind a good head", (CHUNKED.replace(b"200", b"202") + b"2\r\nok\r\nzz\r\n",), PROTOCOL,
            202, closes=False, body=b"ok"),
        Lie("a redirect to the metadata service",
            (b"HTTP/1.1 302 X\r\nLocation: http://169.254.169.254/\r\n" + NO_BODY,), Result.REDIRECT, 302,
            closes=False),
        Lie("a thousand places to go", (b"HTTP/1.1 308 X\r\n" + b"Location: /next\r\n" * 1000 + NO_BODY,),
            Result.REDIRECT, 308, closes=False),
        Lie("two responses for one request", (OK + OK,), Result.OK, 200, closes=False, body=b"ok"),
        Lie("noise behind the response", (OK + noise,), Result.OK, 200, closes=False, body=b"ok"),
    ]  # fmt: skip


LIES: Final = (*_lengths(), *_chunks(), *_without_end(), *_other_tongues())
