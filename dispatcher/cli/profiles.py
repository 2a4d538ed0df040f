"""Where `trackpost` finds the API and its key: flag, then environment, then the file that `login` writes.

The file is `$XDG_CONFIG_HOME/trackpost/config.toml`, readable by its owner only:

    [profiles.default]
    url = "https://api.example.com/v1"
    key = "tp_live_…"
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dispatcher.cli.output import MISUSED, UNAUTHORISED, Failure, warn

URL: Final = "https://api.trackpost.de/v1"
PROFILE: Final = "default"

is_profile_name: Final = re.compile(r"[A-Za-z0-9_-]{1,64}").fullmatch


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """Which API, and who asks."""

    url: str
    key: str = dataclasses.field(repr=False)


def find_access(
    *, url: str | None, key: str | None, profile: str | None, environ: Mapping[str, str] = os.environ
) -> Access:
    """Put together what flags, environment and file say. Raises Failure: no key, or a file that cannot be read."""
    set_url, set_key = environ.get("TRACKPOST_API_URL"), environ.get("TRACKPOST_API_KEY")
    if profile:  # named on the command line, so it beats the environment
        stored = read_profiles(environ)
        if profile not in stored:
            known = f"; there are {', '.join(stored)}" if stored else ""
            raise Failure(f"there is no profile {profile!r} in {config_file(environ)}{known}", MISUSED)
        found = stored[profile]
        url, key = url or found.get("url"), key or found.get("key")
    url, key = url or set_url, key or set_key
    if not (url and key):
        found = read_profiles(environ).get(environ.get("TRACKPOST_PROFILE") or PROFILE, {})
        url, key = url or found.get("url"), key or found.get("key")
    if not key:
        raise Failure("no API key: run trackpost login, or set TRACKPOST_API_KEY", UNAUTHORISED)
    return Access(url or URL, key)


def config_file(environ: Mapping[str, str] = os.environ) -> Path:
    """The file's path, by the XDG base directory specification."""
    xdg = environ.get("XDG_CONFIG_HOME", "")
    base = Path(xdg) if xdg.startswith("/") else Path(environ.get("HOME") or Path.home()) / ".config"
    return base / "trackpost" / "config.toml"


def read_profiles(environ: Mapping[str, str] = os.environ) -> dict[str, dict[str, str]]:
    """Every profile of the file by its name; none if there is no file. Raises Failure."""
    path = config_file(environ)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                warn(f"others on this machine can read {path}: chmod 600 it")
            document: dict[str, Any] = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Failure(f"{path} cannot be read: {error}", MISUSED) from None
    profiles = document.get("profiles", {})
    if not isinstance(profiles, dict) or not all(isinstance(entry, dict) for entry in profiles.values()):
        raise Failure(f"{path}: expected [profiles.NAME] with url and key", MISUSED)
    return {name: {k: v for k, v in entry.items() if isinstance(v, str)} for name, entry in profiles.items()}


def write_profile(name: str, access: Access, environ: Mapping[str, str] = os.environ) -> Path:
    """Store a profile beside the others and return the file; it is whole at any moment. Raises Failure."""
    path = config_file(environ)
    profiles = {**read_profiles(environ), name: {"url": access.url, "key": access.key}}
    # JSON's strings are TOML's, DEL excepted, which neither a URL nor a key can hold.
    text = "\n".join(
        f"[profiles.{name if is_profile_name(name) else json.dumps(name)}]\n"
        + "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in entry.items())
        for name, entry in profiles.items()
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, written = tempfile.mkstemp(dir=path.parent, prefix=".config-")  # of mode 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(written).replace(path)
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}", MISUSED) from None
    return path
