"""The table of notations against the judgement at every connect, the one that holds.

A webhook can be older than a rule, and a name can lead anywhere by tomorrow. That none can be saved: tests/web.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import Any

import pytest
from arena import Stage, answer_well, open_stage, read_request
from notations import REFUSED_HOSTS

from dispatcher.core import addresses
from dispatcher.core.addresses import METADATA_NAMES, REFUSED, Guard
from dispatcher.engine.connection import Connection
from dispatcher.engine.dialer import Dialer, DialFailed
from dispatcher.model import Result

NAME = "hook.example.com"


class Answers:
    """A resolver that gives the next of its answers each time, and the last one for ever after."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)

    async def resolve(self, _: str) -> Sequence[str]:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    async def close(self) -> None:
        pass


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets as far as opening a socket has failed already."""

    def refuse(_: Dialer, info: Any) -> socket.socket:
        raise AssertionError(f"a socket was opened towards {info}")

    monkeypatch.setattr(Dialer, "_open_socket", refuse)


def test_the_table_of_notations_is_long_and_says_nothing_twice() -> None:
    hosts = [host for host, _ in REFUSED_HOSTS]
    assert len(hosts) == len(set(hosts)) >= 150


def test_every_kind_of_refusal_is_in_the_table() -> None:
    assert {code for code, _, _ in REFUSED} <= {code for _, code in REFUSED_HOSTS}
    hosts = {host for host, _ in REFUSED_HOSTS}
    assert hosts >= METADATA_NAMES
    assert {f"[{each}]" if each.version == 6 else str(each) for each in addresses._METADATA} <= hosts


# ── connect ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_webhook_saved_before_there_was_a_guard_is_blocked_in_every_notation(no_sockets: None) -> None:
    async with open_stage() as stage:
        strict = Guard()
        stage.deliverer.reconfigure(strict, 0.0)
        stage.transport.use_guard(strict)
        for host, _ in REFUSED_HOSTS:
            webhook = stage.webhook(8443, scheme="https", host=host)
            stage.emit(webhook)
            while not (entries := await stage.log(webhook)):
                await asyncio.sleep(0)
            assert [(entry.result, entry.state) for entry in entries] == [(Result.BLOCKED, "discarded")], host
            assert entries[0].error


def literals() -> list[str]:
    """Every address of the table as a resolver would spell it, and spellings no resolver should come up with."""
    found: list[str] = []
    for network, _, _ in addresses._ROWS:
        found += [str(network[0]), str(network[-1]), str(network[network.num_addresses // 2])]
    plain = [text for text in found if ":" not in text]
    found += [f"::ffff:{text}" for text in plain] + [f"64:ff9b::{text}" for text in plain]
    found += [
        str(IPv6Address(f"2002:{int(ip_address(text)) >> 16:x}:{int(ip_address(text)) & 0xFFFF:x}::1"))
        for text in plain
    ]
    found += ["fe80::1%eth0", "::1%lo", "fd00:ec2::254%1", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "localhost",
              "[::1]", "", " 127.0.0.1", "127.0.0.1\n", "１２７.0.0.1"]  # fmt: skip
    return found


async def test_a_name_that_leads_to_a_refused_address_is_blocked_whatever_it_is(no_sockets: None) -> None:
    target = Guard().check_url(f"https://{NAME}/")
    found = literals()
    assert len(found) > 200
    for address in found:
        dialer = Dialer(guard=Guard(), resolver=Answers([address]))
        with pytest.raises(DialFailed) as failed:
            await dialer.dial(target, lambda: pytest.fail("connected"))
        assert failed.value.result is Result.BLOCKED, address


async def test_of_a_name_with_a_good_and_a_bad_address_only_the_good_one_is_called() -> None:
    """The stage opens 127.0.0.1 and nothing else; 127.0.0.2 has a listener as well, which must hear nothing."""
    heard: list[bytes] = []

    async def spy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await read_request(reader))

    for answer in (["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"], ["::1", "127.0.0.2", "127.0.0.1"]):
        async with open_stage(allow="127.0.0.1/32", resolver=Answers(answer)) as stage:
            good = await stage.host(answer_well)
            bad = await asyncio.start_server(spy, "127.0.0.2", good.port)
            async with bad:
                entry = await stage.only(stage.webhook(good.port, host=NAME, timeout_s=30.0))
            assert (entry.result, good.connections) == (Result.OK, 1)
    assert heard == []


async def test_a_name_whose_second_answer_differs_gains_nothing() -> None:
    """Judged and connected to is one and the same answer, and the next connection is judged by the next."""
    async with open_stage(allow="127.0.0.1/32", resolver=Answers(["127.0.0.1"], ["127.0.0.2"])) as stage:
        first = await stage.against(_answer_once, host=NAME, timeout_s=30.0)
        assert (await stage.only(first)).result is Result.OK
        await _until_closed(stage)
        entry = await stage.only(first)
        assert (entry.result, entry.state) == (Result.BLOCKED, "discarded")
        assert "127.0.0.2 is a loopback address" in entry.error


async def _answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    await writer.drain()
    writer.close()


async def _until_closed(stage: Stage) -> None:
    def of_name(connection: Connection) -> bool:
        return connection._origin.target.host == NAME

    while any(map(of_name, stage.transport.connections)):
        await asyncio.sleep(0.001)


async def test_a_network_that_is_closed_again_is_closed_to_what_is_dialled_next() -> None:
    async with open_stage() as stage:
        webhook = await stage.against(_answer_once, host=NAME, timeout_s=30.0)
        stage.transport._dialer._resolver = Answers(["127.0.0.1"])
        assert (await stage.only(webhook)).result is Result.OK
        narrower = Guard(["127.0.0.2/32"], allow_http=True)
        stage.deliverer.reconfigure(narrower, 0.0)
        stage.transport.use_guard(narrower)
        await _until_closed(stage)
        stage.emit(webhook)
        while len(entries := await stage.log(webhook)) < 2:
            await asyncio.sleep(0.001)
        assert entries[1].result is Result.BLOCKED


def test_a_translation_prefix_of_a_networks_own_is_not_known_to_be_one() -> None:
    """RFC 6052 lets it translate under any prefix: that such an address is no way in, the network has to see to."""
    Guard().check_address("2a00:1450:4001:64::a9fe:a9fe")
