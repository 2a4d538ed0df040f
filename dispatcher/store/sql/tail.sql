-- Following the outbox for some accounts. A position is: everything of transactions below $3 has been seen, but of the
-- transactions $1 only what lies at or before the sequence numbers $2. $4 bounds where rows from $3 on can lie.

-- name: page
-- Looks at $6 rows at most, whoever they belong to, and shows those of the accounts $5. The header's columns stand there even
-- if nothing is shown: the snapshot of the page, and how far it looked.
WITH looked AS MATERIALIZED (
    SELECT page.*, row_number() OVER () AS place FROM (
        SELECT o.* FROM unnest($1::xid8[], $2::bigint[]) AS x (xid, seq) CROSS JOIN LATERAL (
            SELECT xid, seq, account, written_at FROM dispatcher.outbox
            WHERE xid = x.xid AND seq > x.seq ORDER BY xid, seq LIMIT $6::integer) AS o
        UNION ALL
        (SELECT xid, seq, account, written_at FROM dispatcher.outbox
         WHERE xid >= $3::xid8 AND written_at >= $4 ORDER BY xid, seq LIMIT $6)) AS page LIMIT $6
)
SELECT reached.*, shown.*
FROM (SELECT pg_current_snapshot() AS snapshot, clock_timestamp() AS at, (SELECT count(*) FROM looked) AS looked,
             (SELECT xid FROM looked ORDER BY place DESC LIMIT 1) AS last_xid,
             (SELECT seq FROM looked ORDER BY place DESC LIMIT 1) AS last_seq) AS reached
LEFT JOIN (
    SELECT l.place, e.xid, e.seq, e.id, e.account, e.type, e.data, e.created_at FROM looked l CROSS JOIN LATERAL (
        SELECT * FROM dispatcher.event WHERE xid = l.xid AND seq = l.seq AND written_at = l.written_at) AS e
    WHERE l.account = ANY ($5::text[])
) AS shown ON true ORDER BY shown.place;

-- name: now
SELECT pg_current_snapshot() AS snapshot, clock_timestamp() AS at;

-- name: place
-- Where an event stands; an application that sets ids may set one twice, and the first bears it.
SELECT xid, seq, written_at FROM dispatcher.outbox WHERE account = $1 AND id = $2 ORDER BY seq LIMIT 1;

-- name: key
SELECT value FROM dispatcher.setting WHERE key = 'delivery_id_key';

-- name: newest_generation
SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM dispatcher.generation_seq;

-- name: made_again
-- Retries by hand behind generation $2 that wait for their first attempt, the newest $3 of each webhook, with their events. Those
-- of replays are shown when they are sent: there may be millions.
SELECT made.endpoint_id, made.event_seq, made.generation, e.id, e.account, e.type, e.data, e.created_at
FROM dispatcher.account c
JOIN dispatcher.endpoint w ON w.account_id = c.id
CROSS JOIN LATERAL (
    SELECT endpoint_id, event_seq, event_xid, generation FROM dispatcher.pending p
    WHERE endpoint_id = w.id AND generation > 0 AND generation > $2::integer AND attempts = 0
      AND NOT EXISTS (SELECT FROM dispatcher.replay r WHERE r.generation = p.generation)
    ORDER BY generation DESC LIMIT $3::integer) AS made
CROSS JOIN LATERAL (
    SELECT * FROM dispatcher.event WHERE xid = made.event_xid AND seq = made.event_seq LIMIT 1) AS e
WHERE c.name = ANY ($1::text[]) ORDER BY made.generation;

-- name: again
-- First attempts of retries by hand and replays since a moment, with their events: what was sent again.
SELECT now() AS now, sent.endpoint_id, sent.event_seq, sent.generation, e.id, e.account, e.type, e.data, e.created_at
FROM (SELECT 1) AS one LEFT JOIN (
    dispatcher.account c
    JOIN dispatcher.endpoint w ON w.account_id = c.id
    CROSS JOIN LATERAL (
        SELECT endpoint_id, event_seq, event_xid, generation, at FROM dispatcher.attempt
        WHERE endpoint_id = w.id AND at > $2 AND at < now() + interval '1 hour'  -- the days to come need no look
          AND generation > 0 AND attempt = 1 ORDER BY at LIMIT $3::integer) AS sent
    CROSS JOIN LATERAL (
        SELECT * FROM dispatcher.event WHERE xid = sent.event_xid AND seq = sent.event_seq LIMIT 1) AS e
) ON c.name = ANY ($1::text[]) ORDER BY sent.at;
