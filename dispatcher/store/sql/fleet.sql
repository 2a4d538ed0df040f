-- Advisory locks: (…688, 1000 + shard) is a lease; (…689, member) a daemon that takes part; (…690, member) says whose a lease is.

-- name: join
SELECT pg_try_advisory_lock_shared(1953656689, $1);

-- name: sign
SELECT pg_try_advisory_lock_shared(1953656690, $1);

-- name: part
-- Give up every lock of this session, and wake whoever waits for one of them.
SELECT pg_advisory_unlock_all(), pg_notify('dispatcher_fleet', '');

-- name: call
SELECT pg_notify('dispatcher_fleet', '');

-- name: renew
-- A session that holds a lease says something each second. One that has been silent for longer hangs.
SELECT;

-- name: view
-- One row per daemon and per lease that is held, sessions silent for longer than $1 left out; and one with the number of shards.
WITH held AS (
    SELECT l.pid, l.classid::bigint AS class, l.objid::bigint AS key FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
      AND l.classid IN (1953656688, 1953656689, 1953656690)
      AND (a.state = 'idle' AND a.state_change < clock_timestamp() - $1::interval) IS NOT TRUE
)
SELECT 'shards' AS what, count(*) AS key, NULL::bigint AS member FROM dispatcher.shard
UNION ALL
SELECT 'member', key, NULL FROM held WHERE class = 1953656689
UNION ALL
SELECT 'lease', key - 1000, (SELECT min(o.key) FROM held o WHERE o.pid = h.pid AND o.class = 1953656690)
FROM held h WHERE class = 1953656688 AND key >= 1000;

-- name: evict
-- End the session that holds a lease and has been silent for longer than $2: its process hangs. The epoch fences the rest of it.
SELECT count(pg_terminate_backend(l.pid)) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2 AND l.classid = 1953656688 AND l.objid = 1000 + $1::integer
  AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()) AND a.usename = current_user
  AND a.state = 'idle' AND a.state_change < clock_timestamp() - $2::interval;

-- name: count
SELECT count(*) FROM dispatcher.shard;

-- name: sessions
-- Daemons that are connected, of older releases too: each has one of these at least.
SELECT count(DISTINCT pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name IN ('dispatcher member', 'dispatcher listener');

-- name: freeze
LOCK TABLE dispatcher.shard IN ACCESS EXCLUSIVE MODE;

-- name: cursors
SELECT id, epoch, prev, prev_at, system, floor FROM dispatcher.shard ORDER BY id;

-- name: clear
DELETE FROM dispatcher.shard;

-- name: add
INSERT INTO dispatcher.shard (id, epoch, prev, prev_at, system, floor)
SELECT CASE WHEN $1 = 1 THEN 0 ELSE n END, $2, $3, $4, $5, $6 FROM generate_series(1, $1::integer) n;

-- name: spread_endpoints
UPDATE dispatcher.endpoint SET shard = dispatcher.shard_of(id, $1) WHERE shard <> dispatcher.shard_of(id, $1);

-- name: spread_pending
UPDATE dispatcher.pending SET shard = dispatcher.shard_of(endpoint_id, $1) WHERE shard <> dispatcher.shard_of(endpoint_id, $1);
