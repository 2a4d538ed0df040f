"""Webhook secrets at rest: AES-256-GCM, bound to what they belong to.

The key comes from a file or a systemd credential and never touches the database; what the database keeps is a nonce
and the sealed text. `fingerprint` lets two daemons find out that they were given different keys before either writes.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dispatcher.errors import ConfigurationError

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


class Vault:
    """Seals and opens webhook secrets. Its repr shows nothing."""

    __slots__ = ("_cipher", "fingerprint")

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigurationError([f"the encryption key must be {KEY_BYTES} bytes, this one has {len(key)}"])
        self._cipher = AESGCM(key)
        self.fingerprint = hashlib.sha256(b"dispatcher key fingerprint\n" + key).hexdigest()[:16]

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
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], owner.encode()).decode()
        except InvalidTag:
            raise ConfigurationError(
                [f"the secret of {owner} was sealed with another key than the one in [secrets] key_file"]
            ) from None

    def __repr__(self) -> str:
        return f"<Vault {self.fingerprint}>"


def new_key() -> bytes:
    """Make a key."""
    return secrets.token_bytes(KEY_BYTES)
