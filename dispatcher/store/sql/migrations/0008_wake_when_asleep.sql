-- Whether anybody sleeps is asked in the trigger's condition, so that while nobody does no function is called: the PL/pgSQL call was
-- most of what the wake-up cost a producer. It also holds the probe's lock for a tenth of the time, in which another producer
-- that asks takes it for a sleeper's and notifies in vain.
--
-- The protocol is the same: a sleeper holds the lock in shared mode, and who gets the exclusive one wakes nobody. The
-- condition is judged at the end of the INSERT, behind the row's default that takes a transaction id, as the proof in
-- `engine/outbox.py` demands.
-- oldest program: 2
CREATE OR REPLACE FUNCTION dispatcher.wake() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.pg_notify('dispatcher_wake', '');
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER wake AFTER INSERT ON dispatcher.outbox FOR EACH STATEMENT
    WHEN (CASE WHEN pg_catalog.pg_try_advisory_lock(1953656688, 0)
               THEN NOT pg_catalog.pg_advisory_unlock(1953656688, 0) ELSE true END)
    EXECUTE FUNCTION dispatcher.wake();
