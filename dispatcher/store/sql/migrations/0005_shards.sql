-- Several shards: webhooks are spread over them by a hash, and each is run by one daemon.
--
-- There are as many shards as rows in dispatcher.shard. One is number 0, as before; several are numbered from 1, so that a
-- daemon of an older release, which knows number 0 alone, finds nothing to work from. `dispatcher shards` changes the number.
-- oldest program: 2

-- dispatcher/core/shards.py spells the same hash.
CREATE FUNCTION dispatcher.shard_of(endpoint_id integer, shards bigint) RETURNS integer
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN shards = 1 THEN 0 ELSE 1 + (((endpoint_id * 2654435761) & 4294967295) * shards / 4294967296)::integer END
$$;

-- A trigger, so that a webhook made by an older release gets its shard as well.
CREATE FUNCTION dispatcher.assign_shard() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.shard := dispatcher.shard_of(NEW.id, (SELECT count(*) FROM dispatcher.shard));
    RETURN NEW;
END $$;
CREATE TRIGGER assign_shard BEFORE INSERT ON dispatcher.endpoint FOR EACH ROW EXECUTE FUNCTION dispatcher.assign_shard();

-- A process that serves API and dashboard alone is neither active nor a standby.
ALTER TABLE dispatcher.instance DROP CONSTRAINT instance_role_check,
    ADD CONSTRAINT instance_role_check CHECK (role IN ('active', 'standby', 'web'));
REVOKE EXECUTE ON FUNCTION dispatcher.shard_of(integer, bigint), dispatcher.assign_shard() FROM PUBLIC;
