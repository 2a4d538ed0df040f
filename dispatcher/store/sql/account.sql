-- name: create_key
-- The account is made if new. DO UPDATE where DO NOTHING would read better: it returns the row of an account that another
-- session is making at this moment, which this statement's snapshot does not show.
WITH owner AS (
    INSERT INTO dispatcher.account (name) VALUES ($1) ON CONFLICT (name) DO UPDATE SET name = excluded.name RETURNING id, name
)
INSERT INTO dispatcher.api_key AS k (id, account_id, mode, hash, hint) SELECT $2, owner.id, $3, $4, $5 FROM owner
RETURNING k.id, (SELECT name FROM owner) AS account, k.mode, k.hint, k.created_at, k.revoked_at;

-- name: list_keys
SELECT k.id, a.name AS account, k.mode, k.hint, k.created_at, k.revoked_at
FROM dispatcher.api_key k JOIN dispatcher.account a ON a.id = k.account_id
WHERE k.id > $1 COLLATE "C" ORDER BY k.id LIMIT $2;

-- name: revoke_key
-- A second time changes nothing: the first moment stands.
UPDATE dispatcher.api_key k SET revoked_at = coalesce(k.revoked_at, now()) FROM dispatcher.account a
WHERE k.id = $1 AND a.id = k.account_id
RETURNING k.id, a.name AS account, k.mode, k.hint, k.created_at, k.revoked_at;

-- name: find_key
SELECT k.id, k.account_id, a.name AS account, k.mode
FROM dispatcher.api_key k JOIN dispatcher.account a ON a.id = k.account_id
WHERE k.hash = $1 AND k.revoked_at IS NULL;

-- name: exists
SELECT EXISTS (SELECT FROM dispatcher.account WHERE name = $1);
