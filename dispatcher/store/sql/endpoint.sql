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
-- The first delivery given up since the last success is news for the account. It is told by the change of the row (which the
-- outer statement still sees as it was), so what is written twice is told once.
WITH u AS (
    SELECT * FROM unnest($1::integer[], $2::timestamptz[], $3::timestamptz[], $4::text[]) AS u (id, since, exhausted, error)
), learnt AS (
    INSERT INTO dispatcher.endpoint_health AS h (endpoint_id, failing_since, exhausted_at, last_error, updated_at)
    SELECT u.id, u.since, u.exhausted, u.error, now() FROM u JOIN dispatcher.endpoint e ON e.id = u.id
    ON CONFLICT (endpoint_id) DO UPDATE SET failing_since = excluded.failing_since, exhausted_at = excluded.exhausted_at,
        last_error = excluded.last_error, updated_at = excluded.updated_at
)
INSERT INTO dispatcher.outbox (account, type, data)
SELECT (SELECT a.name FROM dispatcher.account a WHERE a.id = e.account_id), 'webhook.failing',
       json_build_object('webhook_id', e.public_id, 'url', e.url, 'reason', u.error,
                         'since', to_char(u.since AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
FROM u JOIN dispatcher.endpoint e ON e.id = u.id
WHERE u.exhausted IS NOT NULL
  AND (SELECT h.exhausted_at FROM dispatcher.endpoint_health h WHERE h.endpoint_id = u.id) IS NULL;

-- name: disable
-- And let the account know: once, since only what changes is told.
WITH changed AS (
    UPDATE dispatcher.endpoint e SET status = 'disabled', disabled_reason = u.reason, updated_at = now(), version = e.version + 1
    FROM unnest($1::integer[], $2::text[]) AS u (id, reason) WHERE e.id = u.id AND e.status <> 'disabled'
    RETURNING e.id, e.account_id, e.public_id, e.url, e.disabled_reason
)
INSERT INTO dispatcher.outbox (account, type, data)
SELECT (SELECT a.name FROM dispatcher.account a WHERE a.id = e.account_id), 'webhook.disabled',
       json_build_object('webhook_id', e.public_id, 'url', e.url, 'reason', e.disabled_reason, 'since', to_char(
           coalesce((SELECT h.failing_since FROM dispatcher.endpoint_health h WHERE h.endpoint_id = e.id), now()) AT TIME ZONE 'UTC',
           'YYYY-MM-DD"T"HH24:MI:SS"Z"'))
FROM changed e;

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

-- name: sealed
-- What a new key has to seal again.
SELECT id, public_id, secret, previous_secret FROM dispatcher.endpoint WHERE id > $1 ORDER BY id LIMIT $2;

-- name: reseal
-- No change that a version counts: the secrets are the same. Whatever somebody else has written since stays.
UPDATE dispatcher.endpoint e SET secret = u.secret, previous_secret = u.previous_secret
FROM unnest($1::integer[], $2::bytea[], $3::bytea[], $4::bytea[], $5::bytea[])
     AS u (id, old_secret, old_previous_secret, secret, previous_secret)
WHERE e.id = u.id AND e.secret IS NOT DISTINCT FROM u.old_secret
  AND e.previous_secret IS NOT DISTINCT FROM u.old_previous_secret
RETURNING e.id;
