-- A delivery has no row of its own: it stands where its last attempt does, and what was never attempted in its pending row.
-- The row of a retrying delivery's last attempt is the one its pending row counts up to; a settled one's says so itself.

-- name: endpoint
SELECT id, public_id FROM dispatcher.endpoint WHERE account_id = $1 AND public_id = $2;

-- name: owner
SELECT id, public_id FROM dispatcher.endpoint WHERE account_id = $1 AND id = $2;

-- name: attempted_after
-- The latest first, from behind a place on. The pending row is a probe of its primary key per retrying row.
SELECT a.event_seq, a.generation, a.event_xid, a.at, a.state, a.attempt AS attempts, a.result, a.status, a.error,
       nullif(p.due_at, 'infinity') AS due_at, a.state <> 'retrying' OR p.due_at IS NOT NULL AS is_last
FROM (SELECT * FROM dispatcher.attempt
      WHERE endpoint_id = $1 AND at <= $2 AND at >= $5 AND (at, event_seq, generation) < ($2, $3::bigint, $4::integer)
      ORDER BY at DESC, event_seq DESC, generation DESC LIMIT $6) a
LEFT JOIN dispatcher.pending p ON p.endpoint_id = $1 AND p.event_seq = a.event_seq AND p.generation = a.generation
                              AND p.attempts = a.attempt AND a.state = 'retrying'
ORDER BY a.at DESC, a.event_seq DESC, a.generation DESC;

-- name: attempted_before
-- The same towards what changed later.
SELECT a.event_seq, a.generation, a.event_xid, a.at, a.state, a.attempt AS attempts, a.result, a.status, a.error,
       nullif(p.due_at, 'infinity') AS due_at, a.state <> 'retrying' OR p.due_at IS NOT NULL AS is_last
FROM (SELECT * FROM dispatcher.attempt
      WHERE endpoint_id = $1 AND at >= $2 AND at < $5 AND (at, event_seq, generation) > ($2, $3::bigint, $4::integer)
      ORDER BY at, event_seq, generation LIMIT $6) a
LEFT JOIN dispatcher.pending p ON p.endpoint_id = $1 AND p.event_seq = a.event_seq AND p.generation = a.generation
                              AND p.attempts = a.attempt AND a.state = 'retrying'
ORDER BY a.at, a.event_seq, a.generation;

-- name: waiting_after
-- What waits, the newest event first; what was attempted already is the other statements' to show.
SELECT event_seq, generation, event_xid, event_at AS at, state, attempts, NULL::text AS result, NULL::smallint AS status,
       last_error AS error, nullif(due_at, 'infinity') AS due_at, attempts = 0 AS is_last
FROM dispatcher.pending WHERE endpoint_id = $1 AND (event_seq, generation) < ($2::bigint, $3::integer)
ORDER BY endpoint_id DESC, event_seq DESC, generation DESC LIMIT $4;

-- name: waiting_before
SELECT event_seq, generation, event_xid, event_at AS at, state, attempts, NULL::text AS result, NULL::smallint AS status,
       last_error AS error, nullif(due_at, 'infinity') AS due_at, attempts = 0 AS is_last
FROM dispatcher.pending WHERE endpoint_id = $1 AND (event_seq, generation) > ($2::bigint, $3::integer)
ORDER BY endpoint_id, event_seq, generation LIMIT $4;

-- name: seqs
-- An application that sets ids may set one twice.
SELECT seq FROM dispatcher.outbox WHERE account = $1 AND id = $2 ORDER BY seq LIMIT 10;

-- name: of_event
-- Everything on record about some events at one webhook.
SELECT a.event_seq, a.generation, a.event_xid, a.at, a.state, a.attempt AS attempts, a.result, a.status, a.error,
       nullif(p.due_at, 'infinity') AS due_at, a.state <> 'retrying' OR p.due_at IS NOT NULL AS is_last
FROM (SELECT * FROM dispatcher.attempt WHERE event_seq = ANY ($2::bigint[]) AND endpoint_id = $1 ORDER BY at DESC LIMIT $3) a
LEFT JOIN dispatcher.pending p ON p.endpoint_id = $1 AND p.event_seq = a.event_seq AND p.generation = a.generation
                              AND p.attempts = a.attempt AND a.state = 'retrying'
UNION ALL
SELECT * FROM (
    SELECT event_seq, generation, event_xid, event_at, state, attempts, NULL::text, NULL::smallint, last_error,
           nullif(due_at, 'infinity'), attempts = 0
    FROM dispatcher.pending WHERE endpoint_id = $1 AND event_seq = ANY ($2::bigint[]) LIMIT $3) p;

