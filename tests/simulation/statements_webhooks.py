"""The model of what changes webhooks, and of replays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from model_postgres import ACCOUNT, HELD, Backend, ModelPostgres, Record, Snapshot, Transaction
from model_statements import block, reads, writes

# -- replays


@writes("replay", "create", locks=("replay",))
def _begin_replay(server: ModelPostgres, transaction: Transaction, *columns: Any) -> list[Any]:
    job_id, endpoint, selection, types, since, until, most = columns
    webhook = server.endpoints.get(endpoint)
    running = [job for job in server.replays.values() if job["endpoint_id"] == endpoint and job["status"] == "running"]
    if webhook is None or webhook["status"] == "disabled" or len(running) >= most:
        return []
    transaction.number()
    server.generation += 1
    job = server.replays[job_id] = {
        "id": job_id, "endpoint_id": endpoint, "generation": server.generation, "selection": selection, "types": types,
        "since": since, "until": until, "status": "running", "reason": None, "reached_at": None, "first_seq": None,
        "reached_seq": None, "newest_seq": None, "looked": 0, "queued": 0, "created_at": server.clock(),
        "finished_at": None, "after_id": "",
    }  # fmt: skip
    transaction.notes["dispatcher_pending", "replay"] = None
    server.saved(transaction, None)
    return [Record(**job)]


@reads("replay", "running")
def _replays(server: ModelPostgres, backend: Backend, most: int) -> list[Any]:
    return [Record(id=key) for key, job in server.replays.items() if job["status"] == "running"][:most]


@reads("replay", "begin")
def _begin_step(server: ModelPostgres, backend: Backend, job_id: str, most: int) -> list[Any]:
    job, name = server.replays.get(job_id), f"replay {job_id}"
    if job is None or job["status"] != "running" or server.is_locked(name):
        return []
    server.lock(block(backend), name, lambda: None)
    webhook = server.endpoints[job["endpoint_id"]]
    return [
        Record(
            **job, endpoint_status=webhook["status"], shard=webhook["shard"], events=webhook["events"],
            created_snapshot=webhook["created_snapshot"], account=ACCOUNT[1],
            held=min(most, len(server.held.get(webhook["id"], ()))),
        )
    ]  # fmt: skip


@reads("replay", "look")
def _look(server: ModelPostgres, backend: Backend, *bounds: Any) -> list[Any]:
    account, after_id, since, until, limit, endpoint, filters, types, born, passed, first_day, end_day = bounds
    behind = sorted(
        (
            event
            for _, _, event in server.events
            if event.account == account and event.id > after_id and first_day <= event.written_at < end_day
        ),
        key=lambda event: event.id,
    )
    rows = []
    for place, event in enumerate(behind[:passed], 1):
        is_within = since <= event.written_at < until
        if not is_within and place != passed:
            continue
        ends = [row[6] for row in server.attempts if row[1] == event.seq and row[3] == endpoint]
        rows.append(
            Record(
                id=event.id, seq=event.seq, xid=event.xid, written_at=event.written_at,
                place=place, is_within=is_within,
                is_wanted=is_within and _wants(filters, event.type) and (types is None or _wants(types, event.type)),
                best=max(({"delivered": 3, "retrying": 1}.get(end, 2) for end in ends), default=None),
                waits=any(key[:2] == (endpoint, event.seq) for key in server.pending) or None,
                is_refused=event.seq in server.discarded_events or None,
                is_older=server.visible(event.xid, born),
            )
        )  # fmt: skip
    return rows[:limit]


def _wants(filters: Sequence[str], kind: str) -> bool:
    return any(f in {"*", kind} or (f.endswith(".*") and kind.startswith(f[:-1])) for f in filters)


@reads("replay", "queue")
def _queue(
    server: ModelPostgres, backend: Backend, endpoint: int, generation: int, shard: int, *columns: Any
) -> list[Any]:
    transaction = block(backend)
    transaction.number()
    rows = [(endpoint, seq, generation, xid, at) for seq, xid, at in zip(*columns, strict=True)]
    rows = [row for row in rows if row[:3] not in server.pending]

    def queue() -> None:
        for row in rows:
            server.put_pending((*row, "pending", 0, HELD, None))
        server.saved(transaction, None)
        server.watch.queued([row[:3] for row in rows])

    transaction.acts.append(queue)
    transaction.notes["dispatcher_pending", f"{endpoint} {server.registry_version}"] = None
    return [(len(rows), "")]


@reads("replay", "advance")
def _advance(server: ModelPostgres, backend: Backend, *columns: Any) -> list[Any]:
    job_id, after_id, reached_at, looked, queued, status, _, _ = columns

    def advance() -> None:
        job = server.replays.get(job_id)
        if job is not None:
            job.update(
                after_id=after_id, reached_at=reached_at or job["reached_at"], looked=job["looked"] + looked,
                queued=job["queued"] + queued, status=status,
            )  # fmt: skip
        server.saved(transaction, None)

    transaction = block(backend)
    transaction.number()
    transaction.acts.append(advance)
    return ["UPDATE 1"]


@reads("replay", "cancel")
def _cancel(server: ModelPostgres, backend: Backend, job_id: str, reason: str) -> list[Any]:
    def cancel() -> None:
        if job_id in server.replays:
            server.replays[job_id].update(status="cancelled", reason=reason)
        server.saved(transaction, None)

    transaction = block(backend)
    transaction.number()
    transaction.acts.append(cancel)
    return ["UPDATE 1"]


# -- webhooks

_DEFAULTS: Final = {
    "shard": 0, "status": "active", "disabled_reason": None, "previous_secret": None,
    "previous_secret_expires_at": None, "version": 1,
}  # fmt: skip


@reads("endpoint", "registry")
def _registry(server: ModelPostgres, backend: Backend, shard: int) -> list[Any]:
    version = server.registry_version
    server.watch.told_registry(backend, shard, version)
    rows = [row for row in server.endpoints.values() if row["shard"] == shard]
    return [Record(registry_version=version, account=ACCOUNT[1], **row) for row in rows] or [
        Record(registry_version=version, id=None)
    ]


@reads("endpoint", "health")
def _health(server: ModelPostgres, backend: Backend) -> list[Any]:
    return [(endpoint, *row) for endpoint, row in server.health.items()]


def _tell(transaction: Transaction, kind: str, endpoint: dict[str, Any], reason: str | None) -> None:
    transaction.emit(kind, json.dumps({"webhook_id": endpoint["public_id"], "url": endpoint["url"], "reason": reason}))


@writes("endpoint", "learn", locks=("health",))
def _learn(server: ModelPostgres, transaction: Transaction, *columns: Sequence[Any]) -> list[Any]:
    transaction.number()
    transaction.wake()
    for endpoint_id, since, exhausted, error in zip(*columns, strict=True):
        endpoint = server.endpoints.get(endpoint_id)
        if endpoint is None:
            continue
        before = server.health.get(endpoint_id)
        server.health[endpoint_id] = (since, exhausted, error)
        if exhausted is not None and (before is None or before[1] is None):
            _tell(transaction, "webhook.failing", endpoint, error)
    server.saved(transaction, None)
    return [f"INSERT 0 {len(transaction.events)}"]


@writes("endpoint", "disable", locks=("registry",))
def _disable(server: ModelPostgres, transaction: Transaction, ids: Sequence[int], reasons: Sequence[str]) -> list[Any]:
    transaction.number()
    transaction.wake()
    for endpoint_id, reason in zip(ids, reasons, strict=True):
        endpoint = server.endpoints.get(endpoint_id)
        if endpoint is not None and endpoint["status"] != "disabled":
            _change(server, endpoint, status="disabled", disabled_reason=reason)
            _tell(transaction, "webhook.disabled", endpoint, reason)
    server.change_registry(transaction)
    server.saved(transaction, None)
    return [f"INSERT 0 {len(transaction.events)}"]


def _change(server: ModelPostgres, endpoint: dict[str, Any], **columns: Any) -> None:
    server.endpoints[endpoint["id"]] = {
        **endpoint, **columns, "version": endpoint["version"] + 1, "updated_at": server.clock(),
    }  # fmt: skip


def _born(server: ModelPostgres) -> Snapshot:
    return server.snapshot()


@writes("endpoint", "create", locks=("registry",), prepare=_born)
def _create(server: ModelPostgres, transaction: Transaction, born: Snapshot, *columns: Any) -> list[Any]:
    names = (
        "public_id", "account_id", "url", "description", "events", "secret", "headers", "body_style", "retry",
        "max_concurrency", "rate_limit", "ordered", "timeout_s",
    )  # fmt: skip
    transaction.number()
    server.endpoint_ids += 1
    now = server.clock()
    made = {"id": server.endpoint_ids, **_DEFAULTS, **dict(zip(names, columns, strict=True))}
    made["shard"] = server.shard_of(made["id"])
    server.endpoints[made["id"]] = {**made, "created_at": now, "updated_at": now, "created_snapshot": born}
    server.change_registry(transaction)
    server.saved(transaction, None)
    return [_webhook(server, made["id"])]


def _webhook(server: ModelPostgres, endpoint_id: int) -> Record:
    since, _, error = server.health.get(endpoint_id, (None, None, None))
    return Record(**server.endpoints[endpoint_id], failing_since=since, last_error=error)


def _found(server: ModelPostgres, account: int, public_id: str, version: int | None) -> dict[str, Any] | None:
    for row in server.endpoints.values():
        if row["account_id"] == account and row["public_id"] == public_id and version in {None, row["version"]}:
            return row
    return None


@reads("endpoint", "get")
def _get(server: ModelPostgres, backend: Backend, account: int, public_id: str) -> list[Any]:
    found = _found(server, account, public_id, None)
    return [] if found is None else [_webhook(server, found["id"])]


def _alter(server: ModelPostgres, transaction: Transaction, found: dict[str, Any] | None, **columns: Any) -> list[Any]:
    if found is not None:
        _change(server, found, **columns)
    transaction.number()
    server.change_registry(transaction)
    server.saved(transaction, None)
    return [] if found is None else [_webhook(server, found["id"])]


@writes("endpoint", "pause", locks=("registry",))
def _pause(server: ModelPostgres, transaction: Transaction, account: int, public_id: str, version: int) -> list[Any]:
    found = _found(server, account, public_id, version)
    if found is not None and found["status"] != "active":
        found = None
    return _alter(server, transaction, found, status="paused")


@writes("endpoint", "resume", locks=("registry",))
def _resume(server: ModelPostgres, transaction: Transaction, account: int, public_id: str, version: int) -> list[Any]:
    found = _found(server, account, public_id, version)
    if found is not None and found["status"] == "active":
        found = None
    if found is not None:
        server.health.pop(found["id"], None)
    return _alter(server, transaction, found, status="active", disabled_reason=None)


@writes("endpoint", "rotate", locks=("registry",))
def _rotate(server: ModelPostgres, transaction: Transaction, *columns: Any) -> list[Any]:
    account, public_id, secret, grace, version = columns
    found = _found(server, account, public_id, version)
    if found is None:
        return _alter(server, transaction, None)
    has_grace = grace > timedelta(0)
    expires = server.clock() + grace if has_grace and found["secret"] is not None else None
    previous = found["secret"] if has_grace else None
    return _alter(
        server, transaction, found, secret=secret, previous_secret=previous, previous_secret_expires_at=expires
    )


@writes("endpoint", "update", locks=("registry",))
def _update(server: ModelPostgres, transaction: Transaction, *columns: Any) -> list[Any]:
    (account, public_id, url, description, events, secret, headers, style, retry, most, rate, ordered, timeout_s,
     is_given, version) = columns  # fmt: skip
    given = {"secret": secret, "previous_secret": None, "previous_secret_expires_at": None} if is_given else {}
    return _alter(
        server, transaction, _found(server, account, public_id, version), url=url, description=description,
        events=events, headers=headers, body_style=style, retry=retry, max_concurrency=most, rate_limit=rate,
        ordered=ordered, timeout_s=timeout_s, **given,
    )  # fmt: skip


@writes("endpoint", "delete", locks=("registry",))
def _delete(server: ModelPostgres, transaction: Transaction, account: int, public_id: str, version: int) -> list[Any]:
    found = _found(server, account, public_id, version)
    if found is not None:
        del server.endpoints[found["id"]]
        server.health.pop(found["id"], None)
        server.replays = {key: job for key, job in server.replays.items() if job["endpoint_id"] != found["id"]}
    transaction.number()
    server.change_registry(transaction)
    server.saved(transaction, None)
    return [] if found is None else [(found["id"],)]
