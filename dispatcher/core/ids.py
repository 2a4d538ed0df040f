"""Delivery ids: how a delivery is named, and found again without an index.

A delivery has no row of its own on the happy path, so its id is not stored: it is its key (event sequence, endpoint id,
generation), one AES block under a key of the database's own. Unique because a block cipher is a bijection, found
because it can be undone, and it tells nobody how many events or webhooks there are.
"""

from __future__ import annotations

import struct
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from dispatcher.model import DeliveryKey

DELIVERY_PREFIX: Final = "dlv_"
_KEY: Final = struct.Struct(">QII")  # event sequence, endpoint id, generation
_pack: Final = _KEY.pack
_HEX_DIGITS: Final = frozenset("0123456789abcdef")


class DeliveryIds:
    """Makes delivery ids of keys and keys of delivery ids."""

    __slots__ = ("_decrypt", "_encrypt")

    def __init__(self, key: bytes) -> None:
        cipher = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305  one block, unique input: a permutation is all we want
        self._encrypt = cipher.encryptor().update
        self._decrypt = cipher.decryptor().update

    def id_of(self, endpoint_id: int, event_seq: int, generation: int) -> str:
        """Return the id of a delivery: `dlv_` and 32 hexadecimal digits. 0.6 µs."""
        return DELIVERY_PREFIX + self._encrypt(_pack(event_seq, endpoint_id, generation)).hex()

    def key_of(self, delivery_id: str) -> DeliveryKey | None:
        """Return the key behind an id; None if no id looks like that. A key need not exist."""
        digits = delivery_id.removeprefix(DELIVERY_PREFIX)
        if len(digits) != 32 or len(digits) == len(delivery_id) or not _HEX_DIGITS.issuperset(digits):
            return None
        event_seq, endpoint_id, generation = _KEY.unpack(self._decrypt(bytes.fromhex(digits)))
        if event_seq >= 1 << 63 or endpoint_id >= 1 << 31 or generation >= 1 << 31:
            return None  # not one of ours: PostgreSQL's integers end here
        return endpoint_id, event_seq, generation
