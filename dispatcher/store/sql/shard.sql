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
-- A column of attempts that says the same in every row comes as one element: most are first ones that were delivered.
SELECT dispatcher.flush(
    $1, $2, $3, $4, $5, $6, $7, $8, $9,
    CASE WHEN cardinality($10::xid8[]) = 1 THEN array_fill(($10::xid8[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $10::xid8[] END,
    CASE WHEN cardinality($11::integer[]) = 1 THEN array_fill(($11::integer[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $11::integer[] END,
    CASE WHEN cardinality($12::integer[]) = 1 THEN array_fill(($12::integer[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $12::integer[] END,
    CASE WHEN cardinality($13::smallint[]) = 1 THEN array_fill(($13::smallint[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $13::smallint[] END,
    CASE WHEN cardinality($14::text[]) = 1 THEN array_fill(($14::text[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $14::text[] END,
    CASE WHEN cardinality($15::text[]) = 1 THEN array_fill(($15::text[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $15::text[] END,
    CASE WHEN cardinality($16::smallint[]) = 1 THEN array_fill(($16::smallint[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $16::smallint[] END,
    CASE WHEN cardinality($17::integer[]) = 1 THEN array_fill(($17::integer[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $17::integer[] END,
    CASE WHEN cardinality($18::text[]) = 1 THEN array_fill(($18::text[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $18::text[] END,
    CASE WHEN cardinality($19::bytea[]) = 1 THEN array_fill(($19::bytea[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $19::bytea[] END,
    CASE WHEN cardinality($20::bytea[]) = 1 THEN array_fill(($20::bytea[])[1], ARRAY[cardinality($9::bigint[])]) ELSE $20::bytea[] END,
    $21, $22, $23, $24, $25, $26, $27, $28, $29, $30, $31, $32, $33, $34);

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
