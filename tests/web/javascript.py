"""Node, and Express from npm in a cache outside of this tree; tests that need them are skipped where they are not."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

NPM_S = 60.0
EXPRESS = "express@^5"


@functools.cache
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("there is no node on this machine")
    return found


@functools.cache
def express() -> Path:
    """The directory with Express in it, installed there the first time."""
    node()
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm on this machine to install Express with")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trackpost-dispatcher-tests"
    if not (cache / "node_modules" / "express" / "package.json").exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            command = [npm, "install", "--prefix", str(cache), "--no-audit", "--no-fund", EXPRESS]
            subprocess.run(command, check=True, capture_output=True, timeout=NPM_S, cwd=cache)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"npm cannot install {EXPRESS} into {cache}: {error}")
    return cache / "node_modules"
