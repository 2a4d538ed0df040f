-- name: create
-- None where the webhook is disabled, or has $7 replays under way already.
WITH made AS (
    INSERT INTO dispatcher.replay (id, endpoint_id, selection, types, since, until, newest_seq)
    SELECT $1, e.id, $3, $4, $5, $6,
           CASE WHEN $6 > now() - interval '1 minute' THEN (SELECT last_value FROM dispatcher.outbox_seq) END
    FROM dispatcher.endpoint e
    WHERE e.id = $2 AND e.status <> 'disabled'
      AND (SELECT count(*) FROM (SELECT FROM dispatcher.replay r
                                 WHERE r.endpoint_id = e.id AND r.status = 'running' LIMIT $7) AS running) < $7
    RETURNING *
)
SELECT m.*, pg_notify('dispatcher_pending', 'replay') FROM made m;

-- name: get
SELECT * FROM dispatcher.replay WHERE endpoint_id = $1 AND id = $2;

-- name: list_after
SELECT * FROM dispatcher.replay WHERE endpoint_id = $1 AND id < $2 COLLATE "C" ORDER BY id DESC LIMIT $3;

-- name: list_before
SELECT * FROM dispatcher.replay WHERE endpoint_id = $1 AND id > $2 COLLATE "C" ORDER BY id LIMIT $3;

-- name: running
SELECT id FROM dispatcher.replay WHERE status = 'running' ORDER BY id LIMIT $1;

-- name: begin
-- A job, for as long as this transaction lasts, with what it needs of its webhook. `held` counts to $2 at most.
SELECT r.*, e.status AS endpoint_status, e.shard, e.events, e.created_snapshot, a.name AS account,
       (SELECT count(*) FROM (SELECT FROM dispatcher.pending p
                              WHERE p.endpoint_id = e.id AND p.due_at = 'infinity' LIMIT $2) AS waiting) AS held
FROM dispatcher.replay r JOIN dispatcher.endpoint e ON e.id = r.endpoint_id JOIN dispatcher.account a ON a.id = e.account_id
WHERE r.id = $1 AND r.status = 'running' FOR UPDATE OF r SKIP LOCKED;

-- name: preview
-- What `look` needs to know of a webhook.
SELECT e.id, e.status, e.events, e.created_snapshot, a.name AS account
FROM dispatcher.endpoint e JOIN dispatcher.account a ON a.id = e.account_id WHERE e.id = $1;

-- name: look
-- Events of account $1 behind id $2, written from $3 to before $4, and what is known of each at webhook $6: `best` is 3 where it
-- was delivered, 2 where it was given up, 1 where it failed. Scalar subqueries: one probe per event that is asked for.
-- The index knows of ids only, so the way to the first event of a late window leads past all others of its days, which begin at
-- $11 and end at $12. At most $10 are passed at a time: the one at that `place` stands there whatever it is, to go on from.
SELECT o.id, o.seq, o.xid, o.written_at, o.place, o.is_within, o.is_wanted,
       (SELECT max(CASE a.state WHEN 'delivered' THEN 3 WHEN 'retrying' THEN 1 ELSE 2 END) FROM dispatcher.attempt a
        WHERE o.is_wanted AND a.event_seq = o.seq AND a.endpoint_id = $6 AND a.at >= o.written_at - interval '1 day') AS best,
       (SELECT true FROM dispatcher.pending p WHERE o.is_wanted AND p.endpoint_id = $6 AND p.event_seq = o.seq LIMIT 1) AS waits,
       (SELECT true FROM dispatcher.discarded_event x WHERE o.is_wanted AND x.event_seq = o.seq) AS is_refused,
       pg_visible_in_snapshot(o.xid, $9) AS is_older
FROM (SELECT id, seq, xid, written_at, place, is_within,
             is_within AND EXISTS (SELECT FROM unnest($7::text[]) AS f (filter)
                     WHERE filter IN ('*', type) OR right(filter, 2) = '.*' AND starts_with(type, left(filter, -1)))
             AND ($8::text[] IS NULL OR EXISTS (
                 SELECT FROM unnest($8) AS f (filter)
                 WHERE filter IN ('*', type) OR right(filter, 2) = '.*' AND starts_with(type, left(filter, -1)))) AS is_wanted
      FROM (SELECT passed.*, row_number() OVER (ORDER BY id) AS place, written_at >= $3 AND written_at < $4 AS is_within
            FROM (SELECT id, seq, xid, written_at, type FROM dispatcher.outbox
                  WHERE account = $1 AND id > $2 COLLATE "C" AND written_at >= $11 AND written_at < $12
                  ORDER BY id LIMIT $10::integer) AS passed) AS numbered
      WHERE is_within OR place = $10::integer ORDER BY id LIMIT $5::integer) o
ORDER BY o.id;

-- name: queue
-- Held rows: they are pulled as their webhook can take them, and what happens now does not wait behind them.
WITH made AS (
    INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, shard, state, attempts, due_at)
    SELECT $1, u.seq, $2, u.xid, u.at, $3, 'pending', 0, 'infinity'
    FROM unnest($4::bigint[], $5::xid8[], $6::timestamptz[]) AS u (seq, xid, at)
    ON CONFLICT DO NOTHING
    RETURNING 1
)
SELECT count(*), pg_notify('dispatcher_pending', $1::integer || ' ' || (SELECT version FROM dispatcher.registry)) FROM made;

-- name: advance
UPDATE dispatcher.replay SET after_id = $2, reached_at = coalesce($3, reached_at), looked = looked + $4, queued = queued + $5,
       first_seq = coalesce(first_seq, $7), reached_seq = greatest(reached_seq, $8), status = $6, finished_at = CASE WHEN $6 <> 'running' THEN now() END, updated_at = now()
WHERE id = $1;

-- name: stop
-- Its owner's wish.
UPDATE dispatcher.replay SET status = 'cancelled', reason = $3, finished_at = now(), updated_at = now()
WHERE endpoint_id = $1 AND id = $2 AND status = 'running';

-- name: unqueue
-- Take back what a replay queued and nobody has attempted. A statement of its own behind `stop`, which may have waited for a
-- step: its snapshot would not show what that step queued.
WITH taken AS (
    DELETE FROM dispatcher.pending p USING dispatcher.replay r
    WHERE r.endpoint_id = $1 AND r.id = $2 AND p.endpoint_id = $1 AND p.generation = r.generation AND p.due_at = 'infinity' AND p.attempts = 0
    RETURNING 1
)
UPDATE dispatcher.replay SET queued = queued - (SELECT count(*) FROM taken), updated_at = now(),
       status = CASE WHEN EXISTS (SELECT FROM taken) THEN 'cancelled' ELSE status END,
       reason = CASE WHEN EXISTS (SELECT FROM taken) THEN coalesce(reason, $3) ELSE reason END
WHERE endpoint_id = $1 AND id = $2 RETURNING *;

-- name: cancel
UPDATE dispatcher.replay SET status = 'cancelled', reason = $2, finished_at = now(), updated_at = now() WHERE id = $1;
