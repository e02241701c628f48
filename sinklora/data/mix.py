"""Makes one file of instruction rows out of several sources: deduplicated, filtered, drawn by shares."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from .mix_rows import Candidate, Counts, fitting_rows, new_rows
from .mix_settings import MixSettings
from .shards import sync_folder, write_errors
from .sources import Origin, find_origins
from .tokens import Begin, in_kilobytes


class _Place(NamedTuple):
    """Where a row's line stands in the scratch file."""

    start: int
    size: int


def mix(settings: MixSettings, output: str | os.PathLike[str], begin: Begin | None = None) -> dict[str, Any]:
    """Writes the mixture to `output`, JSON Lines of {"messages": [...], "source": name}, and beside it what
    went into it (see manifest_path); returns the latter.

    Rows equal but for white space and Unicode composition are one row, that of the first source. Which rows
    are drawn depends on seed and rows, not on their order in the files. Every source is read once, as a
    stream; digests of all rows and places of the drawn ones are in memory, drawn rows on the disk.

    Raises:
        ValueError: rows that cannot be read (with file and line), too few rows in a source, an output that
        is something else. OSError: the output cannot be written. What was there before stays then.
    """
    place = Path(output)
    _check_output(place)
    tokenizer = None if settings.tokenizer is None else open_tokenizer(settings.tokenizer)
    origins = [find_origins([source.path], settings.split) for source in settings.sources]
    advance = in_kilobytes("mixing", list(itertools.chain(*origins)), begin)
    wanted = settings.counts(settings.rows)
    counts = [Counts() for _ in settings.sources]
    seen: set[bytes] = set()
    with _scratch_folder(place) as scratch:
        with write_errors(scratch, "the rows"):
            spool = (scratch / "rows").open("w+b")
        drawn: list[list[_Place]] = []
        with spool:
            for number, source in enumerate(settings.sources):
                streams = (origin.read(settings.split, None, advance) for origin in origins[number])
                rows = itertools.islice(itertools.chain.from_iterable(streams), settings.read_rows)
                candidates = new_rows(rows, source, settings, seen, counts[number])
                fitting = fitting_rows(candidates, tokenizer, settings, counts[number])
                drawn.append(_draw(fitting, source.name, wanted[number], settings.seed, spool))
            wanted = _affordable(settings, counts)
            for count, number in zip(counts, wanted, strict=True):
                count.taken = number
            chosen = [row for rows, number in zip(drawn, wanted, strict=True) for row in rows[:number]]
            random.Random(settings.seed).shuffle(chosen)
            digest, size = _copy(spool, chosen, scratch / "mix")
        manifest = _manifest(settings, origins, counts, place.name, size, digest)
        _publish(scratch, place, manifest)
    return manifest


def manifest_path(output: str | os.PathLike[str]) -> Path:
    """mix.manifest.json beside mix.jsonl."""
    return Path(output).with_suffix(".manifest.json")


