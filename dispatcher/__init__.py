"""TrackPost dispatcher: webhooks delivered from a table of your own PostgreSQL."""

__version__ = "0.1.0"
