"""Webhook secrets at rest: AES-256-GCM, bound to what they belong to.

The key comes from a file or a systemd credential and never touches the database; what the database keeps is a nonce
and the sealed text. `fingerprint` lets two daemons find out that they were given different keys before either writes.

A key is replaced while daemons run: a vault seals with one key and opens with others as well, so that what was sealed
with the old one can be read until all of it was sealed again.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dispatcher.errors import ConfigurationError

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


class Vault:
    """Seals webhook secrets with `key`, and opens what that or one of the `others` sealed. Its repr shows nothing."""

    __slots__ = ("_cipher", "_others", "fingerprint", "fingerprints")

    def __init__(self, key: bytes, others: Sequence[bytes] = ()) -> None:
        self._cipher, self.fingerprint = _cipher(key)
        ciphers = [_cipher(other) for other in others]
        self._others = tuple(cipher for cipher, _ in ciphers)
        self.fingerprints = frozenset({self.fingerprint, *(fingerprint for _, fingerprint in ciphers)})

    def seal(self, secret: str | None, owner: str) -> bytes | None:
        """Encrypt a webhook's secret; `owner` is the webhook's id, without which it does not open."""
        if secret is None:
            return None
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, secret.encode(), owner.encode())

    def open(self, sealed: bytes | None, owner: str) -> str | None:
        """Decrypt it again. Raises ConfigurationError when the key is another one."""
        if sealed is None:
            return None
        for cipher in (self._cipher, *self._others):
            secret = _opened(cipher, sealed, owner)
            if secret is not None:
                return secret
        raise ConfigurationError(
            [f"the secret of {owner} was sealed with another key than those of [secrets] key_file and other_key_files"]
        )

    def renew(self, sealed: bytes | None, owner: str) -> bytes | None:
        """The same secret sealed with `key`; what is so already is returned as it is. Raises ConfigurationError."""
        if sealed is None or _opened(self._cipher, sealed, owner) is not None:
            return sealed
        return self.seal(self.open(sealed, owner), owner)

    def __repr__(self) -> str:
        return f"<Vault {self.fingerprint}>"


def new_key() -> bytes:
    """Make a key."""
    return secrets.token_bytes(KEY_BYTES)


def _cipher(key: bytes) -> tuple[AESGCM, str]:
    if len(key) != KEY_BYTES:
        raise ConfigurationError([f"the encryption key must be {KEY_BYTES} bytes, this one has {len(key)}"])
    return AESGCM(key), hashlib.sha256(b"dispatcher key fingerprint\n" + key).hexdigest()[:16]


def _opened(cipher: AESGCM, sealed: bytes, owner: str) -> str | None:
    try:
        return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], owner.encode()).decode()
    except InvalidTag:
        return None
