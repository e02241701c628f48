"""Optional packages: one clear line where one is missing."""

from __future__ import annotations

import importlib.util


class MissingExtraError(ImportError):
    """An optional package is not installed; the message is the pip command that brings it."""


def require(extra: str, *modules: str) -> None:
    """Raises MissingExtraError where one of the top-level modules cannot be found; none of them is
    imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{', '.join(missing)}: not installed, needed here; run: pip install 'sinklora[{extra}]'"
        )
