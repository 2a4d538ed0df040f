-- Replays: jobs that make new deliveries of old events for one webhook, a bounded step at a time.
--
-- A job walks its account's events in the order of their ids; where it stands is in its row, and a step moves it in the
-- transaction that writes the pending rows. So whoever runs it, and however often it is interrupted, each event is queued once:
-- all deliveries of a job share one generation.
CREATE TABLE dispatcher.replay (
    id          text PRIMARY KEY COLLATE "C",
    endpoint_id integer NOT NULL REFERENCES dispatcher.endpoint ON DELETE CASCADE,
    generation  integer NOT NULL UNIQUE DEFAULT nextval('dispatcher.generation_seq'),
    selection   text NOT NULL CHECK (selection IN ('failed', 'all', 'missed')),
    types       text[] CHECK (cardinality(types) > 0),  -- NULL: whatever the webhook asks for
    since       timestamptz NOT NULL,                   -- by when an event was written
    until       timestamptz NOT NULL CHECK (until > since),
    status      text NOT NULL DEFAULT 'running' CHECK (status IN ('running', 'done', 'cancelled')),
    reason      text CHECK ((reason IS NOT NULL) = (status = 'cancelled')),
    after_id    text NOT NULL DEFAULT '' COLLATE "C",   -- the last event looked at
    reached_at  timestamptz,                            -- when that one was written
    looked      bigint NOT NULL DEFAULT 0,              -- events looked at
    queued      bigint NOT NULL DEFAULT 0,              -- deliveries made of them
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz CHECK ((finished_at IS NULL) = (status = 'running'))
) WITH (fillfactor = 50);
CREATE INDEX replay_running ON dispatcher.replay (id) WHERE status = 'running';
CREATE INDEX replay_by_endpoint ON dispatcher.replay (endpoint_id, id);
