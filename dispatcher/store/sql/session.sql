-- name: begin
-- $5 sessions of a key at most: one more ends the oldest. What has expired goes too, a bounded part each time.
WITH expired AS (
    DELETE FROM dispatcher.session WHERE hash IN (
        SELECT hash FROM dispatcher.session WHERE expires_at < now() ORDER BY expires_at LIMIT 100)
), crowded AS (
    DELETE FROM dispatcher.session WHERE hash IN (
        SELECT hash FROM (SELECT hash, row_number() OVER (ORDER BY created_at DESC) AS place
                          FROM dispatcher.session WHERE key_id = $2) AS mine WHERE place >= $5::integer)
)
INSERT INTO dispatcher.session (hash, key_id, expires_at) VALUES ($1, $2, least(now() + $3::interval, now() + $4::interval));

-- name: find
SELECT k.id, k.account_id, a.name AS account, k.mode, k.hint, s.expires_at
FROM dispatcher.session s JOIN dispatcher.api_key k ON k.id = s.key_id JOIN dispatcher.account a ON a.id = k.account_id
WHERE s.hash = $1 AND s.expires_at > now() AND k.revoked_at IS NULL;

-- name: extend
-- While it is used, and no longer than $3 after its beginning.
UPDATE dispatcher.session SET expires_at = least(now() + $2::interval, created_at + $3::interval) WHERE hash = $1;

-- name: end
DELETE FROM dispatcher.session WHERE hash = $1;
