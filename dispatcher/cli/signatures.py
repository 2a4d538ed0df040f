"""`trackpost sign` and `trackpost verify`: signatures over the bytes of a file, without asking anybody."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import click

from dispatcher.cli.asking import read_secret
from dispatcher.cli.output import FAILED, examples, file_argument, for_programs, json_option, print_json, refuse

AS_IT_CAME: Final = "check the bytes as they came, before anything parses them"


def secret_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the secret comes from."""
    for option in (
        click.option("--secret-file", type=click.Path(), metavar="FILE|-", help="A file with the secret."),
        click.option("--secret", metavar="SECRET", help="The secret. Shows in ps and in the shell's history."),
    ):
        command = option(command)
    return command


def _given_secret(secret: str | None, file: str | None, body: str) -> str:
    if (secret is None) == (file is None):
        raise click.UsageError("name the secret, by --secret-file or --secret")
    if file == "-" and body == "-":
        raise click.UsageError("secret and body cannot both come from standard input")
    found = read_secret(secret, file)
    if not found:
        refuse("expected a secret that is not empty", "--secret")
    return found


@click.command(
    epilog=examples(
        "trackpost sign --secret-file secret.txt body.json",
        "trackpost sign --secret-file secret.txt body.json --json | jq -r '.\"X-Trackpost-Signature\"'",
    )
)
@click.argument("file", type=click.Path(), default="-")
@secret_options
@click.option("--webhook-id", metavar="ID", help="[default: the id in the body, else msg_0]")
@click.option("--webhook-timestamp", type=click.IntRange(0), metavar="UNIX", help="[default: now]")
@json_option
def sign(
    *,
    file: str,
    secret: str | None,
    secret_file: str | None,
    webhook_id: str | None,
    webhook_timestamp: int | None,
    as_json: bool,
) -> None:
    """Print the signature headers of a body.

    They are those that would be sent with FILE, or standard input; no server is asked. The body is signed to the byte:
    a line break at the end of the file belongs to it.
    """
    from dispatcher.core.signing import Signer

    signer = Signer(_given_secret(secret, secret_file, file))
    body = file_argument(file, "FILE")
    id_ = webhook_id or _id_in(body) or "msg_0"
    at = str(int(time.time()) if webhook_timestamp is None else webhook_timestamp)
    headers = {
        "X-Trackpost-Signature": signer.legacy(body).decode(),
        "webhook-id": id_,
        "webhook-timestamp": at,
        "webhook-signature": signer.standard(id_.encode(), at.encode(), body).decode(),
    }
    if for_programs(as_json):
        print_json(headers)
    else:
        click.echo("\n".join(f"{name}: {value}" for name, value in headers.items()))


def _id_in(body: bytes) -> str | None:
    try:
        found = json.loads(body)["id"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return found if isinstance(found, str) and found.isprintable() else None


@click.command(
    epilog=examples(
        "trackpost verify --secret-file secret.txt --signature 5f0c… body.json",
        "trackpost verify --secret-file secret.txt --webhook-id evt_… --webhook-timestamp 1736937002 \\",
        "                 --webhook-signature 'v1,K5oZ…' body.json",
    )
)
@click.argument("file", type=click.Path(), default="-")
@secret_options
@click.option("--signature", metavar="HEX", help="The value of X-Trackpost-Signature.")
@click.option("--webhook-id", metavar="ID", help="The value of webhook-id.")
@click.option("--webhook-timestamp", metavar="UNIX", help="The value of webhook-timestamp.")
@click.option("--webhook-signature", metavar="V1", help="The value of webhook-signature.")
@click.option("--ignore-age", is_flag=True, help="Do not mind a webhook-timestamp more than 5 minutes away.")
@json_option
def verify(
    *,
    file: str,
    secret: str | None,
    secret_file: str | None,
    signature: str | None,
    webhook_id: str | None,
    webhook_timestamp: str | None,
    webhook_signature: str | None,
    ignore_age: bool,
    as_json: bool,
) -> None:
    """Check the signature of a body.

    That of FILE, or standard input, to the byte; no server is asked. The exit code is 0 if it is valid and 1 if not,
    and you are told what is wrong with it.

    Give --signature, or all of --webhook-id, --webhook-timestamp and --webhook-signature, or all four.
    """
    from dispatcher.core.signing import Signer, Verdict

    standard = (webhook_id, webhook_timestamp, webhook_signature)
    if any(standard) and not all(standard):
        raise click.UsageError("--webhook-id, --webhook-timestamp and --webhook-signature belong together")
    if signature is None and not all(standard):
        raise click.UsageError("nothing to check: give --signature, or the three --webhook-… options")
    signer = Signer(_given_secret(secret, secret_file, file))
    body = file_argument(file, "FILE")

    def judge(body: bytes, hexadecimal: str | None = signature) -> dict[str, Verdict]:
        verdicts = {}
        if hexadecimal is not None:
            verdicts["X-Trackpost-Signature"] = signer.verify_legacy(body, hexadecimal.strip())
        if webhook_id and webhook_timestamp and webhook_signature:
            tolerance_s = float("inf") if ignore_age else 300.0
            verdicts["webhook-signature"] = signer.verify_standard(
                webhook_id, webhook_timestamp, body, webhook_signature, now=time.time(), tolerance_s=tolerance_s
            )
        return verdicts

    verdicts = judge(body)
    likely = "" if all(verdicts.values()) else _likely(body, signature, judge)
    if for_programs(as_json):
        shown = {
            name: {"valid": bool(v), "verdict": v.name.lower(), "message": v.value} for name, v in verdicts.items()
        }
        print_json({"valid": all(verdicts.values()), "signatures": shown, "likely": likely or None})
    else:
        click.echo("\n".join(f"{name}: {verdict.value}" for name, verdict in verdicts.items()))
        if likely:
            click.echo(likely)
    if not all(verdicts.values()):
        click.get_current_context().exit(FAILED)


def _likely(body: bytes, signature: str | None, judge: Callable[..., Mapping[str, object]]) -> str:
    """What would make the signature valid, if that is one of the usual mistakes; else nothing."""
    bodies = {"without the line break at the end of the file, which an editor may have added": body.rstrip(b"\r\n")}
    with contextlib.suppress(ValueError, RecursionError):
        event = json.loads(body)
        compact = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        bodies[f"over the same JSON without blanks: {AS_IT_CAME}"] = compact
        bodies[f"over the same JSON as Python writes it: {AS_IT_CAME}"] = json.dumps(event).encode()
    for says, other in bodies.items():
        if all(judge(other).values()):
            return f"It is valid {says}."
    if signature is not None:
        plain = signature.strip().lower().removeprefix("sha256=")
        if all(judge(body, plain).values()):
            return "It is valid in lower-case hexadecimal digits with nothing in front, which is how it is sent."
        if not re.fullmatch("[0-9a-f]{64}", plain):
            return f"--signature takes 64 hexadecimal digits; these are {len(plain)} characters."
    return ""
