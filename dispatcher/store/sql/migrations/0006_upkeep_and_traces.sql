-- Partitions with autovacuum settings of their own, and the trace an event belongs to. Adds only.
-- oldest program: 2

-- ── autovacuum ─────────────────────────────────────────────────────────────────────────────────────────────────────
-- A day's partition is written once, read by index, and dropped whole. PostgreSQL's defaults visit it 17 times while it fills
-- with a million rows and analyze it 29 times, and when its transaction ids grow old they read and write all of it once more.
-- These visit it 9 times, freeze what they see, and analyze it 8 times: 0.37 s of upkeep instead of 1.73 s, the same WAL in all
-- (4.5 MB), and freezing it later costs 5 ms instead of 61 (`python -m bench vacuum`, PostgreSQL 18).
--
-- The other tables stay as they are. `pending` (0.02 × rows + 1000): among 200,000 waiting rows, 600,000 that came and went left
-- 76 MB instead of 85, and 1,878 pages to read the next thousand from instead of 2,080, with less time in VACUUM (10.2 s against
-- 13.5 s) though with more WAL (45 MB against 12). `shard` needs hardly any: its updates stay in their page (HOT), one page after
-- 100,000 of them; with a snapshot open all the while it is 14 MB by any setting.
CREATE OR REPLACE FUNCTION dispatcher.make_partitions(parent text, first_day date, last_day date)
RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    day  date;
    leaf text;
    made integer := 0;
BEGIN
    FOR day IN SELECT d::date FROM generate_series(first_day, last_day, interval '1 day') d LOOP
        leaf := parent || '_' || to_char(day, 'YYYYMMDD');
        CONTINUE WHEN to_regclass('dispatcher.' || leaf) IS NOT NULL;
        EXECUTE format('CREATE TABLE dispatcher.%I (LIKE dispatcher.%I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)'
                       ' WITH (%s)', leaf, parent, dispatcher.partition_settings());
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

CREATE FUNCTION dispatcher.partition_settings() RETURNS text LANGUAGE sql IMMUTABLE AS
    $$ SELECT 'autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000, '
              'autovacuum_freeze_min_age = 0, autovacuum_analyze_scale_factor = 0.5' $$;
REVOKE EXECUTE ON FUNCTION dispatcher.partition_settings() FROM PUBLIC;

-- Moves a day out of the DEFAULT partition into one of its own and returns how many rows it has. All at once: whoever reads
-- sees each row once, before or after. The caller sets a lock timeout.
CREATE FUNCTION dispatcher.move_from_default(parent text, clock text, day date)
RETURNS integer LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    leaf  text := parent || '_' || to_char(day, 'YYYYMMDD');
    first timestamptz := day::timestamp AT TIME ZONE 'UTC';
    after timestamptz := (day + 1)::timestamp AT TIME ZONE 'UTC';
    moved integer;
BEGIN
    -- Before the DELETE looks, so that no row comes in behind its back; in the order of an INSERT: parent, then leaf.
    EXECUTE format('LOCK TABLE ONLY dispatcher.%I IN SHARE UPDATE EXCLUSIVE MODE', parent);
    EXECUTE format('LOCK TABLE ONLY dispatcher.%I IN ACCESS EXCLUSIVE MODE', parent || '_default');
    EXECUTE format('CREATE TABLE dispatcher.%I (LIKE dispatcher.%I INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)'
                   ' WITH (%s)', leaf, parent, dispatcher.partition_settings());
    EXECUTE format('WITH gone AS (DELETE FROM dispatcher.%I WHERE %I >= $1 AND %2$I < $2 RETURNING *)'
                   ' INSERT INTO dispatcher.%3$I SELECT * FROM gone', parent || '_default', clock, leaf) USING first, after;
    GET DIAGNOSTICS moved = ROW_COUNT;
    EXECUTE format('ALTER TABLE dispatcher.%I ATTACH PARTITION dispatcher.%I FOR VALUES FROM (%L) TO (%L)', parent, leaf, first, after);
    RETURN moved;
END $$;
REVOKE EXECUTE ON FUNCTION dispatcher.move_from_default(text, text, date) FROM PUBLIC;

DO $$
DECLARE
    leaf regclass;
BEGIN
    FOR leaf IN SELECT inhrelid FROM pg_catalog.pg_inherits
                WHERE inhparent IN ('dispatcher.outbox'::regclass, 'dispatcher.attempt'::regclass) LOOP
        EXECUTE pg_catalog.format('ALTER TABLE %s SET (%s)', leaf, dispatcher.partition_settings());
    END LOOP;
END $$;

-- ── traces ─────────────────────────────────────────────────────────────────────────────────────────────────────────
-- The W3C traceparent of whatever made the event. Applications set it in their INSERT, or for a whole transaction:
-- SELECT set_config('dispatcher.traceparent', '00-…', true), which reaches dispatcher.emit as well. Not an argument of emit: that
-- would be another function, and callers in the middle of a statement would lose the old one. What is no traceparent is not
-- refused, for it must not cost an application its transaction; nobody is told of it either. The default is an empty text and
-- not NULL: one byte a row instead of eight for a bitmap of nulls. It costs 0.1 µs of an INSERT's 15, within the noise.
CREATE OR REPLACE FUNCTION dispatcher.grant_producer() RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'dispatcher_producer') THEN
        GRANT USAGE ON SCHEMA dispatcher TO dispatcher_producer;
        GRANT INSERT (account, type, data, id, created_at, traceparent) ON dispatcher.outbox TO dispatcher_producer;
        GRANT USAGE ON SEQUENCE dispatcher.outbox_seq TO dispatcher_producer;
        GRANT EXECUTE ON FUNCTION dispatcher.emit(text, json, text, text, text, timestamptz) TO dispatcher_producer;
    END IF;
END $$;

-- The one lock that producers could notice comes last and is held for the rest of this file.
ALTER TABLE dispatcher.outbox
    ADD COLUMN traceparent text DEFAULT coalesce(pg_catalog.current_setting('dispatcher.traceparent', true), '');
CREATE OR REPLACE VIEW dispatcher.event AS
    SELECT seq, xid, id, left(account, 65) AS account, left(type, 129) AS type,
           CASE WHEN octet_length(data::text) <= 2097152 THEN data::text END AS data,
           CASE WHEN created_at >= '0002-01-01 00:00+00' AND created_at < '9999-01-01 00:00+00' THEN created_at END AS created_at,
           written_at,
           CASE WHEN octet_length(traceparent) = 55 THEN traceparent END AS traceparent
    FROM dispatcher.outbox;
