"""How many worlds there are."""

from __future__ import annotations

import pytest

BLOCK = 50  # seeds a test: it has a time limit, and says where it is


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        many, one = metafunc.config.getoption("--seeds"), metafunc.config.getoption("--seed")
        blocks = [range(first, min(first + BLOCK, many)) for first in range(0, many, BLOCK)] if one is None else []
        metafunc.parametrize("seeds", blocks, ids=[f"{block.start}-{block.stop - 1}" for block in blocks])
