-- Applications write what they like into the outbox. So that one odd row does not cost its account the whole page, moments
-- no calendar holds and data too large to show come back as NULL; the engine discards such events, and says why.
-- The reason is a subquery and not a join: one probe per event shown, whatever the planner thinks of the tables.

-- name: emit
-- now() is the transaction's clock, here and inside: the two are equal. The trace is the outbox row's by default, as long as
-- this statement lasts; a target list is evaluated from its beginning.
SELECT set_config('dispatcher.traceparent', coalesce($6::text, ''), true),
       dispatcher.emit($2::text, $3::json, account => $1::text, idempotency_key => $4::text, id => $5::text) AS id,
       now() AS created_at;

-- name: get
-- An application that sets ids may set one twice: the first event bears it.
SELECT o.id, left(o.type, 256) AS type,
       CASE WHEN o.created_at >= '0002-01-01' AND o.created_at < '9999-01-01' THEN o.created_at END AS created_at,
       CASE WHEN octet_length(o.data::text) <= $3::integer THEN o.data END AS data,
       (SELECT x.reason FROM dispatcher.discarded_event x WHERE x.event_seq = o.seq) AS reason
FROM dispatcher.outbox o
WHERE o.account = $1 AND o.id = $2 ORDER BY o.seq LIMIT 1;

-- name: list_after
-- Looks at $4 events at most, so that a filter few of them pass does not read a month of history. The outer row says how
-- far it looked, and stands there even if nothing passed.
WITH looked AS (
    SELECT seq, id, type, created_at, data FROM dispatcher.outbox
    WHERE account = $1 AND id < $2 COLLATE "C" ORDER BY id DESC LIMIT $4::integer
)
SELECT reached.looked, reached.id AS looked_to, page.*
FROM (SELECT count(*) AS looked, min(id) AS id FROM looked) AS reached LEFT JOIN LATERAL (
    SELECT o.id, left(o.type, 256) AS type,
           CASE WHEN o.created_at >= '0002-01-01' AND o.created_at < '9999-01-01' THEN o.created_at END AS created_at,
           CASE WHEN octet_length(o.data::text) <= $6::integer THEN o.data END AS data,
           (SELECT x.reason FROM dispatcher.discarded_event x WHERE x.event_seq = o.seq) AS reason
    FROM (SELECT * FROM looked WHERE ($5::text IS NULL OR type = $5)
            AND (NOT $7::boolean OR (SELECT true FROM dispatcher.discarded_event x WHERE x.event_seq = looked.seq))
          ORDER BY id DESC LIMIT $3::integer) AS o
) AS page ON true ORDER BY page.id DESC;

-- name: list_before
-- The same towards newer events.
WITH looked AS (
    SELECT seq, id, type, created_at, data FROM dispatcher.outbox
    WHERE account = $1 AND id > $2 COLLATE "C" ORDER BY id LIMIT $4::integer
)
SELECT reached.looked, reached.id AS looked_to, page.*
FROM (SELECT count(*) AS looked, max(id) AS id FROM looked) AS reached LEFT JOIN LATERAL (
    SELECT o.id, left(o.type, 256) AS type,
           CASE WHEN o.created_at >= '0002-01-01' AND o.created_at < '9999-01-01' THEN o.created_at END AS created_at,
           CASE WHEN octet_length(o.data::text) <= $6::integer THEN o.data END AS data,
           (SELECT x.reason FROM dispatcher.discarded_event x WHERE x.event_seq = o.seq) AS reason
    FROM (SELECT * FROM looked WHERE ($5::text IS NULL OR type = $5)
            AND (NOT $7::boolean OR (SELECT true FROM dispatcher.discarded_event x WHERE x.event_seq = looked.seq))
          ORDER BY id LIMIT $3::integer) AS o
) AS page ON true ORDER BY page.id;
