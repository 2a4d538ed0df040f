"""Motion: the loops that carry an event from the outbox to the subscriber and write down what came of it."""
