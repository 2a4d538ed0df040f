-- name: begin
-- What every migration begins with, so that the first one finds its place. The timeout is put in for $timeout: SET takes no
-- parameters.
SET LOCAL lock_timeout = '$timeout';
CREATE SCHEMA IF NOT EXISTS dispatcher;
CREATE TABLE IF NOT EXISTS dispatcher.migration (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE dispatcher.migration ADD COLUMN IF NOT EXISTS oldest integer, ADD COLUMN IF NOT EXISTS program text;

-- name: applied
INSERT INTO dispatcher.migration (version, name, checksum, oldest, program) VALUES ($1, $2, $3, $4, $5);

-- name: migrations
-- The first release's table has neither `oldest` nor `program`.
SELECT version, checksum, (to_jsonb(m) ->> 'oldest')::integer AS oldest, to_jsonb(m) ->> 'program' AS program
FROM dispatcher.migration m;

-- name: daemons
-- Running ones, each with the schema it says it was written for.
SELECT id, version, (snapshot ->> 'schema')::integer AS schema FROM dispatcher.instance
WHERE heartbeat_at > now() - interval '5 seconds' ORDER BY id;

-- name: holders
-- The oldest transactions that hold a lock on a table of the schema: whom a migration waits for.
SELECT a.pid, a.application_name AS name, min(a.xact_start) AT TIME ZONE 'UTC' AS since
FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_stat_activity a ON a.pid = l.pid
WHERE l.granted AND c.relnamespace = 'dispatcher'::regnamespace AND a.pid <> pg_backend_pid() AND a.xact_start IS NOT NULL
GROUP BY a.pid, a.application_name ORDER BY since LIMIT 3;
