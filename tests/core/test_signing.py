"""Signatures against the published vector, the reference library, and the standard library's HMAC."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.core.signing import Signer, Verdict, new_secret, standard_key

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "your_webhook_secret"
EVENT_ID, TIMESTAMP, BODY = b"msg_p5jXN8AQM9LWM0D4loKWxJek", b"1614265330", b'{"test": 2432232314}'
NOW = 1614265330
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def legacy_oracle(secret: str, body: bytes) -> str:
    return hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def standard_oracle(key: bytes, event_id: bytes, timestamp: bytes, body: bytes) -> str:
    content = event_id + b"." + timestamp + b"." + body
    return "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()


def verified(signer: Signer, **changes: str | bytes | float) -> Verdict:
    given: dict[str, str | bytes | float] = {
        "event_id": EVENT_ID.decode(),
        "timestamp": TIMESTAMP.decode(),
        "body": BODY,
        "signatures": SIGNATURE,
        "now": NOW,
    }
    return signer.verify_standard(**given | changes)  # type: ignore[arg-type]


# ---- Signing


def test_the_published_vector_of_standard_webhooks() -> None:
    assert Signer(SECRET).standard(EVENT_ID, TIMESTAMP, BODY).decode() == SIGNATURE


def test_the_legacy_signature_is_keyed_by_the_text_of_the_secret_prefix_and_all() -> None:
    assert Signer(SECRET).legacy(BODY).decode() == legacy_oracle(SECRET, BODY)


def test_the_vectors_of_rfc_4231_hold() -> None:
    jefe = Signer("Jefe").legacy(b"what do ya want for nothing?")
    assert jefe == b"5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    # Case 6, a key longer than a block, needs a key that is no UTF-8; base64 carries it.
    long = "whsec_" + base64.b64encode(b"\xaa" * 131).decode()
    body = b"a.1.Test Using Larger Than Block-Size Key - Hash Key First"
    expected = hmac.new(b"\xaa" * 131, body, hashlib.sha256).digest()
    assert Signer(long).standard(b"a", b"1", body[4:]) == b"v1," + base64.b64encode(expected)


SECRETS = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=200),
    st.binary(min_size=1, max_size=150).map(lambda key: "whsec_" + base64.b64encode(key).decode()),
    st.integers(62, 67).map(lambda size: "k" * size),  # around the block
)


@given(SECRETS, st.binary(max_size=300), st.binary(max_size=40), st.integers(0, 2**40))
def test_both_signatures_are_what_hmac_says(secret: str, body: bytes, event_id: bytes, seconds: int) -> None:
    signer, timestamp = Signer(secret), str(seconds).encode()
    assert signer.legacy(body).decode() == legacy_oracle(secret, body)
    expected = standard_oracle(standard_key(secret), event_id, timestamp, body)
    assert signer.standard(event_id, timestamp, body).decode() == expected


def test_signing_twice_gives_the_same_signature() -> None:
    signer = Signer(SECRET)
    assert signer.legacy(BODY) == signer.legacy(BODY)
    assert signer.standard(EVENT_ID, TIMESTAMP, BODY) == signer.standard(EVENT_ID, TIMESTAMP, BODY)


def test_the_header_block_is_two_lines_ready_to_send() -> None:
    assert Signer(SECRET).headers(EVENT_ID.decode(), TIMESTAMP.decode(), BODY) == (
        f"X-Trackpost-Signature: {legacy_oracle(SECRET, BODY)}\r\nwebhook-signature: {SIGNATURE}\r\n"
    )


@given(SECRETS, st.one_of(st.none(), SECRETS), st.binary(max_size=300), st.integers(0, 2**40))
def test_the_header_block_says_what_the_signatures_are(
    secret: str, previous: str | None, body: bytes, seconds: int
) -> None:
    signer, timestamp = Signer(secret, previous), str(seconds)
    legacy, standard = signer.legacy(body).decode(), signer.standard(EVENT_ID, timestamp.encode(), body).decode()
    assert signer.headers(EVENT_ID.decode(), timestamp, body) == (
        f"X-Trackpost-Signature: {legacy}\r\nwebhook-signature: {standard}\r\n"
    )


def test_the_brand_is_configuration() -> None:
    block = Signer(OTHER, prefix="X-Acme-").headers(EVENT_ID.decode(), TIMESTAMP.decode(), BODY)
    assert block.startswith("X-Acme-Signature: ")


@pytest.mark.parametrize("secret", [None, ""])
def test_without_a_secret_nothing_is_signed(secret: str | None) -> None:
    for signer in (Signer(secret), Signer(secret, OTHER)):
        assert not signer.is_signing
        assert not signer.is_rotating
        assert signer.headers(EVENT_ID.decode(), TIMESTAMP.decode(), BODY) == ""
        assert signer.legacy(BODY) == b""
        assert signer.standard(EVENT_ID, TIMESTAMP, BODY) == b""
        assert signer.verify_legacy(BODY, "") is Verdict.MISMATCH
        assert verified(signer, signatures="") is Verdict.MISMATCH


def test_during_rotation_the_standard_header_carries_both_current_first() -> None:
    signer = Signer(OTHER, SECRET)
    assert signer.is_rotating
    current = standard_oracle(OTHER.encode(), EVENT_ID, TIMESTAMP, BODY)
    assert signer.standard(EVENT_ID, TIMESTAMP, BODY).decode() == f"{current} {SIGNATURE}"


def test_during_rotation_the_legacy_header_is_by_the_current_secret_unless_asked() -> None:
    signer = Signer(OTHER, SECRET)
    assert signer.legacy(BODY).decode() == legacy_oracle(OTHER, BODY)
    assert signer.legacy(BODY, by_previous=True).decode() == legacy_oracle(SECRET, BODY)
    usual = signer.headers(EVENT_ID.decode(), TIMESTAMP.decode(), BODY).encode()
    swapped = signer.headers(EVENT_ID.decode(), TIMESTAMP.decode(), BODY, by_previous=True).encode()
    assert swapped == usual.replace(legacy_oracle(OTHER, BODY).encode(), legacy_oracle(SECRET, BODY).encode())


def test_the_previous_secret_cannot_be_asked_for_when_there_is_none() -> None:
    with pytest.raises(AssertionError, match="rotated"):
        Signer(SECRET).headers(EVENT_ID.decode(), TIMESTAMP.decode(), BODY, by_previous=True)


# ---- Keys and secrets


@pytest.mark.parametrize(
    "secret",
    [
        "your_webhook_secret",
        "whsec_",
        "whsec_not base64",
        "whsec_QUI",  # no padding
        "whsec_Q",
        "whsec_QUJD=",  # too much
        "whsec_QUJD====",
        "whsec_====",
        "whsec_QQ==QQ==",
        "whsec_QUJD\n",
        "whsec_-_-_",  # the other alphabet
        "whsec_ключ",
        "Whsec_QUJD",
        "xwhsec_QUJD",
        "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",  # base64, but it does not say so
    ],
)
def test_a_secret_that_is_no_base64_behind_the_prefix_is_its_own_key(secret: str) -> None:
    assert standard_key(secret) == secret.encode()


def test_base64_behind_the_prefix_is_decoded() -> None:
    assert standard_key("whsec_QQ==") == b"A"
    assert standard_key("whsec_QUI=") == b"AB"
    assert standard_key("whsec_QUJDRA==") == b"ABCD"
    assert standard_key("whsec_+/+/") == b"\xfb\xff\xbf"


@given(st.binary(min_size=24, max_size=32))
def test_a_new_secret_stands_for_the_bytes_it_was_made_of(random_bytes: bytes) -> None:
    secret = new_secret(random_bytes)
    assert secret.startswith("whsec_")
    assert standard_key(secret) == random_bytes


@pytest.mark.parametrize("size", [0, 16, 23, 33, 64])
def test_a_new_secret_needs_24_to_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=f"24 to 32 bytes, not {size}"):
        new_secret(bytes(size))


def test_repr_shows_how_many_secrets_but_none_of_them() -> None:
    assert repr(Signer(None)) == "<Signer of 0 secrets>"
    assert repr(Signer(OTHER)) == "<Signer of 1 secrets>"
    assert repr(Signer(OTHER, SECRET)) == "<Signer of 2 secrets>"


# ---- Verifying


def test_the_reference_library_verifies_what_we_sign() -> None:
    secret = new_secret(bytes(range(32)))
    timestamp = str(int(datetime.now(UTC).timestamp())).encode()
    for signer in (Signer(secret), Signer(secret, OTHER), Signer(OTHER, secret)):
        headers = {
            "webhook-id": EVENT_ID.decode(),
            "webhook-timestamp": timestamp.decode(),
            "webhook-signature": signer.standard(EVENT_ID, timestamp, BODY).decode(),
        }
        assert standardwebhooks.Webhook(secret).verify(BODY, headers) == {"test": 2432232314}


def test_the_reference_library_verifies_any_secret_spelled_as_base64() -> None:
    """It decodes every secret, marked or not: the owner of a secret in plain text hands it this form."""
    timestamp = str(int(datetime.now(UTC).timestamp())).encode()
    headers = {
        "webhook-id": EVENT_ID.decode(),
        "webhook-timestamp": timestamp.decode(),
        "webhook-signature": Signer(OTHER).standard(EVENT_ID, timestamp, BODY).decode(),
    }
    spelled = "whsec_" + base64.b64encode(OTHER.encode()).decode()
    assert standardwebhooks.Webhook(spelled).verify(BODY, headers) == {"test": 2432232314}


def test_we_verify_what_the_reference_library_signs() -> None:
    signature = standardwebhooks.Webhook(SECRET).sign(
        EVENT_ID.decode(), datetime.fromtimestamp(NOW, UTC), BODY.decode()
    )
    assert signature == SIGNATURE
    assert verified(Signer(SECRET)) is Verdict.VALID


def test_either_secret_of_a_rotation_verifies() -> None:
    for signer in (Signer(SECRET, OTHER), Signer(OTHER, SECRET)):
        assert verified(signer)
        assert signer.verify_legacy(BODY, legacy_oracle(SECRET, BODY))
        assert signer.verify_legacy(BODY, legacy_oracle(OTHER, BODY))


def test_one_matching_signature_among_several_schemes_is_enough() -> None:
    assert verified(Signer(SECRET), signatures=f"v1a,AAAA v1,AAAA {SIGNATURE} v2,x")


@pytest.mark.parametrize(
    "changes",
    [
        {"body": BODY + b" "},
        {"event_id": "msg_other"},
        {"timestamp": "1614265331"},
        {"timestamp": "01614265330"},
        {"signatures": ""},
        {"signatures": SIGNATURE.replace("v1,", "v1a,")},
        {"signatures": SIGNATURE[3:]},
        {"signatures": SIGNATURE[:-1]},
        {"signatures": SIGNATURE.lower()},
        {"signatures": SIGNATURE + ",x"},
        {"signatures": "é\udcff"},
    ],
)
def test_anything_changed_is_a_mismatch(changes: dict[str, str | bytes]) -> None:
    assert verified(Signer(SECRET), **changes) is Verdict.MISMATCH


def test_another_secret_is_a_mismatch() -> None:
    assert verified(Signer(OTHER)) is Verdict.MISMATCH
    assert Signer(OTHER).verify_legacy(BODY, legacy_oracle(SECRET, BODY)) is Verdict.MISMATCH


@pytest.mark.parametrize(
    "timestamp", ["", "-1", "+1", "1.5", " 1614265330", "1614265330\n", "１６１４２６５３３０", "9" * 5000]
)
def test_a_timestamp_that_is_no_number_is_malformed(timestamp: str) -> None:
    assert verified(Signer(SECRET), timestamp=timestamp) is Verdict.MALFORMED


def test_an_id_with_a_full_stop_is_malformed() -> None:
    """The parts are joined by full stops: such an id could borrow from the timestamp."""
    assert verified(Signer(SECRET), event_id="msg.p5") is Verdict.MALFORMED


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        (NOW - 300, Verdict.VALID),
        (NOW + 300, Verdict.VALID),
        (NOW + 300.5, Verdict.STALE),
        (NOW + 86_400, Verdict.STALE),
        (NOW - 300.5, Verdict.EARLY),
    ],
)
def test_a_genuine_signature_is_good_for_five_minutes_either_way(now: float, verdict: Verdict) -> None:
    assert verified(Signer(SECRET), now=now) is verdict


def test_the_tolerance_can_be_widened() -> None:
    assert verified(Signer(SECRET), now=NOW + 900, tolerance_s=900)


def test_a_forged_signature_is_a_mismatch_however_old() -> None:
    assert verified(Signer(OTHER), now=NOW + 86_400) is Verdict.MISMATCH


@pytest.mark.parametrize(
    "spoil", [str.upper, "sha256={}".format, "{} ".format, lambda text: text[:-1], lambda _: "é\udcff"]
)
def test_a_legacy_signature_must_be_the_bare_lower_case_digits(spoil: object) -> None:
    assert callable(spoil)
    assert Signer(SECRET).verify_legacy(BODY, spoil(legacy_oracle(SECRET, BODY))) is Verdict.MISMATCH


def test_only_a_valid_verdict_is_true() -> None:
    assert [verdict for verdict in Verdict if verdict] == [Verdict.VALID]
