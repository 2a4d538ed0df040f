-- How far a replay has come is told by sequence numbers, which count events; by the clock, a million events of one minute would
-- all lie at the end.
-- oldest program: 2
ALTER TABLE dispatcher.replay
    ADD COLUMN first_seq   bigint,  -- the first event looked at
    ADD COLUMN reached_seq bigint,  -- the last one
    ADD COLUMN newest_seq  bigint;  -- of all events when it was begun; NULL: it ends in the past, where nobody knows
