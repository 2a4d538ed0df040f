"""This host: descriptors, certificates, the key, room on the disk, ports."""

from __future__ import annotations

import errno
import http.client
import os
import resource
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from dispatcher.cli.checkup.findings import Finding, advice, ok, problem
from dispatcher.config import Config, host_and_port
from dispatcher.daemon import files_wanted
from dispatcher.errors import ConfigurationError
from dispatcher.store.vault import Vault

DISK_LOW_BYTES: Final = 1 << 30
DISK_OUT_BYTES: Final = 200 << 20  # less than PostgreSQL needs for a checkpoint's worth of WAL
ANSWER_S: Final = 2.0


def look_at_host(config: Config, environ: Mapping[str, str]) -> list[Finding]:
    """Everything that needs no database."""
    return [
        look_at_files(config),
        look_at_trust(config.network.ca_file),
        look_at_key(Path(config.secrets.key_file), environ),
        look_at_disk(Path(config.state.directory)),
        *look_at_ports(config),
    ]


def look_at_files(config: Config) -> Finding:
    """File descriptors: the daemon raises its soft limit to what it wants, as far as the hard one lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files_wanted(config)
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        return ok("file limit", f"{wanted:,} descriptors are wanted and can be had")
    return problem(
        "file limit",
        f"{hard:,} descriptors at most; [delivery] max_in_flight = {config.delivery.max_in_flight} wants {wanted:,}",
        f"LimitNOFILE={wanted} in the unit, or `ulimit -Hn {wanted}`, or a lower max_in_flight",
    )


def look_at_trust(ca_file: str) -> Finding:
    """Certificate authorities: without any, every attempt over TLS fails."""
    where = ca_file or "the system's trust store"
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        return problem(
            "TLS trust", f"{where} cannot be read: {error}", "a file of PEM certificates in [network] ca_file"
        )
    known = context.get_ca_certs()
    if not known and not ca_file and _has_hashed_certificates():
        return ok("TLS trust", "the system's directory of certificates")
    if not known:
        return problem(
            "TLS trust",
            f"no certificate authority in {where}",
            "install your system's ca-certificates, or name a bundle in [network] ca_file",
        )
    valid = [each for each in known if ssl.cert_time_to_seconds(str(each["notAfter"])) > time.time()]
    if not valid:
        return problem("TLS trust", f"every certificate authority in {where} has expired", "a current bundle")
    return ok("TLS trust", f"{len(valid)} certificate authorities in {where}")


def _has_hashed_certificates() -> bool:
    """Whether there is a directory that OpenSSL looks into only when it needs to."""
    directory = ssl.get_default_verify_paths().capath
    return directory is not None and any(Path(directory).glob("*.[0-9]"))


def look_at_key(path: Path, environ: Mapping[str, str]) -> Finding:
    """The key of the webhook secrets: there, readable, ours alone."""
    try:
        mode = path.stat().st_mode
        read_vault(path)
    except FileNotFoundError:
        return advice("secrets key", f"{path} is not there yet", "the first start makes it; then keep a copy elsewhere")
    except OSError as error:
        return problem("secrets key", f"{path} cannot be read: {error.strerror}", "let the daemon's user read it")
    except (ValueError, ConfigurationError):
        return problem("secrets key", f"{path} holds no key", "64 hexadecimal digits: restore the file from its copy")
    # systemd's credentials are closed by the directory above them.
    passed = environ.get("CREDENTIALS_DIRECTORY") == str(path.parent)
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and not passed:
        return problem(
            "secrets key",
            f"{path} is open to others (mode {stat.S_IMODE(mode):04o})",
            f"chmod 600 {path}",
        )
    return ok("secrets key", f"{path}, for its owner only")


def read_vault(path: Path) -> Vault:
    """The vault with the key in this file. Raises OSError, ValueError, ConfigurationError; makes nothing."""
    return Vault(bytes.fromhex(path.read_text(encoding="ascii").strip()))


def look_at_disk(directory: Path) -> Finding:
    """Room where state is kept."""
    there = next(each for each in (directory, *directory.parents) if each.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / (1 << 30):,.1f} GiB free for {directory}"
    if not os.access(there, os.W_OK | os.X_OK):
        return problem("state directory", f"{there} cannot be written", "give it to the daemon's user, or name another")
    if free < DISK_OUT_BYTES:
        return problem("state directory", found, "make room: an embedded PostgreSQL stops when there is none")
    if free < DISK_LOW_BYTES:
        return advice("state directory", found, "make room, or shorten [retention]")
    return ok("state directory", found)


def look_at_ports(config: Config) -> Iterator[Finding]:
    """Whether the daemon could listen, or does already."""
    for key, listen, path in (
        ("[server] listen", config.server.listen, "/v1/openapi.json"),
        ("[metrics] listen", config.metrics.listen, "/healthz"),
    ):
        if listen:
            yield _look_at_port(key, listen, path)


def _look_at_port(key: str, listen: str, path: str) -> Finding:
    host, port = host_and_port(listen)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_ours(host, port, path):
            return ok(key, f"{listen}: a dispatcher listens there already")
        remedy = {
            errno.EADDRINUSE: f"end what listens there (`ss -ltnp 'sport = :{port}'`), or choose another port",
            errno.EACCES: "choose a port above 1023, or have systemd listen: dispatcher.socket",
        }.get(error.errno or 0, "an address of this host, or 0.0.0.0 for all of them")
        return problem(key, f"{listen}: {error.strerror}", remedy)
    return ok(key, f"{listen} is free")


def _is_ours(host: str, port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status == 200 and answer.getheader("X-Request-Id") is not None
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
