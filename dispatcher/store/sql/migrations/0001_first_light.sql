-- The schema of the dispatcher: an outbox applications write to, and what the engine remembers.
--
-- Shape of the whole:
--   outbox ──(shard: cursor and fence)──▶ attempt   one row per request; the last one carries the delivery's state
--                                     └──▶ pending   only what failed, was spilled, or is held: there is no row per delivery
-- Outbox and attempt are partitioned by day and never updated; old days are dropped, not deleted.

CREATE SEQUENCE dispatcher.outbox_seq;
CREATE SEQUENCE dispatcher.generation_seq AS integer;  -- 0 is the original; replays and retries by hand draw from here

CREATE TABLE dispatcher.setting (
    key   text PRIMARY KEY,
    value text NOT NULL
);
-- Delivery ids are (event, endpoint, generation) enciphered with this key: nothing to index, no volume revealed.
INSERT INTO dispatcher.setting VALUES ('delivery_id_key', replace(gen_random_uuid()::text, '-', ''));

-- ── accounts and keys ──────────────────────────────────────────────────────────────────────────────────────────────
CREATE TABLE dispatcher.account (
    id         integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text NOT NULL UNIQUE CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$'),
    created_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO dispatcher.account (name) VALUES ('default');

CREATE TABLE dispatcher.api_key (
    id         text PRIMARY KEY COLLATE "C",
    account_id integer NOT NULL REFERENCES dispatcher.account,
    mode       text NOT NULL CHECK (mode IN ('live', 'test')),
    hash       bytea NOT NULL UNIQUE,  -- SHA-256 of a key of 192 random bits: nothing to guess, so nothing to stretch
    hint       text NOT NULL,          -- its last four characters, to tell keys apart
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);

-- ── webhooks ───────────────────────────────────────────────────────────────────────────────────────────────────────
CREATE TABLE dispatcher.endpoint (
    id              integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    public_id       text NOT NULL UNIQUE COLLATE "C",
    account_id      integer NOT NULL REFERENCES dispatcher.account,
    shard           integer NOT NULL DEFAULT 0,
    url             text NOT NULL,
    description     text NOT NULL DEFAULT '',
    events          text[] NOT NULL CHECK (cardinality(events) > 0),
    status          text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'paused', 'disabled')),
    disabled_reason text CHECK ((disabled_reason IS NOT NULL) = (status = 'disabled')),
    secret          bytea,             -- encrypted; NULL: unsigned
    previous_secret bytea,             -- signs too until it expires
    previous_secret_expires_at timestamptz,
    headers         json NOT NULL DEFAULT '{}',
    body_style      text NOT NULL DEFAULT 'compact' CHECK (body_style IN ('compact', 'python')),
    retry           json,              -- NULL: the configured schedule; a preset's name; or a list of seconds
    max_concurrency integer CHECK (max_concurrency > 0),
    rate_limit      double precision CHECK (rate_limit > 0),
    ordered         boolean NOT NULL DEFAULT false,
    timeout_s       double precision CHECK (timeout_s > 0),
    version         integer NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    created_snapshot pg_snapshot NOT NULL DEFAULT pg_current_snapshot()  -- events that had committed before it are not its
);
CREATE INDEX endpoint_by_account ON dispatcher.endpoint (account_id, public_id);

-- What the engine learns about a webhook; apart from it, so that learning does not reload the registry.
CREATE TABLE dispatcher.endpoint_health (
    endpoint_id   integer PRIMARY KEY REFERENCES dispatcher.endpoint ON DELETE CASCADE,
    failing_since timestamptz,         -- nothing but failures since then
    exhausted_at  timestamptz,         -- first exhausted delivery since the last success
    last_error    text,
    updated_at    timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 70);

-- One number that changes with every change of a webhook: the reader compares it in the snapshot of each poll.
CREATE TABLE dispatcher.registry (
    one     boolean PRIMARY KEY DEFAULT true CHECK (one),
    version bigint NOT NULL
) WITH (fillfactor = 10);
INSERT INTO dispatcher.registry (version) VALUES (1);

