-- Sessions of the dashboard. A row names its session by a hash, as keys are kept: who reads this table cannot sign in with it.
-- oldest program: 2
CREATE TABLE dispatcher.session (
    hash       bytea PRIMARY KEY,  -- SHA-256 of the random id that only the browser has
    key_id     text NOT NULL COLLATE "C" REFERENCES dispatcher.api_key ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX session_by_expiry ON dispatcher.session (expires_at);
CREATE INDEX session_by_key ON dispatcher.session (key_id, created_at);
