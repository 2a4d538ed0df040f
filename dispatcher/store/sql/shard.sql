-- name: identity
-- Whose transaction ids these are. A dump restored elsewhere carries foreign ones.
SELECT (SELECT system_identifier FROM pg_control_system())::text AS system, pg_is_in_recovery() AS standby;

-- name: try_lease
SELECT pg_try_advisory_lock(1953656688, 1000 + $1::integer);

-- name: take_over
UPDATE dispatcher.shard SET epoch = epoch + 1 WHERE id = $1 RETURNING epoch;

-- name: cursor
-- Ids that lie ahead of this cluster's are foreign too: a clone of a cluster bears the identifier of the first, and a dump of
-- one may be restored into the other. What is visible here and ours has an id below the snapshot's end.
SELECT epoch, batch, prev, prev_at, cur, at_xid, at_seq, system, floor, (SELECT count(*) FROM dispatcher.shard) AS shards,
       greatest(pg_snapshot_xmax(prev), pg_snapshot_xmax(cur)) > pg_snapshot_xmax(pg_current_snapshot())
       OR EXISTS (SELECT FROM dispatcher.outbox
                  WHERE xid >= pg_snapshot_xmax(pg_current_snapshot()) AND written_at >= floor) AS is_ahead
FROM dispatcher.shard WHERE id = $1;

-- name: anchor
-- After a restore: transaction ids mean those of cluster $3 from here on, and everything visible in $4 counts as read.
UPDATE dispatcher.shard SET system = $3, prev = $4, prev_at = $5, floor = $5, cur = NULL, at_xid = '0', at_seq = 0
WHERE id = $1 AND epoch = $2;

-- name: naturalize
-- After a restore: every webhook of the shard is older than any event to come.
UPDATE dispatcher.endpoint SET created_snapshot = '1:1:' WHERE shard = $1;

-- name: fall_asleep
SELECT pg_try_advisory_lock_shared(1953656688, 0);

-- name: wake_up
SELECT pg_advisory_unlock_shared(1953656688, 0);

-- name: gauges
-- What the metrics show of the tables, each from the end of an index: the newest sequence number, the oldest pending event;
-- and the daemons of this database, of which the table holds a handful.
SELECT (SELECT last_value FROM dispatcher.outbox_seq) AS newest_seq,
       (SELECT event_at FROM dispatcher.pending ORDER BY event_seq LIMIT 1) AS oldest_pending_at,
       count(*) FILTER (WHERE role = 'active') AS active, count(*) FILTER (WHERE role = 'standby') AS standby
FROM dispatcher.instance WHERE heartbeat_at > now() - interval '5 seconds';

-- name: partitions_until
-- When the last partition of each table made ahead ends, in Unix seconds. Reads the catalogue only.
SELECT parent.relname::text AS name,
       extract(epoch FROM max(to_date(right(leaf.relname, 8), 'YYYYMMDD')) + interval '1 day')::float8 AS until
FROM pg_inherits i JOIN pg_class leaf ON leaf.oid = i.inhrelid JOIN pg_class parent ON parent.oid = i.inhparent
WHERE i.inhparent IN ('dispatcher.outbox'::regclass, 'dispatcher.attempt'::regclass) AND leaf.relname ~ '_[0-9]{8}$'
GROUP BY parent.relname;

-- name: own_xid
SELECT pg_current_xact_id();

