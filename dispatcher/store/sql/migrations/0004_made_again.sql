-- Retries by hand that wait for their first attempt, the newest first: `listen` shows them when they are made, and not when
-- their webhook can take them. Ordinary deliveries have generation 0 and no entry here.
-- oldest program: 2
CREATE INDEX pending_made_again ON dispatcher.pending (endpoint_id, generation) WHERE generation > 0;
