-- What an account's overview is made of. Everything is bounded: $2 webhooks, the newest first, and so many rows of all of them
-- together that a page takes some ten milliseconds whatever the tables hold. Where a bound is met, the figures say so.

-- name: webhooks
-- Each with what waits for it: $3 rows are counted in all, and what most webhooks leave of their share is for those with more.
-- The rows are in the order of the events, so the first is the oldest even where they are cut off. What is sent again, by hand
-- or by a replay, has not waited since its event was written.
WITH mine AS (
    SELECT * FROM dispatcher.endpoint WHERE account_id = $1 AND public_id < $4 COLLATE "C" ORDER BY public_id DESC LIMIT $2
), share AS (
    SELECT greatest(20, $3::integer / greatest(count(*), 1)) AS rows FROM mine
), probe AS MATERIALIZED (
    SELECT (SELECT count(*) FROM (SELECT FROM dispatcher.pending WHERE endpoint_id = m.id LIMIT (SELECT rows FROM share)) AS few)
           AS rows FROM mine m
), allowance AS (
    SELECT greatest(s.rows, ($3 - coalesce(sum(p.rows) FILTER (WHERE p.rows < s.rows), 0))::bigint
                            / greatest(count(*) FILTER (WHERE p.rows = s.rows), 1)) AS rows
    FROM share s CROSS JOIN probe p GROUP BY s.rows
)
SELECT m.public_id AS id, m.url, m.description, m.events, m.status, m.disabled_reason, m.updated_at, h.failing_since,
       h.last_error, w.waiting, w.waiting = s.rows AS is_cut, w.oldest_at, w.next_at
FROM mine m CROSS JOIN allowance s LEFT JOIN dispatcher.endpoint_health h ON h.endpoint_id = m.id
CROSS JOIN LATERAL (
    SELECT count(*) AS waiting, min(event_at) FILTER (WHERE generation = 0) AS oldest_at,
           min(nullif(due_at, 'infinity')) AS next_at
    FROM (SELECT event_at, due_at, generation FROM dispatcher.pending WHERE endpoint_id = m.id
          ORDER BY endpoint_id, event_seq, generation LIMIT (SELECT rows FROM allowance)) AS p) AS w
ORDER BY m.public_id DESC;

-- name: traffic
-- The log from $3 to before $4, $5 rows at most, the newest. What webhooks with little traffic leave of their share is for the
-- busy ones. Where one of those has more, all of it begins where that one's rows do, so that every bucket but the first is
-- whole. The shortest of the lengths $6 that makes no more than $7 buckets is chosen.
WITH mine AS (
    SELECT id FROM dispatcher.endpoint WHERE account_id = $1 ORDER BY public_id DESC LIMIT $2
), share AS (
    SELECT greatest(50, $5::integer / greatest(count(*), 1)) AS rows FROM mine
), probe AS MATERIALIZED (
    SELECT (SELECT count(*) FROM (SELECT FROM dispatcher.attempt WHERE endpoint_id = m.id AND at >= $3 AND at < $4
                                  LIMIT (SELECT rows FROM share)) AS few) AS rows FROM mine m
), allowance AS (
    SELECT greatest(s.rows, ($5 - coalesce(sum(p.rows) FILTER (WHERE p.rows < s.rows), 0))::bigint
                            / greatest(count(*) FILTER (WHERE p.rows = s.rows), 1)) AS rows
    FROM share s CROSS JOIN probe p GROUP BY s.rows
), seen AS MATERIALIZED (
    SELECT m.id, a.at, a.state, a.result, a.duration_us / 1000.0 AS ms FROM mine m CROSS JOIN LATERAL (
        SELECT at, state, result, duration_us FROM dispatcher.attempt
        WHERE endpoint_id = m.id AND at >= $3 AND at < $4 ORDER BY at DESC LIMIT (SELECT rows FROM allowance)) AS a
), cut AS (
    SELECT max(oldest) AS at FROM (
        SELECT min(at) AS oldest FROM seen GROUP BY id HAVING count(*) = (SELECT rows FROM allowance)) AS full_ones
), begun AS (
    SELECT coalesce((SELECT at FROM cut), $3::timestamptz) AS at
), width AS (
    SELECT min(length) AS length FROM unnest($6::interval[]) AS length
    WHERE length * $7::integer >= $4::timestamptz - (SELECT at FROM begun)
), counted AS (
    SELECT date_bin((SELECT length FROM width), at, '2000-01-01 00:00+00') AS bucket, state, result, ms
    FROM seen WHERE at >= (SELECT at FROM begun)
)
SELECT bucket, grouping(bucket) = 1 AS is_whole, (SELECT at FROM cut) AS cut_at, (SELECT length FROM width) AS length,
       count(result) AS attempts, count(*) FILTER (WHERE state = 'delivered') AS delivered,
       count(*) FILTER (WHERE state = 'exhausted') AS exhausted, count(*) FILTER (WHERE state = 'discarded') AS discarded,
       count(*) FILTER (WHERE state = 'retrying') AS retrying,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY ms) FILTER (WHERE result IS NOT NULL) AS p50_ms,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY ms) FILTER (WHERE result IS NOT NULL) AS p95_ms