CREATE FUNCTION dispatcher.registry_changed() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE dispatcher.registry SET version = version + 1;
    PERFORM pg_notify('dispatcher_registry', '');
    RETURN NULL;
END $$;
CREATE TRIGGER registry_changed AFTER INSERT OR UPDATE OR DELETE ON dispatcher.endpoint
    FOR EACH STATEMENT EXECUTE FUNCTION dispatcher.registry_changed();

-- ── the outbox ─────────────────────────────────────────────────────────────────────────────────────────────────────
-- Applications set account, type, data, id, created_at; the rest is the dispatcher's. `xid` is the reader's order: every
-- row carries the transaction that made it true. `written_at` is the partition key and not `created_at`, so that an
-- application may date an event as it likes; it is the clock at the INSERT and not at BEGIN, which bounds where the rows
-- of a transaction can be.
CREATE TABLE dispatcher.outbox (
    seq        bigint NOT NULL DEFAULT nextval('dispatcher.outbox_seq'),
    xid        xid8 NOT NULL DEFAULT pg_current_xact_id(),
    written_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_at timestamptz NOT NULL DEFAULT now(),
    id         text NOT NULL COLLATE "C"  -- UUIDv7 in hexadecimal
               DEFAULT 'evt_' || lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0')
                       || '7' || replace(substr(gen_random_uuid()::text, 16), '-', '')
               CHECK (id ~ '^[A-Za-z0-9_-]{1,64}$'),
    account    text NOT NULL DEFAULT 'default',
    type       text NOT NULL,
    data       json NOT NULL              -- never jsonb: it would reorder keys and rewrite numbers that get signed
) PARTITION BY RANGE (written_at);
CREATE INDEX outbox_by_xid ON dispatcher.outbox (xid, seq);       -- the reader's only path
CREATE INDEX outbox_by_account ON dispatcher.outbox (account, id); -- the API's
CREATE TABLE dispatcher.outbox_default PARTITION OF dispatcher.outbox DEFAULT;

-- The outbox as the engine reads it. Applications write what they like, and one odd row must not cost the others their
-- page: what cannot be sent anyway is cut short or NULL here (longer than a type or an account's name can be, 2 MiB of
-- data and more, moments no calendar holds), and the engine discards the event with the reason.
CREATE VIEW dispatcher.event AS
    SELECT seq, xid, id, left(account, 65) AS account, left(type, 129) AS type,
           CASE WHEN octet_length(data::text) <= 2097152 THEN data::text END AS data,
           CASE WHEN created_at >= '0002-01-01 00:00+00' AND created_at < '9999-01-01 00:00+00' THEN created_at END AS created_at,
           written_at
    FROM dispatcher.outbox;

-- NOTIFY takes a cluster-wide lock over the WAL flush at commit, so it is spoken to a sleeper only. A dispatcher that
-- sleeps holds this lock in shared mode: if the exclusive one is to be had, nobody sleeps and nobody needs telling.
-- Qualified names instead of a SET search_path, which would be switched there and back at every producer's INSERT.
CREATE FUNCTION dispatcher.wake() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF pg_catalog.pg_try_advisory_lock(1953656688, 0) THEN
        PERFORM pg_catalog.pg_advisory_unlock(1953656688, 0);
    ELSE
        PERFORM pg_catalog.pg_notify('dispatcher_wake', '');
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER wake AFTER INSERT ON dispatcher.outbox FOR EACH STATEMENT EXECUTE FUNCTION dispatcher.wake();

CREATE TABLE dispatcher.idempotency (
    account     text NOT NULL,
    key         text NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    fingerprint bytea NOT NULL,          -- SHA-256 of type and data
    event_id    text NOT NULL COLLATE "C",
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (account, key)
);
CREATE INDEX idempotency_by_age ON dispatcher.idempotency (created_at);

-- Writes one event and returns its id. A key repeated within 24 hours with the same type and data returns the first
-- event's id; with others it raises unique_violation.
CREATE FUNCTION dispatcher.emit(
    type text, data json, account text DEFAULT 'default', idempotency_key text DEFAULT NULL,
    id text DEFAULT NULL, created_at timestamptz DEFAULT NULL
) RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    event_id text := coalesce(emit.id,
        'evt_' || lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0')
        || '7' || replace(substr(gen_random_uuid()::text, 16), '-', ''));
    print    bytea;
    first    record;
