-- name: take_turn
SELECT pg_try_advisory_lock($1, $2);

-- name: end_turn
SELECT pg_advisory_unlock($1, $2);

-- name: now
-- The server's clock: partition keys are its, and a daemon's may be off.
SELECT clock_timestamp();

-- name: make_partitions
SELECT dispatcher.make_partitions($1, $2, $3);

-- name: partitions
-- Leaves of a partitioned table with the day each is for; the DEFAULT partition has none.
SELECT c.relname AS name, to_date(right(c.relname, 8), 'YYYYMMDD') AS day
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = ('dispatcher.' || $1::text)::regclass AND c.relname ~ '_[0-9]{8}$' ORDER BY c.relname;

-- name: needed_from
-- No event is dropped that a cursor or a pending row still needs.
SELECT (SELECT min(prev_at) FROM dispatcher.shard) AS cursor,
       (SELECT event_at FROM dispatcher.pending ORDER BY event_seq LIMIT 1) AS pending;

-- name: is_unread
-- Whether partition $leaf may hold a row that some shard has not read: one of a transaction that had not ended for all of
-- them. From the end of an index, but for rows of another cluster, whose ids say nothing.
SELECT EXISTS (SELECT FROM dispatcher."$leaf" o, dispatcher.shard s
               WHERE o.xid >= pg_snapshot_xmin(s.prev) AND NOT pg_visible_in_snapshot(o.xid, s.prev)
                 AND o.written_at >= s.floor);

-- name: astray_outbox
-- Rows of the DEFAULT partition by day; $1 of them at most are looked at.
SELECT (written_at AT TIME ZONE 'UTC')::date AS day, count(*) AS rows
FROM (SELECT written_at FROM dispatcher.outbox_default LIMIT $1::integer) AS found GROUP BY 1 ORDER BY 1;

-- name: astray_attempt
SELECT (at AT TIME ZONE 'UTC')::date AS day, count(*) AS rows
FROM (SELECT at FROM dispatcher.attempt_default LIMIT $1::integer) AS found GROUP BY 1 ORDER BY 1;

-- name: move
SELECT dispatcher.move_from_default($1, $2, $3);

-- name: sizes
-- Each table with its partitions, indexes and TOAST. Rows are the planner's estimate.
SELECT t.name AS table, sum(pg_total_relation_size(c.oid))::bigint AS bytes,
       sum(greatest(c.reltuples, 0)) FILTER (WHERE c.relkind = 'r')::bigint AS rows,
       (count(*) FILTER (WHERE c.relispartition AND c.relname ~ '_[0-9]{8}$'))::integer AS partitions
FROM unnest(ARRAY['outbox', 'attempt', 'pending', 'idempotency', 'discarded_event', 'replay']) AS t (name)
JOIN pg_class p ON p.oid = ('dispatcher.' || t.name)::regclass
JOIN pg_class c ON c.oid = p.oid OR c.oid IN (SELECT i.inhrelid FROM pg_inherits i WHERE i.inhparent = p.oid)
GROUP BY t.name;

-- name: prune_outbox_default
DELETE FROM dispatcher.outbox_default WHERE ctid = ANY (ARRAY(
    SELECT o.ctid FROM dispatcher.outbox_default o
    WHERE o.written_at < $1
      AND NOT EXISTS (SELECT FROM dispatcher.shard s
                      WHERE NOT pg_visible_in_snapshot(o.xid, s.prev) AND o.written_at >= s.floor)
    LIMIT $2));

-- name: prune_attempt_default
DELETE FROM dispatcher.attempt_default WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM dispatcher.attempt_default WHERE at < $1 LIMIT $2));

-- name: prune_idempotency
DELETE FROM dispatcher.idempotency WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM dispatcher.idempotency WHERE created_at < $1 ORDER BY created_at LIMIT $2));

-- name: prune_discarded_event
DELETE FROM dispatcher.discarded_event WHERE ctid = ANY (ARRAY(SELECT ctid FROM dispatcher.discarded_event WHERE at < $1 LIMIT $2));
