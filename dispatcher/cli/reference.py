"""The reference of the configuration: what each key is, from the code; what it is for, from the file with all of them.

`config/dispatcher.toml` is written for people and says why; types, defaults, limits and what reloads are declared in
`dispatcher.config`. Tests hold the two together, and the reference that is kept in the repository to both.
"""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Final

from dispatcher.config import KEYS, PREFIX, Config, to_toml
from dispatcher.errors import ConfigurationError

FILE: Final = Path("config") / "dispatcher.toml"
SHARE: Final = Path("share") / "trackpost-dispatcher"

_MARK: Final = re.compile(r"^(?:Reload|Secret)\. ")

_HEAD: Final = """\
# Configuration reference

Every key, as `dispatcher check-config --reference` prints it. A key is set in the file (`--config FILE`, else
`$DISPATCHER_CONFIG`, else `/etc/dispatcher/dispatcher.toml`) or by its variable, which wins; lists are separated by
commas there. A secret may be given as `file:PATH`, or as `credential:NAME` for a systemd credential. *Reload*: a
running daemon takes a new value over on SIGHUP; the other keys need a restart. Unknown keys and bad values refuse to
start, and all of them are named at once.
"""


def example() -> str:
    """The file that lists every key: of this checkout, or as it was installed. Raises ConfigurationError."""
    places = (Path(__file__).parents[2] / FILE, Path(sysconfig.get_path("data")) / SHARE / FILE)
    for place in places:
        if place.is_file():
            return place.read_text(encoding="utf-8")
    raise ConfigurationError([f"{places[-1]}: expected the file that was installed with this program"])


def meanings(text: str) -> dict[tuple[str, str], str]:
    """What the comments of such a file say of each key, by section and key, without the marks in front."""
    found: dict[tuple[str, str], str] = {}
    section, comment = "", list[str]()
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
        elif key := re.match(r"#?(\w+) = ", line):
            found[section, key[1]] = _MARK.sub("", " ".join(comment))
        comment = [*comment, line[2:]] if line.startswith("# ") else []
    return found


def reference() -> str:
    """The reference as Markdown."""
    said = meanings(example())
    sections = [_HEAD]
    for section, keys in KEYS.items():
        values = getattr(Config(), section)
        lines = [f"## [{section}]", "", str(type(values).__doc__).splitlines()[0], ""]
        for name, (_, key) in keys.items():
            notes = [note for note, is_so in (("secret", key.secret), ("reload", key.reload)) if is_so]
            lines += [
                f"### {name}",
                "",
                said[section, name],
                "",
                f"- expected: {key.expected}",
                f"- default: `{to_toml(getattr(values, name))}`",
                f"- variable: `{PREFIX}{section.upper()}_{name.upper()}`",
                *([f"- {', '.join(notes)}"] if notes else []),
                "",
            ]
        sections.append("\n".join(lines))
    return "\n".join(sections)