BEGIN
    emit.account := coalesce(emit.account, 'default');
    IF emit.idempotency_key IS NOT NULL THEN
        print := sha256(convert_to(emit.type || E'\n' || emit.data::text, 'UTF8'));
        INSERT INTO dispatcher.idempotency AS i (account, key, fingerprint, event_id)
            VALUES (emit.account, emit.idempotency_key, print, event_id)
            ON CONFLICT (account, key) DO UPDATE
                SET fingerprint = excluded.fingerprint, event_id = excluded.event_id, created_at = excluded.created_at
                WHERE i.created_at < clock_timestamp() - interval '24 hours';
        IF NOT FOUND THEN
            SELECT i.fingerprint, i.event_id INTO STRICT first FROM dispatcher.idempotency i
                WHERE i.account = emit.account AND i.key = emit.idempotency_key;
            IF first.fingerprint <> print THEN
                RAISE EXCEPTION 'idempotency key % was used within 24 hours with other data', quote_literal(emit.idempotency_key)
                    USING ERRCODE = 'unique_violation', DETAIL = 'the first event is ' || first.event_id;
            END IF;
            RETURN first.event_id;
        END IF;
    END IF;
    INSERT INTO dispatcher.outbox (id, account, type, data, created_at)
        VALUES (event_id, emit.account, emit.type, emit.data, coalesce(emit.created_at, now()));
    RETURN event_id;
END $$;

-- ── what the engine remembers ──────────────────────────────────────────────────────────────────────────────────────
-- One row per shard of endpoints: cursor and fence. The cursor says which events are read: all that is visible in `prev`,
-- and, where `cur` is set, of the difference between the two what lies at or before (at_xid, at_seq).
CREATE TABLE dispatcher.shard (
    id       integer PRIMARY KEY,
    epoch    bigint NOT NULL DEFAULT 0,   -- who writes must name it; a take-over raises it
    batch    bigint NOT NULL DEFAULT 0,   -- number of the last flush: tells a lost commit from a lost answer
    prev     pg_snapshot NOT NULL,
    prev_at  timestamptz NOT NULL,        -- server clock just after prev was taken
    cur      pg_snapshot,
    at_xid   xid8 NOT NULL DEFAULT '0',
    at_seq   bigint NOT NULL DEFAULT 0,
    system   text NOT NULL,               -- whose xids these are: the cluster's identifier
    floor    timestamptz NOT NULL DEFAULT '2000-01-01 00:00+00'  -- rows written before it bear xids of another cluster
) WITH (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);
INSERT INTO dispatcher.shard (id, prev, prev_at, system)
    SELECT 0, pg_current_snapshot(), clock_timestamp(), system_identifier::text FROM pg_control_system();

CREATE TABLE dispatcher.attempt (
    at            timestamptz NOT NULL,   -- when it was settled
    event_seq     bigint NOT NULL,
    event_xid     xid8 NOT NULL,
    endpoint_id   integer NOT NULL,
    generation    integer NOT NULL,
    attempt       smallint NOT NULL,      -- 1, 2, …; 0: settled without a request
    state         text NOT NULL CHECK (state IN ('retrying', 'delivered', 'exhausted', 'discarded')),
    result        text CHECK (result IN ('2xx', '3xx', '4xx', '5xx', 'timeout', 'connect', 'tls', 'dns', 'blocked', 'protocol')),
    status        smallint,
    duration_us   integer NOT NULL,
    error         text,
    response_head bytea,
    response_body bytea
) PARTITION BY RANGE (at);
CREATE INDEX attempt_by_event ON dispatcher.attempt (event_seq);
CREATE INDEX attempt_by_endpoint ON dispatcher.attempt (endpoint_id, at);
CREATE TABLE dispatcher.attempt_default PARTITION OF dispatcher.attempt DEFAULT;

