"""Continuing a text over a cache: what comes, in which pieces, how it stops, and `sinklora generate`."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_support import CONTEXT, EVERYTHING, FULL, greedy, opened, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sinklora
from sinklora import cli
from sinklora.commands import shared
from sinklora.generation.generate import cache_facts, continue_tokens, end_tokens
from sinklora.generation.settings import CacheSettings, Sampling, parse_amount
from sinklora.generation.streaming import Interrupt, TokenText
from sinklora.loading import OpenedModel
from sinklora.tokenizer import byte_tokenizer

PROMPT = list(range(60, 110))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def model(folder: Path) -> OpenedModel:
    return opened(folder)


# ---- text out of tokens ----


def test_characters_come_whole() -> None:
    text = "é漢🙂a\u0301 \u2028ß"
    stream = TokenText(byte_tokenizer(8))
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.finish() == ""


@pytest.mark.parametrize("raw", [b"a\xe2\x82", b"\xff\xfeb\xc3", b"\x80" * 20 + b"z", b"\xf0\x9f\x99", b""])
def test_bytes_that_are_no_character_come_at_last(raw: bytes) -> None:
    stream = TokenText(byte_tokenizer(8))
    pieces = [stream.push(byte) for byte in raw]
    assert "".join(pieces) + stream.finish() == raw.decode(errors="replace")


def test_special_tokens_are_no_text() -> None:
    stream = TokenText(byte_tokenizer(8), [257])
    assert [stream.push(token) for token in (97, 258, 0xC3, 0xA9)] == ["a", "", "", "é"]


def test_a_space_before_a_word_is_kept() -> None:
    """Such tokenizers drop the first word's space, which after a prompt is not the first."""
    words = Tokenizer(models.WordLevel({"▁hello": 0, "▁world": 1, "?": 2, "<s>": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.add_special_tokens(["<s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert [TokenText(tokenizer, context).push(1) for context in ([], [0], [3, 0])] == [
        "world",
        " world",
        " world",
    ]
    stream = TokenText(tokenizer, [0])
    assert [stream.push(token) for token in (1, 3, 0)] == [" world", "", " hello"]


# ---- what comes ----


@pytest.mark.parametrize("settings", [EVERYTHING, FULL], ids=["full", "h2o"])
@pytest.mark.parametrize("chunk", [7, 25, 49, 50, 2048])
def test_the_same_as_generate_alone(model: OpenedModel, settings: CacheSettings, chunk: int) -> None:
    ids = torch.tensor([PROMPT])
    expected: Any = model.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=256
    )
    texts: list[str] = []
    progress: list[tuple[int, int]] = []
    cache = settings.make(model.model)
    found = continue_tokens(
        model.model,
        model.tokenizer,
        PROMPT,
        cache,
        greedy(20, chunk=chunk),
        on_text=texts.append,
        on_read=lambda done, total: progress.append((done, total)),
    )
    assert found.tokens == expected[0, 50:].tolist()
    assert (found.ended, found.interrupted, found.read) == (False, False, 50)
    assert "".join(texts) == bytes(token for token in found.tokens if token < 256).decode(errors="replace")
    assert progress[0] == (0, 50)
    assert progress[-1] == (50, 50)
    assert len(progress) == 2 + 49 // chunk
    assert cache.get_seq_length() == 69
    facts = cache_facts(cache)
    assert (facts.seen, facts.kept) == (69, 69)
    assert facts.bytes >= 2 * 2 * 2 * 69 * 8 * 4


def test_a_bounded_cache_keeps_its_budget(model: OpenedModel) -> None:
    cache = CacheSettings(heavy=10, recent=6, num_sink_tokens=2).make(model.model)
    continue_tokens(model.model, model.tokenizer, PROMPT, cache, greedy(20))
    facts = cache_facts(cache)
    assert (facts.seen, facts.kept) == (69, 18)
    assert facts.bytes < cache_facts_of_all(model).bytes / 2


def cache_facts_of_all(model: OpenedModel) -> Any:
    cache = EVERYTHING.make(model.model)
    continue_tokens(model.model, model.tokenizer, PROMPT, cache, greedy(20))
    return cache_facts(cache)


def test_only_what_the_cache_has_not_seen_is_fed(model: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FULL.make(model.model)
    first = continue_tokens(model.model, model.tokenizer, PROMPT, cache, greedy(5))
    tokens = [*PROMPT, *first.tokens, *range(70, 80)]
    fed: list[int] = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda *args, **kwargs: fed.append(kwargs["input_ids"].shape[1]) or forward(*args, **kwargs),
    )
    found = continue_tokens(model.model, model.tokenizer, tokens, cache, greedy(4, chunk=8))
    assert fed == [8, 3, 1, 1, 1]  # the last token of the first answer has not been fed yet
    assert found.read == 11
    monkeypatch.undo()
    again = continue_tokens(model.model, model.tokenizer, tokens, FULL.make(model.model), greedy(4))
    assert again.tokens == found.tokens


def test_the_end_token_ends_and_is_left_out(model: OpenedModel) -> None:
    free = continue_tokens(model.model, model.tokenizer, PROMPT, FULL.make(model.model), greedy(12)).tokens
    end = free[6]
    model.model.generation_config.eos_token_id = [end, 3]  # type: ignore[union-attr]
    assert end_tokens(model.model, model.tokenizer) == (end, 3, 258)
    cache = FULL.make(model.model)
    found = continue_tokens(model.model, model.tokenizer, PROMPT, cache, greedy(12))
    assert found.ended
    assert found.tokens == free[: free.index(end)]
    # The end token has not been fed: the text can go on in its place.
    assert cache.get_seq_length() == len(PROMPT) + len(found.tokens)


def test_settings_stored_with_the_model_do_not_act(model: OpenedModel) -> None:
    expected = continue_tokens(model.model, model.tokenizer, PROMPT, FULL.make(model.model), greedy(12))
    stored: Any = model.model.generation_config
    stored.repetition_penalty, stored.suppress_tokens = 50.0, expected.tokens
    found = continue_tokens(model.model, model.tokenizer, PROMPT, FULL.make(model.model), greedy(12))
    assert found.tokens == expected.tokens
    assert model.model.generation_config is stored


def test_nothing_to_feed_is_an_error(model: OpenedModel) -> None:
    with pytest.raises(ValueError, match="prompt: expected some text"):
        continue_tokens(model.model, model.tokenizer, [], FULL.make(model.model), greedy(3))


def test_sampling_by_seed(model: OpenedModel) -> None:
    def drawn(**options: Any) -> list[int]:
        sampling = Sampling(max_new_tokens=20, **options)
        sampling.begin()
        return continue_tokens(model.model, model.tokenizer, PROMPT, FULL.make(model.model), sampling).tokens

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    assert drawn(temperature=0.0) == drawn(seed=1, top_p=1e-6) == drawn(seed=1, temperature=1e-3)
    config = Sampling().config((258,), None)
    assert (config.top_k, config.eos_token_id, config.pad_token_id) == (0, [258], 258)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"chunk": 1}, "chunk"),
    ],
)
def test_bad_sampling(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        Sampling(**options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"recent": 0}, "recent"),
        ({"heavy": 1.5}, "heavy"),
        ({"num_sink_tokens": -1}, "num_sink_tokens"),
        ({"positions": "some"}, "positions"),
    ],
)
def test_bad_cache_settings(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        CacheSettings(**options)


def test_amounts_are_integers_or_shares() -> None:
    assert [(a, type(a)) for a in map(parse_amount, ("512", "0.1", "1", "1.0"))] == [
        (512, int),
        (0.1, float),
        (1, int),
        (1.0, float),
    ]
    assert (parse_amount(0.5), parse_amount(256)) == (0.5, 256)  # numbers of a YAML file
    with pytest.raises(ValueError, match="got half"):
        parse_amount("half")


def test_pieces_fit_into_the_context_where_positions_are_ranks(model: OpenedModel) -> None:
    sampling = Sampling(chunk=300)
    by_rank = CacheSettings(heavy=200, recent=100, positions="cache")
    assert by_rank.fit(model.model, sampling).chunk == CONTEXT - 304
    assert CacheSettings(heavy=500, recent=100, positions="cache").fit(model.model, sampling).chunk == 2
    for other in (FULL, EVERYTHING, CacheSettings(heavy=0.1, positions="cache")):
        assert other.fit(model.model, sampling) == sampling
    assert by_rank.beyond_context(model.model, 10**6) is None
    assert FULL.beyond_context(model.model, CONTEXT) is None
    assert str(CONTEXT) in (FULL.beyond_context(model.model, CONTEXT + 1) or "")


# ---- Ctrl-C ----


def test_an_interrupted_answer_goes_on_as_if_it_were_whole(model: OpenedModel) -> None:
    whole = continue_tokens(model.model, model.tokenizer, PROMPT, FULL.make(model.model), greedy(20)).tokens
    cache, interrupt = FULL.make(model.model), Interrupt()
    counted: list[str] = []

    def press(text: str) -> None:
        counted.append(text)
        if len(counted) == 5:
            interrupt.handle(signal.SIGINT, None)

    first = continue_tokens(
        model.model, model.tokenizer, PROMPT, cache, greedy(20), on_text=press, interrupt=interrupt
    )
    assert first.interrupted
    assert not first.ended
    assert 5 <= len(first.tokens) < 20
    rest = continue_tokens(
        model.model, model.tokenizer, [*PROMPT, *first.tokens], cache, greedy(20 - len(first.tokens))
    )
    assert rest.read == 1
    assert first.tokens + rest.tokens == whole


def test_reading_a_prompt_can_be_interrupted(model: OpenedModel) -> None:
    cache, interrupt = FULL.make(model.model), Interrupt()

    def press(done: int, total: int) -> None:
        if done == 20:
            interrupt.handle(signal.SIGINT, None)

    found = continue_tokens(
        model.model, model.tokenizer, PROMPT, cache, greedy(5, chunk=10), on_read=press, interrupt=interrupt
    )
    assert (found.tokens, found.interrupted, found.read) == ([], True, 20)
    assert cache.get_seq_length() == 20
    again = continue_tokens(model.model, model.tokenizer, PROMPT, cache, greedy(5))
    assert again.read == 30
    fresh = continue_tokens(model.model, model.tokenizer, PROMPT, FULL.make(model.model), greedy(5))
    assert again.tokens == fresh.tokens


def test_the_signal_sets_the_flag_and_the_third_ends() -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupt = Interrupt()
    with interrupt.watching():
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with interrupt.watching():
        assert not interrupt.requested


# ---- the command ----


@pytest.fixture
def run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs `sinklora generate` in a folder of its own: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, stdin: bytes = b"", default_model: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        named = [] if default_model else ["--model", str(folder)]
        status = cli.main(["generate", *named, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoke


GREEDY = ("--temperature", "0", "--max-new-tokens", "8")


def test_command_reads_the_prompt_from_anywhere(run: Any, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Grüße aus\n", encoding="utf-8")
    raw = "Grüße aus\n".encode()
    status, out, err = run("Grüße aus\n", *GREEDY)
    assert status == 0
    assert out.endswith("\n")
    assert len(out) > 1
    assert "read 12 tokens" in err
    assert "wrote 8" in err
    assert "19 of 19 tokens kept" in err
    assert run("--file", "prompt.txt", *GREEDY)[1] == out
    for arguments in (("-",), ("--file", "-"), ()):
        assert run(*arguments, *GREEDY, stdin=raw)[1] == out
    (tmp_path / "sinklora-demo").symlink_to(folder)
    assert run("Grüße aus\n", *GREEDY, default_model=True)[1] == out


def test_command_options_act(run: Any) -> None:
    text = "x" * 60
    full = run(text, *GREEDY)
    assert run(text, *GREEDY, "--full-cache")[1] == full[1]
    assert run(text, *GREEDY, "--prefill-chunk", "9", "--heavy", "60", "--recent", "60")[1] == full[1]
    small = run(text, *GREEDY, "--heavy", "5", "--recent", "0.1", "--sinks", "0", "--positions", "cache")
    assert "11 of 67 tokens kept (heavy 5, recent 0.1, 0 sinks, positions cache)" in small[2]
    assert (
        run(text, "--seed", "1", "--max-new-tokens", "30")[1]
        == run(text, "--seed", "1", "--max-new-tokens", "30")[1]
    )
    beyond = run("y" * CONTEXT, *GREEDY)[2]
    assert f"context of {CONTEXT}" in beyond
    assert beyond.count("\n") == 2  # nothing of transformers' own


def test_control_characters_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "a\tb\n\x1b]0;title\x07\x9b1m\r\x7fé"
    shared.write(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shared.write(text)
    assert capsys.readouterr().out == "a\tb\n\ufffd]0;title\ufffd\ufffd1m\ufffd\ufffdé"


def test_progress_is_shown_on_a_terminal_and_taken_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading = shared.ReadingLine()
    reading(1024, 4096)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    reading(10, 100)
    assert capsys.readouterr().err == ""
    reading(1024, 4096)
    assert capsys.readouterr().err == "\rreading 1,024 of 4,096 tokens"
    reading(4096, 4096)
    reading.clear()
    assert capsys.readouterr().err == "\r\x1b[K"


def test_a_reader_that_leaves_ends_the_command_quietly(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "sinklora", "generate", "x", "--model", str(folder)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(sinklora.__file__).parent.parent)},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (shared.BROKEN_PIPE_STATUS, "")


def test_command_interrupted(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = shared.write, []

    def press(text: str) -> None:
        write(text)
        written.append(text)
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(shared, "write", press)
    status, out, err = run("hello", "--temperature", "0", "--max-new-tokens", "300")
    assert status == cli.INTERRUPTED_STATUS
    assert out
    assert "tokens kept" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--heavy", "abc"], "'--heavy': expected entries or a share"),
        (["x", "--heavy", "0.0"], "'--heavy': expected"),
        (["x", "--recent", "0"], "'--recent': expected at least 1"),
        (["x", "--recent", "nan"], "'--recent': expected"),
        (["x", "--sinks", "-1"], "'--sinks': expected"),
        (["x", "--positions", "some"], "'--positions': expected one of original, cache"),
        (["x", "--temperature", "-1"], "'--temperature': expected"),
        (["x", "--top-p", "1.5"], "'--top-p': expected"),
        (["x", "--seed", "-5"], "'--seed': expected"),
        (["x", "--max-new-tokens", "0"], "'--max-new-tokens': expected"),
        (["x", "--prefill-chunk", "1"], "'--prefill-chunk': expected"),
        (["x", "--dtype", "int8"], "'--dtype': expected"),
        (["x", "--full-cache", "--sinks", "2"], "'--full-cache': expected alone"),
        (["x", "--file", "y"], "'--file': expected either"),
        (["--file", "none.txt"], "'--file': none.txt: No such file"),
        (["--file", "latin.txt"], "'--file': latin.txt: expected UTF-8"),
        ([], "'PROMPT': expected some text"),
        (["x", "--model", "nowhere"], "'--model': no such folder"),
    ],
)
def test_command_errors_name_the_option(run: Any, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    status, out, err = run(*arguments)
    assert (status, out) == (cli.USAGE_STATUS, "")
    assert err.count("\n") == 1, err
    assert words in err


def test_command_without_a_model(run: Any) -> None:
    status, _, err = run("x", default_model=True)
    assert status == cli.USAGE_STATUS
    assert "sinklora demo" in err
    assert err.count("\n") == 1
