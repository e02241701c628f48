"""What a stored result belongs to: the files of a model, told from those of another state of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read whole: settings, tokenizers, small adapters. Of longer files the size, the time of the last change and
# both ends must do, as reading many gigabytes takes minutes.
WHOLE_BYTES = 16 << 20
END_BYTES = 64 << 10
_ADAPTER_FILE = "adapter_config.json"
_SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".pt"})
# Written beside a model, and no part of it.
_IGNORED = frozenset({"trainer_state.json", "log.json", "results.json", "training_args.bin"})


def fingerprint(source: str, commit: str | None = None) -> str:
    """A digest of the files of a model's folder; of an adapter's and its base's.

    Args:
        source: a folder, or a name on the Hub.
        commit: of a model on the Hub, as its config tells after loading.

    Raises OSError where a file cannot be read.
    """
    digest = hashlib.sha256()
    for part in parts(source):
        if not Path(part).is_dir():
            digest.update(f"hub {part} {commit}\n".encode())
            continue
        for path in sorted(Path(part).iterdir()):
            if path.suffix in _SUFFIXES and path.name not in _IGNORED and path.is_file():
                digest.update(f"{path.name} {_of_file(path)}\n".encode())
    return digest.hexdigest()


def parts(source: str) -> Iterator[str]:
    """The folder, and the base that an adapter in it names."""
    yield source
    try:
        base = json.loads((Path(source) / _ADAPTER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    name: Any = base.get("base_model_name_or_path") if isinstance(base, dict) else None
    if isinstance(name, str) and name:
        yield name


def _of_file(path: Path) -> str:
    status = path.stat()
    with path.open("rb") as file:
        if status.st_size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
        digest.update(file.read(END_BYTES))
        file.seek(-END_BYTES, os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()
