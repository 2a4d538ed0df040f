-- Reading the outbox as the difference of two snapshots. A page is a prefix of that difference in the order (xid, seq): first
-- the transactions that were in progress in `prev` ($1), then everything that began later (from xid $2 on), both behind
-- (at_xid, at_seq) = ($3, $4). Where the second kind begins is one comparison: of two lower bounds on its first column an index
-- scan may start at either, and then read all the day's rows before the other (33 ms of every poll at a million). $5 bounds where
-- the first kind's rows can lie, $6 the second kind's: partitions before are pruned.

-- The rows of a page are found as they are and dressed last, by /* _event */: an expression below the partitions is set up once
-- for each of them, which cost as much as all the rest of a poll that finds one event.

-- name: _event
-- As in the view dispatcher.event: of what may be of any size, no more than says that it is too much. Times are cast to
-- `timestamp`, which an engine's connections read as integers.
seq, xid, id, left(account, 65), left(type, 129), CASE WHEN octet_length(data::text) <= 2097152 THEN data::text END,
    CASE WHEN created_at >= '0002-01-01Z' AND created_at < '9999-01-01Z' THEN created_at END::timestamp, written_at::timestamp,
    CASE WHEN octet_length(traceparent) = 55 THEN traceparent END

-- name: _header
-- One statement, one snapshot: the header row carries it, so whatever the rest shows is visible in it.
SELECT pg_current_snapshot() AS snapshot, clock_timestamp() AS at, (SELECT version FROM dispatcher.registry) AS registry,
       NULL::bigint AS seq, NULL::xid8 AS xid, NULL::text AS id, NULL::text AS account, NULL::text AS type, NULL::text AS data,
       NULL::timestamp AS created_at, NULL::timestamp AS written_at, NULL::text AS traceparent

-- name: first_page
/* _header */
UNION ALL
(SELECT NULL, NULL, NULL, /* _event */ FROM (
    SELECT o.* FROM unnest($1::xid8[]) AS x (xid) CROSS JOIN LATERAL (
        SELECT * FROM dispatcher.outbox
        WHERE xid = x.xid AND seq > CASE WHEN x.xid = $3::xid8 THEN $4::bigint ELSE 0 END AND written_at >= $5
        ORDER BY xid, seq LIMIT $7) AS o
    UNION ALL
    (SELECT * FROM dispatcher.outbox
     WHERE (xid, seq) > (greatest($3::xid8, $2::xid8), CASE WHEN $3::xid8 >= $2::xid8 THEN $4::bigint ELSE 0 END) AND written_at >= $6
     ORDER BY xid, seq LIMIT $7)) AS page LIMIT $7);

-- name: first_page_near
-- The same in one scan of the index, for when nothing was in progress in `prev` ($1) or hardly anything was read of what is younger
-- than the oldest that was ($2): what is read already is left out one by one. $3 and $4 are $6 and $7 there.
/* _header */
UNION ALL
(SELECT NULL, NULL, NULL, /* _event */ FROM (
    SELECT * FROM dispatcher.outbox
    WHERE xid >= $2::xid8 AND written_at >= $3 AND NOT pg_visible_in_snapshot(xid, $1::pg_snapshot)
    ORDER BY xid, seq LIMIT $4) AS page);

-- name: next_page
-- A further page of a difference that did not fit into one: what is visible in its end, the snapshot $8.
SELECT NULL::pg_snapshot, NULL::timestamptz, NULL::bigint, /* _event */ FROM (
    SELECT o.* FROM unnest($1::xid8[]) AS x (xid) CROSS JOIN LATERAL (
        SELECT * FROM dispatcher.outbox
        WHERE xid = x.xid AND seq > CASE WHEN x.xid = $3::xid8 THEN $4::bigint ELSE 0 END AND written_at >= $5
          AND pg_visible_in_snapshot(xid, $8)
        ORDER BY xid, seq LIMIT $7) AS o
    UNION ALL
    (SELECT * FROM dispatcher.outbox
     WHERE (xid, seq) > (greatest($3::xid8, $2::xid8), CASE WHEN $3::xid8 >= $2::xid8 THEN $4::bigint ELSE 0 END)
       AND xid < pg_snapshot_xmax($8) AND written_at >= $6
       AND pg_visible_in_snapshot(xid, $8)
     ORDER BY xid, seq LIMIT $7)) AS page LIMIT $7;

-- name: reread
-- After a restore: events by the clock instead of by foreign transaction ids. Three empty columns stand for the header's.
SELECT NULL::pg_snapshot, NULL::timestamptz, NULL::bigint, seq, xid, id, account, type, data, created_at::timestamp, written_at::timestamp,
       traceparent
FROM dispatcher.event WHERE written_at >= $1 ORDER BY xid, seq;

-- name: born
-- By which clock time each webhook existed: for a reread, where the transaction ids of events and webhooks may be of two clusters.
SELECT id, created_at FROM dispatcher.endpoint;

-- name: newest_known
-- Beyond this sequence number nothing is settled or pending yet: from the end of an index each.
SELECT greatest((SELECT max(event_seq) FROM dispatcher.attempt), (SELECT max(event_seq) FROM dispatcher.pending), 0);

-- name: known
-- Which of these (endpoint, event) pairs are settled or pending already.
SELECT u.endpoint_id, u.event_seq
FROM unnest($1::integer[], $2::bigint[]) AS u (endpoint_id, event_seq)
WHERE EXISTS (SELECT FROM dispatcher.pending p
              WHERE p.endpoint_id = u.endpoint_id AND p.event_seq = u.event_seq AND p.generation = 0)
   OR EXISTS (SELECT FROM dispatcher.attempt a
              WHERE a.event_seq = u.event_seq AND a.endpoint_id = u.endpoint_id AND a.generation = 0 AND a.at >= $3);
