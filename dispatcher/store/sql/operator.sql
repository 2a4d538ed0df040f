-- What the operator's page shows of the whole installation. Every list is bounded, and nothing reads a table of events or
-- attempts: rows of partitions are the server's own estimates.

-- name: instances
SELECT id, host, pid, role, version, started_at, heartbeat_at, snapshot, now() AS now
FROM dispatcher.instance ORDER BY heartbeat_at DESC LIMIT 50;

-- name: accounts
-- Those behind the name $1, with up to $3 of each one's webhooks and $4 of what waits for them.
SELECT a.name, a.created_at, w.active, w.paused, w.disabled, w.failing, w.rows = $3::integer AS webhooks_cut,
       x.waiting, x.waiting = $4::integer AS waiting_cut, x.oldest_at
FROM (SELECT id, name, created_at FROM dispatcher.account WHERE name > $1 ORDER BY name LIMIT $2) AS a
CROSS JOIN LATERAL (
    SELECT count(*) AS rows, count(*) FILTER (WHERE e.status = 'active') AS active,
           count(*) FILTER (WHERE e.status = 'paused') AS paused, count(*) FILTER (WHERE e.status = 'disabled') AS disabled,
           count(h.failing_since) AS failing
    FROM (SELECT id, status FROM dispatcher.endpoint WHERE account_id = a.id ORDER BY public_id DESC LIMIT $3::integer) AS e
    LEFT JOIN dispatcher.endpoint_health h ON h.endpoint_id = e.id) AS w
CROSS JOIN LATERAL (
    SELECT count(*) AS waiting, min(q.event_at) AS oldest_at FROM (
        SELECT p.event_at
        FROM (SELECT id FROM dispatcher.endpoint WHERE account_id = a.id ORDER BY public_id DESC LIMIT $3::integer) AS e
        CROSS JOIN LATERAL (
            SELECT event_at FROM dispatcher.pending WHERE endpoint_id = e.id
            ORDER BY endpoint_id, event_seq, generation LIMIT $4::integer) AS p
        LIMIT $4::integer) AS q) AS x
ORDER BY a.name;

-- name: webhooks
-- The webhooks that the daemons call the worst.
SELECT e.public_id AS id, e.url, e.status, (SELECT name FROM dispatcher.account WHERE id = e.account_id) AS account
FROM dispatcher.endpoint e WHERE e.public_id = ANY ($1::text[]);

-- name: server
SELECT current_setting('server_version') AS version, current_database() AS name, pg_database_size(current_database()) AS bytes,
       pg_is_in_recovery() AS is_standby, pg_postmaster_start_time() AS started_at,
       (SELECT max(version) FROM dispatcher.migration) AS schema_version,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connections,
       current_setting('max_connections')::integer AS connections_max,
       (SELECT min(xact_start) FROM pg_stat_activity
        WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()) AS oldest_transaction_at;

-- name: shards
SELECT id, epoch, prev_at FROM dispatcher.shard ORDER BY id LIMIT 256;

-- name: days
-- The partitions of events and attempts; the one without a day takes what no other does.
SELECT p.relname AS parent, c.relname AS name, to_date(substring(c.relname FROM '_([0-9]{8})$'), 'YYYYMMDD') AS day,
       pg_total_relation_size(c.oid) AS bytes, greatest(c.reltuples, 0)::bigint AS rows
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class p ON p.oid = i.inhparent
WHERE i.inhparent IN ('dispatcher.outbox'::regclass, 'dispatcher.attempt'::regclass)
ORDER BY p.relname, day DESC NULLS FIRST LIMIT 2000;