FROM counted GROUP BY GROUPING SETS ((), (bucket)) ORDER BY bucket;

-- name: recent
-- The latest attempts of all webhooks, with their events.
WITH mine AS (
    SELECT id, public_id, url FROM dispatcher.endpoint WHERE account_id = $1 ORDER BY public_id DESC LIMIT $2
), latest AS (
    SELECT a.*, m.public_id, m.url FROM mine m CROSS JOIN LATERAL (
        SELECT endpoint_id, event_seq, generation, event_xid, at, attempt, state, result, status, duration_us, error
        FROM dispatcher.attempt WHERE endpoint_id = m.id AND at >= $3 ORDER BY at DESC LIMIT $4) AS a
    ORDER BY a.at DESC, a.event_seq DESC, a.generation DESC LIMIT $4
)
SELECT l.endpoint_id, l.event_seq, l.generation, l.public_id AS webhook_id, l.url, l.at, l.attempt, l.state, l.result,
       l.status, l.duration_us / 1000.0 AS ms, l.error, o.id AS event_id, o.type AS event_type
FROM latest l LEFT JOIN LATERAL (
    SELECT id, left(type, 256) AS type FROM dispatcher.outbox WHERE xid = l.event_xid AND seq = l.event_seq LIMIT 1) AS o ON true
ORDER BY l.at DESC, l.event_seq DESC, l.generation DESC;

-- name: pulse
-- Changes whenever a page of the account would look different.
WITH mine AS (
    SELECT id, version FROM dispatcher.endpoint WHERE account_id = $1 ORDER BY public_id DESC LIMIT $2
)
SELECT (SELECT count(*)::text || '.' || coalesce(sum(version), 0) FROM mine) AS webhooks,
       (SELECT max(a.at) FROM mine m CROSS JOIN LATERAL (
            SELECT at FROM dispatcher.attempt WHERE endpoint_id = m.id AND at >= $3 ORDER BY at DESC LIMIT 1) AS a) AS attempted_at,
       (SELECT count(*)::text || '.' || coalesce(max(p.event_seq), 0) FROM mine m CROSS JOIN LATERAL (
            SELECT event_seq FROM dispatcher.pending WHERE endpoint_id = m.id
            ORDER BY endpoint_id DESC, event_seq DESC, generation DESC LIMIT 1) AS p) AS waiting,
       (SELECT max(id) FROM (SELECT id FROM dispatcher.outbox WHERE account = $4 ORDER BY id DESC LIMIT 1) AS e) AS event_id;

-- name: sparks
-- How each of some webhooks fared in each of some stretches of time ($2 to $3): $4 rows of each at most, the latest.
SELECT e.public_id AS id, b.begins, c.delivered, c.failed, c.retrying, c.delivered + c.failed + c.retrying = $4::integer AS is_cut
FROM dispatcher.endpoint e CROSS JOIN unnest($2::timestamptz[], $3::timestamptz[]) AS b (begins, ends)
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE state = 'delivered') AS delivered,
           count(*) FILTER (WHERE state IN ('exhausted', 'discarded')) AS failed,
           count(*) FILTER (WHERE state = 'retrying') AS retrying
    FROM (SELECT state FROM dispatcher.attempt WHERE endpoint_id = e.id AND at >= b.begins AND at < b.ends
          ORDER BY at DESC LIMIT $4::integer) AS a) AS c
WHERE e.account_id = $1 AND e.public_id = ANY ($5::text[]) ORDER BY e.public_id, b.begins;

-- name: held
-- How many deliveries wait for a webhook, counted up to $3, and the oldest of those that were made for their events.
SELECT count(*) AS waiting, min(p.event_at) FILTER (WHERE p.generation = 0) AS oldest_at,
       min(nullif(p.due_at, 'infinity')) AS next_at
FROM dispatcher.endpoint e CROSS JOIN LATERAL (
    SELECT event_at, due_at, generation FROM dispatcher.pending WHERE endpoint_id = e.id
    ORDER BY endpoint_id, event_seq, generation LIMIT $3) AS p
WHERE e.account_id = $1 AND e.public_id = $2;

-- name: engine
-- The daemon that delivers, as it saw itself a second ago.
SELECT heartbeat_at, snapshot FROM dispatcher.instance WHERE role = 'active' ORDER BY heartbeat_at DESC LIMIT 1;