-- Deliveries that are neither settled nor only in memory: failed ones that wait, spilled ones, held ones (due at infinity).
CREATE TABLE dispatcher.pending (
    endpoint_id integer NOT NULL,
    event_seq   bigint NOT NULL,
    generation  integer NOT NULL,
    event_xid   xid8 NOT NULL,
    event_at    timestamptz NOT NULL,     -- the event's written_at: finds its partition
    shard       integer NOT NULL DEFAULT 0,
    state       text NOT NULL CHECK (state IN ('pending', 'retrying')),
    attempts    smallint NOT NULL,        -- made so far
    due_at      timestamptz NOT NULL,
    last_error  text,
    PRIMARY KEY (endpoint_id, event_seq, generation)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
CREATE INDEX pending_by_due ON dispatcher.pending (shard, due_at) WHERE due_at < 'infinity';
CREATE INDEX pending_by_event ON dispatcher.pending (event_seq);  -- the oldest first
CREATE INDEX pending_held ON dispatcher.pending (endpoint_id, event_seq, generation) WHERE due_at = 'infinity';

-- Events no body can be made of, with the reason their owner reads.
CREATE TABLE dispatcher.discarded_event (
    event_seq bigint PRIMARY KEY,
    at        timestamptz NOT NULL DEFAULT now(),
    reason    text NOT NULL
);

-- Running daemons and what they see; a heartbeat each second, worth no WAL.
CREATE UNLOGGED TABLE dispatcher.instance (
    id           text PRIMARY KEY,
    host         text NOT NULL,
    pid          integer NOT NULL,
    role         text NOT NULL CHECK (role IN ('active', 'standby')),
    version      text NOT NULL,
    started_at   timestamptz NOT NULL,
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    snapshot     json NOT NULL
) WITH (fillfactor = 50);

-- One flush: one round trip, one transaction, the fence first. NULL cursor: leave it where it is. Writes nothing and returns
-- false if this batch is in already: its owner sends it again when the answer was lost, and the lost session may still be at it.
CREATE FUNCTION dispatcher.flush(
    shard_id integer, my_epoch bigint, my_batch bigint,
    prev pg_snapshot, prev_at timestamptz, cur pg_snapshot, at_xid xid8, at_seq bigint,
    -- attempts
    a_seq bigint[], a_xid xid8[], a_endpoint integer[], a_generation integer[], a_attempt smallint[], a_state text[],
    a_result text[], a_status smallint[], a_duration_us integer[], a_error text[], a_head bytea[], a_body bytea[],
    -- pending rows to write
    p_endpoint integer[], p_seq bigint[], p_generation integer[], p_xid xid8[], p_at timestamptz[], p_state text[],
    p_attempts smallint[], p_due timestamptz[], p_error text[],
    -- pending rows that are settled
    d_endpoint integer[], d_seq bigint[], d_generation integer[],
    -- events discarded
    x_seq bigint[], x_reason text[]
) RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_variable
BEGIN
    IF prev IS NULL THEN
        UPDATE dispatcher.shard s SET batch = my_batch WHERE s.id = shard_id AND s.epoch = my_epoch AND s.batch < my_batch;
    ELSE
        UPDATE dispatcher.shard s SET batch = my_batch, prev = flush.prev, prev_at = flush.prev_at, cur = flush.cur,
               at_xid = flush.at_xid, at_seq = flush.at_seq
            WHERE s.id = shard_id AND s.epoch = my_epoch AND s.batch < my_batch;
    END IF;
    IF NOT FOUND THEN
        PERFORM FROM dispatcher.shard s WHERE s.id = shard_id AND s.epoch = my_epoch;
        IF FOUND THEN
            RETURN false;
        END IF;
        RAISE EXCEPTION 'fenced: epoch % of shard % is over', my_epoch, shard_id USING ERRCODE = 'P0F01';
    END IF;
    INSERT INTO dispatcher.attempt (at, event_seq, event_xid, endpoint_id, generation, attempt, state, result, status,
                                    duration_us, error, response_head, response_body)
        SELECT now(), * FROM unnest(a_seq, a_xid, a_endpoint, a_generation, a_attempt, a_state, a_result, a_status,
                                    a_duration_us, a_error, a_head, a_body);
    IF cardinality(p_seq) > 0 THEN
        INSERT INTO dispatcher.pending AS p (endpoint_id, event_seq, generation, event_xid, event_at, shard, state, attempts,
                                             due_at, last_error)
            SELECT u.e, u.s, u.g, u.x, u.at, shard_id, u.st, u.n, u.due, u.err
            FROM unnest(p_endpoint, p_seq, p_generation, p_xid, p_at, p_state, p_attempts, p_due, p_error)
                 AS u (e, s, g, x, at, st, n, due, err)
            ON CONFLICT (endpoint_id, event_seq, generation) DO UPDATE
                SET state = excluded.state, attempts = excluded.attempts, due_at = excluded.due_at,
                    last_error = coalesce(excluded.last_error, p.last_error);
    END IF;
    IF cardinality(d_seq) > 0 THEN
        DELETE FROM dispatcher.pending p USING unnest(d_endpoint, d_seq, d_generation) AS u (e, s, g)
            WHERE p.endpoint_id = u.e AND p.event_seq = u.s AND p.generation = u.g;
    END IF;
    IF cardinality(x_seq) > 0 THEN
        INSERT INTO dispatcher.discarded_event (event_seq, reason) SELECT * FROM unnest(x_seq, x_reason) ON CONFLICT DO NOTHING;
    END IF;
    RETURN true;
END $$;

-- Makes the partitions of the coming days for one table. LIKE and ATTACH instead of PARTITION OF, which would lock out
-- every INSERT behind a long transaction; a day whose rows already lie in the DEFAULT partition stays there.
CREATE FUNCTION dispatcher.make_partitions(parent text, first_day date, last_day date)
RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    day  date;
    leaf text;
    made integer := 0;
BEGIN
    FOR day IN SELECT d::date FROM generate_series(first_day, last_day, interval '1 day') d LOOP
        leaf := parent || '_' || to_char(day, 'YYYYMMDD');
        CONTINUE WHEN to_regclass('dispatcher.' || leaf) IS NOT NULL;
        EXECUTE format('CREATE TABLE dispatcher.%I (LIKE dispatcher.%I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)',
                       leaf, parent);
        BEGIN
            EXECUTE format('ALTER TABLE dispatcher.%I ATTACH PARTITION dispatcher.%I FOR VALUES FROM (%L) TO (%L)', parent, leaf,
                           day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC');
            made := made + 1;
        EXCEPTION WHEN check_violation THEN
            EXECUTE format('DROP TABLE dispatcher.%I', leaf);
        END;
    END LOOP;
    RETURN made;
END $$;
SELECT dispatcher.make_partitions(t, (now() AT TIME ZONE 'UTC')::date, (now() AT TIME ZONE 'UTC')::date + 7)
    FROM unnest(ARRAY['outbox', 'attempt']) t;

-- ── who may do what ────────────────────────────────────────────────────────────────────────────────────────────────
-- A producer inserts and emits; it reads neither secrets nor keys, nor other people's events. Where the migrating role may
-- not create roles (managed servers), the grants wait: make the role, then run `dispatcher migrate` again.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'dispatcher_producer') THEN
        CREATE ROLE dispatcher_producer NOLOGIN;
    END IF;
EXCEPTION
    WHEN insufficient_privilege THEN RAISE NOTICE 'role dispatcher_producer could not be made; create it and migrate again';
    WHEN duplicate_object OR unique_violation THEN NULL;  -- another host was faster; roles belong to the whole cluster
END $$;
CREATE FUNCTION dispatcher.grant_producer() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'dispatcher_producer') THEN
        GRANT USAGE ON SCHEMA dispatcher TO dispatcher_producer;
        GRANT INSERT (account, type, data, id, created_at) ON dispatcher.outbox TO dispatcher_producer;
        GRANT USAGE ON SEQUENCE dispatcher.outbox_seq TO dispatcher_producer;
        GRANT EXECUTE ON FUNCTION dispatcher.emit(text, json, text, text, text, timestamptz) TO dispatcher_producer;
    END IF;
END $$;
REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA dispatcher FROM PUBLIC;
SELECT dispatcher.grant_producer();
