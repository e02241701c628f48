"""bench_tokenize.py runs, and judges by its bar."""

from __future__ import annotations

from pathlib import Path

from benchmark_support import rows_of, start_script


def test_bench_tokenize_runs(tmp_path: Path) -> None:
    output = tmp_path / "tokenize.csv"
    done = start_script(
        "bench_tokenize.py", "--max-files", "20", "--vocabulary", "300", "--rounds", "1", "--keep-disturbed",
        "--output", str(output),
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr  # a few small files say nothing about the bar
    rows = rows_of(output)
    ways = ["tokenize_documents", "encode_batch", "encode_batch_fast", "transformers"]
    assert [row["way"] for row in rows] == ways and all(row["way"] in done.stdout for row in rows)
    assert int(rows[0]["documents"]) == 20 and float(rows[1]["of_batch"]) == 1.0
    passed = float(rows[0]["of_batch"]) >= 0.85
    assert rows[0]["verdict"] == ("pass" if passed else "FAIL") and done.returncode == (not passed)
    assert all(rows[0][name] for name in ("commit", "cpu", "tokens", "seconds"))
