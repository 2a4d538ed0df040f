"""The few exceptions of this program, as a tree. An endpoint that answers 500 is not among them: it is an Attempt.

DispatcherError
├── ConfigurationError     a setting is wrong; says key, value and what was expected     exit code 2
├── DatabaseUnreachable    PostgreSQL cannot be reached, or does not let us in           exit code 3
├── SchemaMismatch         the schema is older or newer than this program                exit code 2
├── MigrationBlocked       a transaction does not let go of a table that is to be changed   exit code 1
├── EmbeddedError          the embedded PostgreSQL cannot be found, made or started      exit code 3
├── Fenced                 another daemon holds this shard now; whoever gets this stops writing
├── ShardsInUse            the number of shards cannot change now; says what is in the way
├── AddressRefused         a URL or an address the guard does not let through
└── Undeliverable          event data that no body can be made of; the event is discarded with the reason
"""

from __future__ import annotations


class DispatcherError(Exception):
    """Whatever this program raises on purpose."""


class ConfigurationError(DispatcherError):
    """One or more settings are wrong.

    `problems` holds a sentence for each: key, value, what was expected.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class DatabaseUnreachable(DispatcherError):
    """PostgreSQL cannot be reached or does not let us in; the message says which and where."""


class SchemaMismatch(DispatcherError):
    """The schema and this program do not fit together; the message names the command that mends it."""


class MigrationBlocked(DispatcherError):
    """A migration could not have its lock for a long time; the message names who holds it."""


class EmbeddedError(DispatcherError):
    """The embedded PostgreSQL cannot be found, made or started; the message says what to do."""


class Fenced(DispatcherError):
    """Another daemon took this shard over: its epoch is newer than ours, so nothing of ours may be written any more."""


class ShardsInUse(DispatcherError):
    """The number of shards cannot be changed now; the message says what is in the way."""


class AddressRefused(DispatcherError):
    """The guard does not let this URL or address through.

    `code` is stable and meant for programs (`not_https`, `private_address`, …); the message is meant for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Undeliverable(DispatcherError):
    """This event's data cannot be sent. The message is the reason its owner reads: short, without the data itself."""
