"""The unit files: what systemd says of them, and what they promise about the daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dispatcher.config import Config
from dispatcher.daemon import SETTLE_S

UNITS = Path(__file__).parents[2] / "systemd"
SERVICES = ("dispatcher.service", "dispatcher@.service")
EXPOSURE_MAX = 15  # tenths, as `systemd-analyze --threshold` counts; a service without any of this has 96

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not on this machine")


def analyze(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([str(ANALYZE), *arguments], check=False, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def systemd_version() -> int:
    found = re.search(r"systemd (\d+)", analyze("--version")[1])
    assert found is not None
    return int(found[1])


def installed(directory: Path) -> Path:
    """The units as `systemctl` would find them, with programs that this machine has."""
    for path in UNITS.glob("dispatcher*"):
        text = re.sub(r"(?m)^(Exec\w+)=/\S+", r"\1=/bin/true", path.read_text())
        (directory / path.name).write_text(text)
    return directory


def directives(name: str, section: str) -> list[tuple[str, str]]:
    body = (UNITS / name).read_text().partition(f"[{section}]\n")[2].partition("\n[")[0]
    return [(key, value) for key, value in re.findall(r"(?m)^(\w+)=(.*)$", body)]


@needs_systemd
@pytest.mark.parametrize("unit", ["dispatcher.service", "dispatcher@b.service", "dispatcher.socket"])
def test_systemd_finds_nothing_to_say_about_a_unit(unit: str, tmp_path: Path) -> None:
    directory = installed(tmp_path)
    if "@" in unit:
        (directory / unit).symlink_to(directory / "dispatcher@.service")
    assert analyze("verify", "--man=no", "--recursive-errors=no", str(directory / unit)) == (0, "")


@needs_systemd
def test_systemd_would_say_what_is_wrong(tmp_path: Path) -> None:
    unit = installed(tmp_path) / "dispatcher.service"
    unit.write_text(unit.read_text().replace("ProtectClock=", "ProtectClocks="))
    assert "ProtectClocks" in analyze("verify", "--man=no", str(unit))[1]


@needs_systemd
def test_the_drop_in_fits_the_service(tmp_path: Path) -> None:
    unit = installed(tmp_path) / "dispatcher.service"
    (tmp_path / "dispatcher.service.d").mkdir()
    shutil.copy(UNITS / "notify-reload.conf", tmp_path / "dispatcher.service.d")
    said = analyze("verify", "--man=no", "--recursive-errors=no", str(unit))[1]
    if systemd_version() >= 253:
        assert said == ""
    else:  # which is why it is a drop-in
        assert [line.partition(": ")[2] for line in said.splitlines()] == [
            "Failed to parse service type, ignoring: notify-reload"
        ]


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_exposed_no_more_than_it_must_be(name: str) -> None:
    code, said = analyze("security", "--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager", str(UNITS / name))
    assert code == 0, said[-2000:]


def test_the_instances_run_in_the_same_sandbox_as_the_one() -> None:
    one, several = (directives(name, "Service") for name in SERVICES)
    assert {line for line in several if line not in one} == {
        ("EnvironmentFile", "-/etc/dispatcher/%i.env"),
        ("StateDirectory", "dispatcher-%i"),
    }
    assert [line for line in one if line not in several] == [("StateDirectory", "dispatcher")]


@pytest.mark.parametrize("name", SERVICES)
def test_stopping_may_take_longer_than_the_drain(name: str) -> None:
    stop_s = float(dict(directives(name, "Service"))["TimeoutStopSec"])
    assert stop_s > Config().delivery.drain_s + SETTLE_S


@pytest.mark.parametrize("name", [path.name for path in UNITS.iterdir() if path.suffix in {".service", ".socket"}])
def test_directives_say_why(name: str) -> None:
    lines = (UNITS / name).read_text().partition("\n[Install]")[0].splitlines()
    unexplained = [
        line for before, line in zip(["", *lines], lines, strict=False) if re.match(r"\w+=", line) and not before
    ]
    assert unexplained == [], "a group of directives begins with its reason"


def test_the_install_page_names_every_file() -> None:
    page = (UNITS / "README.md").read_text()
    assert [path.name for path in UNITS.iterdir() if path.name != "README.md" and path.name not in page] == []


def test_the_image_sets_only_what_there_is_to_set() -> None:
    from dispatcher.config import KEYS, PREFIX

    known = {f"{PREFIX}{section}_{name}".upper() for section, keys in KEYS.items() for name in keys}
    assert set(re.findall(r"\bDISPATCHER_\w+", (UNITS / "Containerfile").read_text())) <= known
