-- name: registry
-- What the engine needs of every webhook, and the version that goes with it, in one snapshot.
SELECT (SELECT version FROM dispatcher.registry) AS registry_version,
       e.id, e.public_id, e.account_id, a.name AS account, e.url, e.events, e.status, e.secret, e.previous_secret,
       e.previous_secret_expires_at, e.headers, e.body_style, e.retry, e.max_concurrency, e.rate_limit, e.ordered, e.timeout_s,
       e.created_snapshot, e.version
FROM (SELECT) AS one LEFT JOIN dispatcher.endpoint e ON true LEFT JOIN dispatcher.account a ON a.id = e.account_id;

-- name: health
SELECT endpoint_id, failing_since, exhausted_at, last_error FROM dispatcher.endpoint_health;

-- name: learn
INSERT INTO dispatcher.endpoint_health AS h (endpoint_id, failing_since, exhausted_at, last_error, updated_at)
SELECT u.id, u.since, u.exhausted, u.error, now()
FROM unnest($1::integer[], $2::timestamptz[], $3::timestamptz[], $4::text[]) AS u (id, since, exhausted, error)
JOIN dispatcher.endpoint e ON e.id = u.id
ON CONFLICT (endpoint_id) DO UPDATE SET failing_since = excluded.failing_since, exhausted_at = excluded.exhausted_at,
    last_error = excluded.last_error, updated_at = excluded.updated_at;

-- name: disable
UPDATE dispatcher.endpoint e SET status = 'disabled', disabled_reason = u.reason, updated_at = now(), version = e.version + 1
FROM unnest($1::integer[], $2::text[]) AS u (id, reason) WHERE e.id = u.id AND e.status <> 'disabled';

-- name: create
INSERT INTO dispatcher.endpoint (public_id, account_id, url, description, events, secret, headers, body_style, retry,
                                 max_concurrency, rate_limit, ordered, timeout_s)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
RETURNING *, NULL::timestamptz AS failing_since, NULL::text AS last_error;

-- name: get
SELECT e.*, h.failing_since, h.last_error FROM dispatcher.endpoint e LEFT JOIN dispatcher.endpoint_health h ON h.endpoint_id = e.id
WHERE e.public_id = $2 AND e.account_id = $1;

-- name: endpoint
SELECT e.*, a.name AS account FROM dispatcher.endpoint e JOIN dispatcher.account a ON a.id = e.account_id
WHERE e.public_id = $2 AND e.account_id = $1;

-- name: list_after
SELECT e.*, h.failing_since, h.last_error FROM dispatcher.endpoint e LEFT JOIN dispatcher.endpoint_health h ON h.endpoint_id = e.id
WHERE e.account_id = $1 AND e.public_id < $2 COLLATE "C" ORDER BY e.public_id DESC LIMIT $3;

-- name: list_before
SELECT e.*, h.failing_since, h.last_error FROM dispatcher.endpoint e LEFT JOIN dispatcher.endpoint_health h ON h.endpoint_id = e.id
WHERE e.account_id = $1 AND e.public_id > $2 COLLATE "C" ORDER BY e.public_id LIMIT $3;

-- All changes below name the version they were decided on, so that no other client's change is lost.

-- name: update
-- Without $14 the secrets stay; with it, $6 takes the place of all of them at once.
WITH changed AS (
    UPDATE dispatcher.endpoint SET url = $3, description = $4, events = $5, headers = $7, body_style = $8, retry = $9,
           max_concurrency = $10, rate_limit = $11, ordered = $12, timeout_s = $13, updated_at = now(), version = version + 1,
           secret = CASE WHEN $14 THEN $6 ELSE secret END,
           previous_secret = CASE WHEN NOT $14 THEN previous_secret END,
           previous_secret_expires_at = CASE WHEN NOT $14 THEN previous_secret_expires_at END
    WHERE account_id = $1 AND public_id = $2 AND version = $15
    RETURNING *
)
SELECT e.*, h.failing_since, h.last_error FROM changed e LEFT JOIN dispatcher.endpoint_health h ON h.endpoint_id = e.id;

-- name: rotate
-- What is replaced signs on for $4; what that one had replaced does not. An unsigned webhook begins to be signed at once.
WITH changed AS (
    UPDATE dispatcher.endpoint SET secret = $3, updated_at = now(), version = version + 1,
           previous_secret = CASE WHEN $4::interval > interval '0' THEN secret END,
           previous_secret_expires_at = CASE WHEN $4 > interval '0' AND secret IS NOT NULL THEN now() + $4 END
    WHERE account_id = $1 AND public_id = $2 AND version = $5
    RETURNING *
)
SELECT e.*, h.failing_since, h.last_error FROM changed e LEFT JOIN dispatcher.endpoint_health h ON h.endpoint_id = e.id;

-- name: pause
WITH changed AS (
    UPDATE dispatcher.endpoint SET status = 'paused', updated_at = now(), version = version + 1
    WHERE account_id = $1 AND public_id = $2 AND version = $3 AND status = 'active'
    RETURNING *
)
SELECT e.*, h.failing_since, h.last_error FROM changed e LEFT JOIN dispatcher.endpoint_health h ON h.endpoint_id = e.id;

-- name: resume
-- Who re-activates a disabled webhook has mended it: the days of failures begin anew.
WITH changed AS (
    UPDATE dispatcher.endpoint SET status = 'active', disabled_reason = NULL, updated_at = now(), version = version + 1
    WHERE account_id = $1 AND public_id = $2 AND version = $3 AND status IN ('paused', 'disabled')
    RETURNING *
), forgotten AS (
    DELETE FROM dispatcher.endpoint_health h USING changed e WHERE h.endpoint_id = e.id
)
SELECT e.*, NULL::timestamptz AS failing_since, NULL::text AS last_error FROM changed e;

-- name: delete
DELETE FROM dispatcher.endpoint WHERE account_id = $1 AND public_id = $2 AND version = $3 RETURNING id;