-- name: flush
-- Of attempts ($9 to $20) and pending rows ($21 to $29) the first element of a column may stand for many rows: $35 and $36
-- say for how many, column by column behind the first. Most attempts are first ones that were delivered.
SELECT dispatcher.flush(
    $1, $2, $3, $4, $5, $6, $7, $8, $9,
    CASE WHEN ($35::integer[])[1] > 1 THEN array_fill(($10::xid8[])[1], ARRAY[($35::integer[])[1]]) || ($10::xid8[])[2:] ELSE $10 END,
    CASE WHEN ($35::integer[])[2] > 1 THEN array_fill(($11::integer[])[1], ARRAY[($35::integer[])[2]]) || ($11::integer[])[2:] ELSE $11 END,
    CASE WHEN ($35::integer[])[3] > 1 THEN array_fill(($12::integer[])[1], ARRAY[($35::integer[])[3]]) || ($12::integer[])[2:] ELSE $12 END,
    CASE WHEN ($35::integer[])[4] > 1 THEN array_fill(($13::smallint[])[1], ARRAY[($35::integer[])[4]]) || ($13::smallint[])[2:] ELSE $13 END,
    CASE WHEN ($35::integer[])[5] > 1 THEN array_fill(($14::text[])[1], ARRAY[($35::integer[])[5]]) || ($14::text[])[2:] ELSE $14 END,
    CASE WHEN ($35::integer[])[6] > 1 THEN array_fill(($15::text[])[1], ARRAY[($35::integer[])[6]]) || ($15::text[])[2:] ELSE $15 END,
    CASE WHEN ($35::integer[])[7] > 1 THEN array_fill(($16::smallint[])[1], ARRAY[($35::integer[])[7]]) || ($16::smallint[])[2:] ELSE $16 END,
    CASE WHEN ($35::integer[])[8] > 1 THEN array_fill(($17::integer[])[1], ARRAY[($35::integer[])[8]]) || ($17::integer[])[2:] ELSE $17 END,
    CASE WHEN ($35::integer[])[9] > 1 THEN array_fill(($18::text[])[1], ARRAY[($35::integer[])[9]]) || ($18::text[])[2:] ELSE $18 END,
    CASE WHEN ($35::integer[])[10] > 1 THEN array_fill(($19::bytea[])[1], ARRAY[($35::integer[])[10]]) || ($19::bytea[])[2:] ELSE $19 END,
    CASE WHEN ($35::integer[])[11] > 1 THEN array_fill(($20::bytea[])[1], ARRAY[($35::integer[])[11]]) || ($20::bytea[])[2:] ELSE $20 END,
    $21,
    CASE WHEN ($36::integer[])[1] > 1 THEN array_fill(($22::bigint[])[1], ARRAY[($36::integer[])[1]]) || ($22::bigint[])[2:] ELSE $22 END,
    CASE WHEN ($36::integer[])[2] > 1 THEN array_fill(($23::integer[])[1], ARRAY[($36::integer[])[2]]) || ($23::integer[])[2:] ELSE $23 END,
    CASE WHEN ($36::integer[])[3] > 1 THEN array_fill(($24::xid8[])[1], ARRAY[($36::integer[])[3]]) || ($24::xid8[])[2:] ELSE $24 END,
    CASE WHEN ($36::integer[])[4] > 1 THEN array_fill(($25::timestamptz[])[1], ARRAY[($36::integer[])[4]]) || ($25::timestamptz[])[2:] ELSE $25 END,
    CASE WHEN ($36::integer[])[5] > 1 THEN array_fill(($26::text[])[1], ARRAY[($36::integer[])[5]]) || ($26::text[])[2:] ELSE $26 END,
    CASE WHEN ($36::integer[])[6] > 1 THEN array_fill(($27::smallint[])[1], ARRAY[($36::integer[])[6]]) || ($27::smallint[])[2:] ELSE $27 END,
    CASE WHEN ($36::integer[])[7] > 1 THEN array_fill(($28::timestamptz[])[1], ARRAY[($36::integer[])[7]]) || ($28::timestamptz[])[2:] ELSE $28 END,
    CASE WHEN ($36::integer[])[8] > 1 THEN array_fill(($29::text[])[1], ARRAY[($36::integer[])[8]]) || ($29::text[])[2:] ELSE $29 END,
    $30, $31, $32, $33, $34);

-- name: heartbeat
INSERT INTO dispatcher.instance (id, host, pid, role, version, started_at, heartbeat_at, snapshot)
VALUES ($1, $2, $3, $4, $5, $6, now(), $7)
ON CONFLICT (id) DO UPDATE SET role = excluded.role, heartbeat_at = excluded.heartbeat_at, snapshot = excluded.snapshot;

-- name: forget_instances
DELETE FROM dispatcher.instance WHERE heartbeat_at < now() - interval '1 day' OR id = $1;

-- name: instances
SELECT id, host, pid, role, version, started_at, heartbeat_at, snapshot FROM dispatcher.instance
WHERE heartbeat_at > now() - interval '5 seconds' ORDER BY started_at;

-- name: shards
SELECT s.id, s.prev_at, (SELECT count(*) FROM dispatcher.endpoint e WHERE e.shard = s.id) AS webhooks
FROM dispatcher.shard s ORDER BY s.id;

-- name: settings
SELECT key, value FROM dispatcher.setting;

-- name: claim_key
-- The first daemon's key is the database's; whoever comes later learns which.
INSERT INTO dispatcher.setting (key, value) VALUES ('key_fingerprint', $1)
ON CONFLICT (key) DO UPDATE SET value = setting.value RETURNING value;

-- name: change_key
INSERT INTO dispatcher.setting (key, value) VALUES ('key_fingerprint', $1)
ON CONFLICT (key) DO UPDATE SET value = excluded.value;
