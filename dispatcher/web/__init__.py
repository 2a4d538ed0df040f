"""The outside: REST API, dashboard and metrics. Sees a Snapshot and the store, never the engine."""
