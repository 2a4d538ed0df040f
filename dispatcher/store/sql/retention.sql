-- name: make_partitions
SELECT dispatcher.make_partitions($1, (now() AT TIME ZONE 'UTC')::date, (now() AT TIME ZONE 'UTC')::date + $2::integer);

-- name: partitions
-- Leaves of a partitioned table with the day each is for; the DEFAULT partition has none.
SELECT c.relname AS name, to_date(right(c.relname, 8), 'YYYYMMDD') AS day
FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = ('dispatcher.' || $1::text)::regclass AND c.relname ~ '_[0-9]{8}$' ORDER BY c.relname;

-- name: needed_from
-- No event is dropped that a cursor or a pending row still needs.
SELECT least((SELECT min(prev_at) FROM dispatcher.shard), (SELECT event_at FROM dispatcher.pending ORDER BY event_seq LIMIT 1)) AS at;

-- name: prune_default_outbox
DELETE FROM dispatcher.outbox_default WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM dispatcher.outbox_default WHERE written_at < $1 LIMIT $2));

-- name: prune_default_attempt
DELETE FROM dispatcher.attempt_default WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM dispatcher.attempt_default WHERE at < $1 LIMIT $2));

-- name: prune_idempotency
DELETE FROM dispatcher.idempotency WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM dispatcher.idempotency WHERE created_at < now() - interval '24 hours' ORDER BY created_at LIMIT $1));

-- name: prune_discarded
DELETE FROM dispatcher.discarded_event WHERE ctid = ANY (ARRAY(SELECT ctid FROM dispatcher.discarded_event WHERE at < $1 LIMIT $2));