-- name: everywhere
-- Everything on record about some events at all webhooks of an account, the latest change in front. Lateral joins: one probe
-- each, whatever the planner thinks.
SELECT e.public_id AS webhook_id, e.url, e.status AS webhook_status, r.* FROM (
    SELECT a.endpoint_id, a.event_seq, a.generation, a.event_xid, a.at, a.state, a.attempt AS attempts, a.result, a.status,
           a.error, nullif(p.due_at, 'infinity') AS due_at, a.state <> 'retrying' OR p.due_at IS NOT NULL AS is_last
    FROM (SELECT * FROM dispatcher.attempt WHERE event_seq = ANY ($2::bigint[]) ORDER BY at DESC LIMIT $3) a
    LEFT JOIN LATERAL (
        SELECT due_at FROM dispatcher.pending
        WHERE endpoint_id = a.endpoint_id AND event_seq = a.event_seq AND generation = a.generation
          AND attempts = a.attempt AND a.state = 'retrying' LIMIT 1) p ON true
    UNION ALL
    SELECT * FROM (
        SELECT endpoint_id, event_seq, generation, event_xid, event_at, state, attempts, NULL::text, NULL::smallint, last_error,
               nullif(due_at, 'infinity'), attempts = 0
        FROM dispatcher.pending WHERE event_seq = ANY ($2::bigint[]) LIMIT $3) w) AS r
CROSS JOIN LATERAL (
    SELECT public_id, url, status FROM dispatcher.endpoint WHERE id = r.endpoint_id AND account_id = $1 LIMIT 1) AS e
WHERE r.is_last ORDER BY r.at DESC, r.generation DESC LIMIT $3;

-- name: events
-- The events of a page, without their data. A lateral join: one probe each, whatever the planner thinks.
SELECT u.seq, o.id, o.type, o.written_at
FROM unnest($1::xid8[], $2::bigint[]) AS u (xid, seq)
CROSS JOIN LATERAL (
    SELECT id, left(type, 256) AS type, written_at FROM dispatcher.outbox WHERE xid = u.xid AND seq = u.seq LIMIT 1) o;

-- name: event
SELECT o.id, left(o.type, 256) AS type, o.written_at,
       CASE WHEN o.created_at >= '0002-01-01' AND o.created_at < '9999-01-01' THEN o.created_at END AS created_at,
       CASE WHEN octet_length(o.data::text) <= $3::integer THEN o.data END AS data,
       left(o.traceparent, 56) AS traceparent
FROM dispatcher.outbox o WHERE o.xid = $1 AND o.seq = $2 LIMIT 1;

-- name: attempts
SELECT at, event_xid, attempt, state, result, status, duration_us, error, response_head, response_body
FROM dispatcher.attempt WHERE event_seq = $2 AND endpoint_id = $1 AND generation = $3 ORDER BY at, attempt LIMIT $4;

-- name: pending
SELECT event_xid, event_at, state, attempts, nullif(due_at, 'infinity') AS due_at, last_error
FROM dispatcher.pending WHERE endpoint_id = $1 AND event_seq = $2 AND generation = $3;

-- name: redeliver
-- A row of its own, held: the engine is told, and pulls it when the webhook can take it. It is told the version of the
-- registry too, because a webhook that was made or resumed just now may be news to it.
WITH made AS (
    INSERT INTO dispatcher.pending (endpoint_id, event_seq, generation, event_xid, event_at, shard, state, attempts, due_at)
    SELECT e.id, o.seq, nextval('dispatcher.generation_seq'), o.xid, o.written_at, e.shard, 'pending', 0, 'infinity'
    FROM dispatcher.endpoint e CROSS JOIN dispatcher.outbox o
    WHERE e.id = $1 AND e.status <> 'disabled' AND o.xid = $3 AND o.seq = $2 LIMIT 1
    RETURNING endpoint_id, generation
)
SELECT m.generation, pg_notify('dispatcher_pending', m.endpoint_id || ' ' || (SELECT version FROM dispatcher.registry))
FROM made m;

-- name: stats
-- The newest $5 rows of a window, summed up as a whole, by result, and by bucket; `oldest` says how far back they reach.
WITH seen AS (
    SELECT date_bin($4, at, '2000-01-01 00:00+00') AS bucket, at, state, result, duration_us / 1000.0 AS ms
    FROM dispatcher.attempt WHERE endpoint_id = $1 AND at >= $2 AND at < $3 ORDER BY at DESC LIMIT $5
)
SELECT bucket, result, grouping(bucket, result) AS kind, min(at) AS oldest, count(*) AS rows, count(result) AS attempts,
       count(*) FILTER (WHERE state = 'delivered') AS delivered, count(*) FILTER (WHERE state = 'exhausted') AS exhausted,
       count(*) FILTER (WHERE state = 'discarded') AS discarded, count(*) FILTER (WHERE state = 'retrying') AS retrying,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY ms) FILTER (WHERE result IS NOT NULL) AS p50_ms,
       percentile_cont(0.95) WITHIN GROUP (ORDER BY ms) FILTER (WHERE result IS NOT NULL) AS p95_ms
FROM seen GROUP BY GROUPING SETS ((), (bucket), (result)) ORDER BY bucket;
