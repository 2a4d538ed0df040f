"""How this installation was built."""

from __future__ import annotations

from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec
from typing import Final

_spec = find_spec("dispatcher.core.lanes")
IS_COMPILED: Final = _spec is not None and isinstance(_spec.loader, ExtensionFileLoader)
"""Whether the path of a delivery runs as machine code, and not as the Python it was made from."""