def open_tokenizer(name: str) -> Any:
    """A tokenizer of transformers, from a folder or the Hub.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.path.expanduser(name))
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"tokenizer: cannot be opened from {name}: {first}") from error


def _draw(
    candidates: Iterator[Candidate], name: str, number: int, seed: int, spool: IO[bytes]
) -> list[_Place]:
    """`number` of the candidates, or all where there are fewer, in random order; their lines go to spool.

    The smallest when digests are hashed with the seed: the first n of a larger draw are the draw of n.
    """
    heap: list[tuple[int, _Place]] = []  # the largest key on top
    for candidate in candidates:
        key = hashlib.blake2b(candidate.digest, digest_size=8, key=str(seed).encode()).digest()
        order = -int.from_bytes(key, "big")
        if len(heap) == number and (not heap or order <= heap[0][0]):
            continue
        row = {"messages": candidate.messages, "source": name}
        try:
            line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
        except UnicodeEncodeError as error:
            raise ValueError(
                f"data: {candidate.source}: expected characters, got half of a surrogate pair"
            ) from error
        with write_errors(Path(spool.name).parent, "the rows"):
            place = _Place(spool.seek(0, os.SEEK_END), len(line))
            spool.write(line)
        (heapq.heappush if len(heap) < number else heapq.heappushpop)(heap, (order, place))
    return [place for _, place in sorted(heap, reverse=True)]


def _affordable(settings: MixSettings, counts: list[Counts]) -> list[int]:
    """Rows to take of each source.

    Raises:
        ValueError: too few somewhere, where that is not allowed.
    """
    rows = settings.rows
    wanted = settings.counts(rows)
    short = [index for index, count in enumerate(counts) if count.eligible < wanted[index]]
    if short and not settings.allow_fewer:
        told = []
        for index in short:
            source, count = settings.sources[index], counts[index]
            told.append(
                f"{source.name}: expected {wanted[index]} rows ({source.share:.4g} of {rows}), there were "
                f"{count.eligible} ({count.read} read, {count.duplicates} duplicates, {count.too_short} too "
                f"short, {count.too_long} too long)"
            )
        raise ValueError(
            f"source: {'; '.join(told)}. Ask for fewer rows, give more, or allow fewer (the shares stay)"
        )
    while any(count.eligible < number for count, number in zip(counts, wanted, strict=True)):
        fit = (int(c.eligible / s.share) for c, s in zip(counts, settings.sources, strict=True))
        rows = min(rows - 1, *fit)
        wanted = settings.counts(rows)
    if rows < 1:
        raise ValueError("source: expected rows in every source after the filters, found none in some")
    return wanted


def _copy(spool: IO[bytes], rows: list[_Place], place: Path) -> tuple[str, int]:
    """Writes the rows' lines to a new file; (sha256, bytes)."""
    digest, size = hashlib.sha256(), 0
    with write_errors(place.parent, "the rows"), place.open("xb") as file:
        for row in rows:
            spool.seek(row.start)
            line = spool.read(row.size)
            digest.update(line)
            size += file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def _manifest(
    settings: MixSettings,
    origins: list[list[Origin]],
    counts: list[Counts],
    name: str,
    size: int,
    digest: str,
) -> dict[str, Any]:
    from .. import __version__

    options = dataclasses.asdict(settings)
    del options["sources"]
    return {
        "sinklora": __version__,
        "output": {
            "file": name,
            "rows": sum(count.taken for count in counts),
            "bytes": size,
            "sha256": digest,
        },
        "options": options,
        "sources": [
            {
                **dataclasses.asdict(source),
                "rows": dataclasses.asdict(count),
                "inputs": [entry for origin in found for entry in _inputs(origin)],
            }
            for source, found, count in zip(settings.sources, origins, counts, strict=True)
        ],
    }


def _inputs(origin: Origin) -> Iterator[dict[str, Any]]:
    if origin.kind == "hub":
        yield {"name": origin.name, "revision": origin.identity[-1]}
        return
    path = Path(origin.name)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            yield {"file": str(file), "bytes": file.stat().st_size, "sha256": digest}


def _check_output(place: Path) -> None:
    if place.is_dir():
        raise ValueError(f"output: expected a file, got the folder {place}")
    if place.suffix != ".jsonl":
        raise ValueError(f"output: expected a name that ends in .jsonl, got {place}")
    if place.exists() and not manifest_path(place).is_file():
        raise ValueError(
            f"output: expected a new file, or one with {manifest_path(place).name} beside it, got {place}, "
            "which something else wrote"
        )


@contextlib.contextmanager
def _scratch_folder(place: Path) -> Iterator[Path]:
    """A folder beside the output, on the same disk; gone at the end."""
    with write_errors(place.parent, "the rows"):
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, place: Path, manifest: dict[str, Any]) -> None:
    """Moves rows and manifest to their names; never an old manifest beside new rows."""
    with write_errors(place.parent, "the rows"):
        with (scratch / "manifest").open("x", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        manifest_path(place).unlink(missing_ok=True)
        (scratch / "mix").replace(place)
        (scratch / "manifest").replace(manifest_path(place))
        sync_folder(place.parent)
