-- name: refill
-- What comes due before the new frontier; rows before the old one are in the wheel or in memory already.
SELECT endpoint_id, event_seq, generation, due_at FROM dispatcher.pending
WHERE shard = $1 AND due_at >= $2 AND due_at < $3 AND due_at < 'infinity' ORDER BY due_at LIMIT $4;

-- name: fetch
-- Deliveries that came due, with their events. An event that retention dropped comes back without one.
SELECT p.endpoint_id, p.event_seq, p.generation, p.attempts, p.due_at, p.state, p.event_xid, p.event_at::timestamp,
       o.id, o.account, o.type, o.data, o.created_at::timestamp, o.traceparent
FROM unnest($1::integer[], $2::bigint[], $3::integer[]) AS u (endpoint_id, event_seq, generation)
JOIN dispatcher.pending p USING (endpoint_id, event_seq, generation)
LEFT JOIN dispatcher.event o ON o.xid = p.event_xid AND o.seq = p.event_seq AND o.written_at = p.event_at
WHERE p.due_at < 'infinity';

-- name: pull
-- The oldest held deliveries of some webhooks, each behind its own position, with their events.
SELECT p.endpoint_id, p.event_seq, p.generation, p.attempts, p.due_at, p.state, p.event_xid, p.event_at::timestamp,
       o.id, o.account, o.type, o.data, o.created_at::timestamp, o.traceparent
FROM unnest($1::integer[], $2::bigint[], $3::integer[], $4::integer[]) AS u (endpoint_id, after_seq, after_generation, most)
CROSS JOIN LATERAL (
    SELECT * FROM dispatcher.pending
    WHERE endpoint_id = u.endpoint_id AND (event_seq, generation) > (u.after_seq, u.after_generation) AND due_at = 'infinity'
    ORDER BY endpoint_id, event_seq, generation LIMIT u.most) AS p
LEFT JOIN dispatcher.event o ON o.xid = p.event_xid AND o.seq = p.event_seq AND o.written_at = p.event_at;

-- name: held_endpoints
-- Webhooks of a shard, deleted ones included, with anything held: one probe of the partial index per webhook, not per row.
WITH RECURSIVE next AS (
    (SELECT endpoint_id FROM dispatcher.pending WHERE due_at = 'infinity' ORDER BY endpoint_id LIMIT 1)
    UNION ALL
    SELECT (SELECT p.endpoint_id FROM dispatcher.pending p WHERE p.due_at = 'infinity' AND p.endpoint_id > next.endpoint_id
            ORDER BY p.endpoint_id LIMIT 1)
    FROM next WHERE next.endpoint_id IS NOT NULL
)
SELECT endpoint_id FROM next
WHERE endpoint_id IS NOT NULL AND dispatcher.shard_of(endpoint_id, (SELECT count(*) FROM dispatcher.shard)) = $1;

-- name: heads
-- The delivery each ordered webhook of a shard waits for: the one with a finite due time.
SELECT DISTINCT ON (p.endpoint_id) p.endpoint_id, p.event_seq, p.generation
FROM dispatcher.endpoint e JOIN dispatcher.pending p ON p.endpoint_id = e.id
WHERE e.ordered AND e.shard = $1 AND p.due_at < 'infinity' ORDER BY p.endpoint_id, p.event_seq, p.generation;
