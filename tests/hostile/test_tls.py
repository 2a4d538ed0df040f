"""Peers whose TLS is not to be trusted, or never comes about: an attempt that says why, and nothing sent before it."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from arena import PATIENCE_S, Stage, answer_well, open_stage, say_nothing
from responses import OK

from dispatcher.model import Result

AUTHORITY = trustme.CA()
PAST = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
NAME = "receiver.test"
Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


class Loopback:
    """Every name is this machine."""

    async def resolve(self, _: str) -> Sequence[str]:
        return ["127.0.0.1"]

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("trust") / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(path)
    return str(path)


@asynccontextmanager
async def trusting(ca_file: str) -> AsyncIterator[Stage]:
    async with open_stage(ca_file=ca_file, resolver=Loopback()) as stage:
        yield stage


def context_of(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


def self_signed(folder: Path) -> ssl.SSLContext:
    """An authority's own certificate, shown as a server's."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.private_key_pem.write_to_path(folder / "key.pem")
    authority.cert_pem.write_to_path(folder / "cert.pem")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def only(version: ssl.TLSVersion) -> ssl.SSLContext:
    context = context_of(AUTHORITY.issue_cert(NAME))
    with pytest.warns(DeprecationWarning, match=version.name):
        context.minimum_version = context.maximum_version = version
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def asking_for_a_certificate() -> ssl.SSLContext:
    context = context_of(AUTHORITY.issue_cert(NAME))
    AUTHORITY.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def test_a_good_certificate_is_trusted(ca_file: str) -> None:
    async with trusting(ca_file) as stage:
        good = {"tls": context_of(AUTHORITY.issue_cert(NAME))}
        entry = await stage.only(
            await stage.against(answer_well, options=good, scheme="https", host=NAME, timeout_s=30)
        )
        assert (entry.result, entry.status) == (Result.OK, 200)


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        (AUTHORITY.issue_cert(NAME, not_before=PAST, not_after=PAST), "certificate has expired"),
        (AUTHORITY.issue_cert(NAME, not_before=dt.datetime(2090, 1, 1, tzinfo=dt.UTC),
                              not_after=dt.datetime(2091, 1, 1, tzinfo=dt.UTC)), "certificate is not yet valid"),
        (AUTHORITY.issue_cert("other.test"), "Hostname mismatch"),
        (AUTHORITY.issue_cert("*.test.example"), "Hostname mismatch"),
        (AUTHORITY.issue_cert("127.0.0.1"), "Hostname mismatch"),
        (trustme.CA().issue_cert(NAME), "unable to get local issuer certificate"),
    ],
    ids=["expired", "not yet valid", "another name", "another wildcard", "an address", "an unknown authority"],
)  # fmt: skip
async def test_a_bad_certificate_is_refused_and_named(ca_file: str, certificate: trustme.LeafCert, words: str) -> None:
    async with trusting(ca_file) as stage:
        await refused(stage, context_of(certificate), f"TLS: {words}")


async def test_a_certificate_signed_by_itself_is_refused(ca_file: str, tmp_path: Path) -> None:
    async with trusting(ca_file) as stage:
        await refused(stage, self_signed(tmp_path), "TLS: self-signed certificate")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
async def test_an_old_version_of_tls_is_refused(ca_file: str, version: ssl.TLSVersion) -> None:
    async with trusting(ca_file) as stage:
        await refused(stage, only(version), "TLS: ")


async def test_a_peer_that_wants_a_certificate_of_ours_is_a_failed_attempt(ca_file: str) -> None:
    """With TLS 1.3 it says so only after the handshake, and hangs up: what arrives first decides what it is called."""
    async with trusting(ca_file) as stage:
        asking = {"tls": asking_for_a_certificate()}
        entry = await stage.only(
            await stage.against(answer_well, options=asking, scheme="https", host=NAME, timeout_s=30)
        )
        assert entry.result in {Result.TLS, Result.CONNECT}


async def refused(stage: Stage, context: ssl.SSLContext, words: str) -> None:
    seen: list[bytes] = []

    async def spy(reader: Reader, writer: Writer) -> None:
        seen.append(await reader.read(65_536))

    entry = await stage.only(
        await stage.against(spy, options={"tls": context}, scheme="https", host=NAME, timeout_s=30)
    )
    assert entry.result is Result.TLS
    assert words in entry.error
    assert len(entry.error) < 120
    assert not any(seen), "a request went to a peer that was not trusted"


async def speak_first(reader: Reader, writer: Writer) -> None:
    writer.write(OK)
    await writer.drain()
    await say_nothing(reader, writer)


async def answer_plainly(reader: Reader, writer: Writer) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await writer.drain()


async def answer_noise(noise: bytes, reader: Reader, writer: Writer) -> None:
    await reader.read(1)
    while True:
        writer.write(noise)
        await writer.drain()
        await asyncio.sleep(0)


async def close_at_once(reader: Reader, writer: Writer) -> None:
    await reader.read(1)


@pytest.mark.parametrize(
    ("script", "result", "words"),
    [
        (say_nothing, Result.TIMEOUT, "(tls)"),
        (close_at_once, Result.TLS, "during the handshake"),
        (speak_first, Result.TLS, "TLS"),
        (answer_plainly, Result.TLS, "does not speak TLS"),
        (functools.partial(answer_noise, b"\x16\x03\x03\x40\x00" + b"\x02\xff\xff\xff" * 4096), Result.TLS, "TLS"),
        # Warnings without end are records of their own: nothing comes of them, and the deadline ends it.
        (functools.partial(answer_noise, b"\x15\x03\x03\x00\x02\x01\x5a"), {Result.TLS, Result.TIMEOUT}, ""),
    ],
    ids=["silence", "the end", "speech", "plain HTTP", "an endless ServerHello", "warnings"],
)  # fmt: skip
async def test_a_handshake_that_comes_to_nothing_is_an_attempt(
    ca_file: str, script: object, result: Result | set[Result], words: str
) -> None:
    async with trusting(ca_file) as stage:
        results = result if isinstance(result, set) else {result}
        timeout_s = 1.0 if Result.TIMEOUT in results else PATIENCE_S
        webhook = await stage.against(script, scheme="https", host=NAME, timeout_s=timeout_s)  # type: ignore[arg-type]
        entry = await stage.only(webhook)
        assert entry.result in results
        assert words in entry.error
