"""Dialogues over one cache: formats, turns, interrupted answers, and every command of `sinklora chat`."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_support import (
    CHATML,
    CONTEXT,
    EVERYTHING,
    FULL,
    NO_SYSTEM,
    REWRITING,
    SPACED,
    greedy,
    opened,
    save_model,
)

import sinklora
from sinklora import cli
from sinklora.generation.chat import ChatSession
from sinklora.generation.chat_commands import ChatCommands, LeaveChat
from sinklora.generation.formats import Dialogue, Llama2Format, PlainFormat, choose_format
from sinklora.generation.generate import cache_facts, continue_tokens
from sinklora.generation.settings import CacheSettings, Sampling
from sinklora.generation.streaming import Interrupt
from sinklora.tokenizer import byte_tokenizer

TURNS = ("Hello there", "and now?", "  last one ")
BOS, EOS = 257, 258


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


def session(folder: Path, style: str = "auto", template: str | None = None, **options: Any) -> ChatSession:
    settings = options.pop("settings", FULL)
    sampling = options.pop("sampling", greedy(9))
    return ChatSession(opened(folder, template), settings, sampling, style=style, **options)


# ---- formats ----


def test_llama2_tokens() -> None:
    tokenizer = byte_tokenizer(64)
    form = Llama2Format(tokenizer)
    dialogue = Dialogue([{"role": "system", "content": "Be brief."}])
    first = form.prompt(dialogue, " hi ").tokens
    assert first == [BOS, *b"[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST]"]
    dialogue.tokens = [*first, *b" yes"]
    assert form.prompt(dialogue, "more").tokens == [*first, *b" yes", EOS, BOS, *b"[INST] more [/INST]"]
    tokenizer.bos_token = tokenizer.eos_token = None
    assert form.prompt(Dialogue(), "hi").tokens == list(b"[INST] hi [/INST]")


def test_plain_tokens() -> None:
    form = PlainFormat(byte_tokenizer(64))
    assert form.prompt(Dialogue(), "def f(").tokens == list(b"def f(")
    assert form.prompt(Dialogue(tokens=[97, 98]), " c").tokens == [97, 98, *b" c"]
    assert form.prompt(Dialogue([{"role": "system", "content": "# text"}]), "x").tokens == list(b"# text\nx")


def test_template_tokens(folder: Path) -> None:
    form = choose_format(opened(folder, CHATML).tokenizer)
    dialogue = Dialogue()
    first = form.prompt(dialogue, "hi")
    assert bytes(first.tokens) == b"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    dialogue.messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " yo\n"}]
    dialogue.tokens, dialogue.rendered = [*first.tokens, *b" yo\n"], first.rendered
    second = form.prompt(dialogue, "and?")
    # What the model wrote stays as it wrote it, white space included.
    assert bytes(second.tokens) == bytes(first.tokens) + (
        b" yo\n<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not second.rewritten
    dialogue.rendered = "something else"
    assert form.prompt(dialogue, "and?").rewritten


def test_white_space_that_a_template_adds_is_no_rewriting(folder: Path) -> None:
    chat = session(folder, template=SPACED)
    chat.answer("one")
    before = chat.dialogue.tokens
    prompt = chat.format.prompt(chat.dialogue, "two")
    assert not prompt.rewritten
    assert bytes(prompt.tokens[len(before) :]) == b" </s>[INST] two [/INST]"


def test_which_format(folder: Path) -> None:
    tokenizer = byte_tokenizer(8)
    assert choose_format(tokenizer).name == "plain"
    assert choose_format(tokenizer, "llama2").name == "llama2"
    with pytest.raises(ValueError, match=r"^style: .*template; it has none"):
        choose_format(tokenizer, "template")
    with pytest.raises(ValueError, match=r"^style: expected one of auto, template, llama2, plain, got yaml"):
        choose_format(tokenizer, "yaml")
    tokenizer.add_tokens(["more"])
    assert choose_format(tokenizer).name == "llama2"
    tokenizer.chat_template = CHATML
    assert choose_format(tokenizer).name == "template"
    assert choose_format(tokenizer, "plain").name == "plain"


def test_a_template_that_refuses_is_an_error(folder: Path) -> None:
    chat = session(folder, template=NO_SYSTEM, system="You are kind.")
    with pytest.raises(ValueError, match="chat template: no such role here"):
        chat.answer("hi")
    assert chat.turns == 0
    assert session(folder, template=NO_SYSTEM).answer("hi").tokens


# ---- turns ----


@pytest.mark.parametrize("style", ["plain", "llama2", "template"])
@pytest.mark.parametrize("settings", [FULL, EVERYTHING], ids=["h2o", "full"])
def test_carried_over_turns_is_the_same_as_read_anew(folder: Path, style: str, settings: Any) -> None:
    chat = session(folder, style, CHATML, settings=settings)
    for number, message in enumerate(TURNS, 1):
        notes: list[str] = []
        expected_prompt = chat.format.prompt(chat.dialogue, message).tokens
        seen = chat.cache.get_seq_length()
        found = chat.answer(message, on_note=notes.append)
        assert not notes
        assert found.read == len(expected_prompt) - seen
        anew = continue_tokens(
            chat.model, chat.tokenizer, expected_prompt, settings.make(chat.model), greedy(9)
        )
        assert found.tokens == anew.tokens
        assert chat.dialogue.tokens == expected_prompt + found.tokens
        assert chat.cache.get_seq_length() == len(chat.dialogue.tokens) - (not found.ended)
        assert chat.turns == number
    assert [m["content"] for m in chat.dialogue.messages[::2]] == list(TURNS)


def test_a_bounded_cache_lives_through_the_dialogue(folder: Path) -> None:
    chat = session(folder, settings=CacheSettings(heavy=12, recent=10, num_sink_tokens=2, positions="cache"))
    for _ in range(6):
        chat.answer("x" * 150)
        assert cache_facts(chat.cache).kept == 24
    assert cache_facts(chat.cache).seen > 1.5 * CONTEXT


def test_a_template_that_rewrites_history_starts_the_cache_anew(folder: Path) -> None:
    chat = session(folder, template=REWRITING)
    chat.answer("one")
    cache, notes = chat.cache, []
    found = chat.answer("two", on_note=notes.append)
    assert len(notes) == 1
    assert "writes earlier turns anew" in notes[0]
    assert chat.cache is not cache
    text = chat.tokenizer.apply_chat_template(
        chat.dialogue.messages[:3], tokenize=False, add_generation_prompt=True
    )
    assert chat.dialogue.tokens == [*text.encode(), *found.tokens]
    assert found.read == len(text.encode())


def test_seeded_chats_repeat(folder: Path) -> None:
    def contents(seed: int) -> list[str]:
        chat = session(folder, sampling=Sampling(max_new_tokens=12, seed=seed))
        for message in TURNS:
            chat.answer(message)
        return [each["content"] for each in chat.dialogue.messages]

    assert contents(1) == contents(1)
    assert contents(1) != contents(2)


# ---- what goes wrong on the way ----


@pytest.mark.parametrize("style", ["plain", "llama2", "template"])
def test_after_an_interrupted_answer_the_cache_goes_on(folder: Path, style: str) -> None:
    chat, interrupt = session(folder, style, CHATML, sampling=greedy(40)), Interrupt()
    pieces: list[str] = []

    def press(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            interrupt.handle(signal.SIGINT, None)

    first = chat.answer("Hello", on_text=press, interrupt=interrupt)
    assert first.interrupted
    assert 0 < len(first.tokens) < 40
    assert chat.dialogue.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    prompt = chat.format.prompt(chat.dialogue, "Go on").tokens
    cache, notes = chat.cache, []
    second = chat.answer("Go on", on_note=notes.append)
    assert not notes
    assert chat.cache is cache
    assert second.read < len(prompt)
    anew = continue_tokens(chat.model, chat.tokenizer, prompt, FULL.make(chat.model), greedy(40))
    assert second.tokens == anew.tokens


@pytest.mark.parametrize("style", ["plain", "llama2", "template"])
def test_after_an_interrupted_prompt_the_cache_goes_on(folder: Path, style: str) -> None:
    chat, interrupt = session(folder, style, CHATML, sampling=greedy(9, chunk=16)), Interrupt()
    chat.answer("one")
    seen = chat.cache.get_seq_length()

    def press(done: int, total: int) -> None:
        if done >= 32:
            interrupt.handle(signal.SIGINT, None)

    found = chat.answer("w" * 100, on_read=press, interrupt=interrupt)
    assert found.interrupted
    assert chat.cache.get_seq_length() == seen + 32
    assert chat.dialogue.messages[-1] == {"role": "assistant", "content": ""}
    prompt = chat.format.prompt(chat.dialogue, "x").tokens
    after = chat.answer("x")
    assert after.read == len(prompt) - seen - 32
    anew = continue_tokens(chat.model, chat.tokenizer, prompt, FULL.make(chat.model), greedy(9))
    assert after.tokens == anew.tokens


def test_an_error_of_the_model_leaves_the_dialogue_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = session(folder)
    chat.answer("one")
    messages, tokens = list(chat.dialogue.messages), list(chat.dialogue.tokens)
    layer = chat.model.model.layers[1]  # type: ignore[union-attr, index]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(layer, "forward", broken)
    with pytest.raises(MemoryError):
        chat.answer("two")
    monkeypatch.undo()
    assert (chat.dialogue.messages, chat.dialogue.tokens) == (messages, tokens)
    prompt = chat.format.prompt(chat.dialogue, "two").tokens
    found = chat.answer("two")
    assert found.read == len(prompt)  # by an empty cache, as the old one's layers differ
    anew = continue_tokens(chat.model, chat.tokenizer, prompt, FULL.make(chat.model), greedy(9))
    assert found.tokens == anew.tokens


# ---- commands ----


@pytest.fixture
def commands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChatCommands:
    monkeypatch.chdir(tmp_path)
    return ChatCommands(session(folder, system="# A system message"))


def test_help_names_every_command(commands: ChatCommands) -> None:
    lines = commands.run("/help")
    for name in ("reset", "stats", "save FILE", "budget HEAVY RECENT [SINKS]", "help", "exit"):
        assert any(line.startswith(f"/{name} - ") for line in lines), name
    assert any("Ctrl-C" in line for line in lines)


def test_reset(commands: ChatCommands) -> None:
    chat = commands.session
    first = chat.answer("one").tokens
    commands.run("/reset")
    assert (chat.turns, chat.dialogue.tokens, chat.cache.get_seq_length()) == (0, [], 0)
    assert chat.answer("one").tokens == first  # the system message is still there


def test_stats(commands: ChatCommands) -> None:
    assert "0 of 0 tokens kept" in "\n".join(commands.run("/stats"))
    commands.session.answer("one")
    text = "\n".join(commands.run("/stats"))
    for words in ("style plain", "1 turn,", "heavy 4096, recent 4096, 4 sinks", "tokens kept", "tokens/s"):
        assert words in text, text


def test_save(commands: ChatCommands, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got none yet"):
        commands.run("/save early.json")
    commands.session.answer("eins")
    content = commands.session.dialogue.messages[-1]["content"]
    assert commands.run("/save my chat.json") == ["wrote my chat.json"]
    record = json.loads((tmp_path / "my chat.json").read_text(encoding="utf-8"))
    assert record["messages"][-2:] == [
        {"role": "user", "content": "eins"},
        {"role": "assistant", "content": content},
    ]
    assert record["cache"]["heavy"] == 4096
    assert record["sampling"]["temperature"] == 0
    commands.run("/save chat.txt")
    text = (tmp_path / "chat.txt").read_text(encoding="utf-8")
    assert text.startswith("system: # A system message\n\nuser: eins\n\nassistant: ")
    with pytest.raises(OSError, match=r"No such folder: 'no/such'"):
        commands.run("/save no/such/folder.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.txt", "my chat.json"]


def test_saving_is_whole_or_not_at_all(commands: ChatCommands, tmp_path: Path) -> None:
    commands.session.answer("one")
    commands.run("/save chat.txt")
    before = (tmp_path / "chat.txt").read_bytes()
    commands.session.dialogue.messages.append({"role": "user", "content": "\ud800"})  # not to be written
    with pytest.raises(UnicodeEncodeError):
        commands.run("/save chat.txt")
    assert (tmp_path / "chat.txt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["chat.txt"]


def test_budget(commands: ChatCommands) -> None:
    chat = commands.session
    assert commands.run("/budget 9 0.5") == ["a new cache: heavy 9, recent 0.5, 4 sinks"]
    chat.answer("one")
    tokens = len(chat.dialogue.tokens)
    lines = commands.run("/budget 8 7 2")
    assert lines == [
        "a new cache: heavy 8, recent 7, 2 sinks",
        f"the next message reads the {tokens} tokens of history again",
    ]
    assert chat.answer("two").read == tokens + 3
    facts = cache_facts(chat.cache)
    assert facts.kept == 17
    assert facts.seen == len(chat.dialogue.tokens) - 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/budget", "expected HEAVY RECENT [SINKS], got none"),
        ("/budget 1 2 3 4", "got 1 2 3 4"),
        ("/budget x 2", "HEAVY: expected"),
        ("/budget 1 0", "recent: expected at least 1"),
        ("/budget 1 1 0.5", "num_sink_tokens"),
        ("/budget 2.5 1", "heavy: expected"),
        ("/save", "expected a file"),
        ("/reset now", "expected nothing after it, got now"),
        ("/nonsense", "no such command; there are /budget"),
        ("/", "no such command"),
    ],
)
def test_wrong_commands_change_nothing(commands: ChatCommands, line: str, words: str) -> None:
    chat = commands.session
    chat.answer("one")
    state = (chat.settings, chat.cache, list(chat.dialogue.tokens))
    with pytest.raises(ValueError, match=r".") as caught:
        commands.run(line)
    assert words in str(caught.value)
    assert (chat.settings, chat.cache, chat.dialogue.tokens) == state


def test_exit(commands: ChatCommands) -> None:
    for line in ("/exit", "/EXIT"):
        with pytest.raises(LeaveChat):
            commands.run(line)


# ---- the command line ----


@pytest.fixture
def script(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Runs `sinklora chat` on lines of input: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(lines: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = cli.main(["chat", "--model", str(folder), "--temperature", "0", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_scripted_chat(script: Any, folder: Path, tmp_path: Path) -> None:
    chat = session(folder, settings=CacheSettings())
    expected = ""
    for message in ("one", "/two", "three\nfour"):
        chat.answer(message)
        expected += chat.dialogue.messages[-1]["content"] + "\n"
    status, out, err = script(
        "one\n\n//two\n/stats\nthree\\\nfour\n/save talk.json\n/exit\nnever\n", "--max-new-tokens", "9"
    )
    assert status == 0
    assert out == expected
    assert err.count("was not trained on dialogues") == 1
    assert "2 turns" in err
    assert "wrote talk.json" in err
    assert (
        json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"] == chat.dialogue.messages
    )


def test_the_end_of_the_input_ends_the_chat(script: Any) -> None:
    assert script("")[:2] == (0, "")
    status, out, _ = script("last line without an end", "--max-new-tokens", "3")
    assert status == 0
    assert out


@pytest.mark.parametrize(
    ("lines", "words"), [("/nonsense\nhello\n", "/nonsense: no such command"), ("/save\n", "expected a file")]
)
def test_errors_end_a_scripted_chat(script: Any, lines: str, words: str) -> None:
    status, out, err = script(lines)
    assert (status, out) == (1, "")
    assert words in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--style", "yaml"], "'--style': expected one of"),
        (["--style", "template"], "'--style': expected a style"),
        (["--recent", "0"], "'--recent': expected"),
        (["--temperature", "-1"], "'--temperature': expected"),
    ],
)
def test_wrong_options(script: Any, arguments: list[str], words: str) -> None:
    status, out, err = script("hello\n", *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_beyond_the_context_is_said_once(script: Any) -> None:
    lines = f"{'x' * CONTEXT}\nmore\nmore\n"
    assert script(lines, "--max-new-tokens", "2")[2].count("model's context") == 1
    assert "model's context" not in script(lines, "--max-new-tokens", "2", "--positions", "cache")[2]


def test_the_history_of_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sinklora.commands import chat

    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "state" / "sinklora" / "chat_history"
    assert chat.history_path() == path
    with chat._typed_history(True):
        readline.clear_history()
        readline.add_history("typed before")
    assert "typed before" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    readline.clear_history()
    with chat._typed_history(True):
        assert readline.get_history_item(1) == "typed before"
    readline.clear_history()
    with chat._typed_history(False):
        assert readline.get_current_history_length() == 0
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert chat.history_path().parts[-4:] == (".local", "state", "sinklora", "chat_history")


def test_a_history_that_cannot_be_kept_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sinklora.commands import chat

    pytest.importorskip("readline")
    (tmp_path / "state").write_text("a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with chat._typed_history(True):
        pass
    assert "input history: " in capsys.readouterr().err


class Terminal:
    """`sinklora chat` on a terminal of its own."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        package = str(Path(sinklora.__file__).parent.parent)
        # The first terminal that a session's leader opens is the one whose Ctrl-C is its signal.
        code = (
            "import os; os.close(os.open(os.ttyname(0), os.O_RDWR)); "
            "from sinklora.__main__ import main; main()"
        )
        self.side, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "chat", "--no-input-history", *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": package, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(child)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.side, keys.encode())

    def wait_for(self, words: str, seconds: float = 60) -> None:
        """Until words are shown after what was waited for before."""
        end = time.monotonic() + seconds
        while words not in self.shown:
            assert time.monotonic() < end, f"waited for {words!r}, saw {self.shown!r}"
            if select.select([self.side], [], [], 0.1)[0]:
                self.shown += os.read(self.side, 4096).decode(errors="replace")
        self.shown = self.shown.partition(words)[2]

    def close(self) -> int:
        status = self.process.wait(timeout=60)
        os.close(self.side)
        return status


@pytest.mark.slow
def test_ctrl_c_on_a_terminal(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    tokenizer = byte_tokenizer(CONTEXT)
    tokenizer.eos_token = None  # so that no answer ends by itself
    tokenizer.save_pretrained(model)
    changed = json.loads((model / "config.json").read_text()) | {"eos_token_id": None}
    (model / "config.json").write_text(json.dumps(changed))
    (model / "generation_config.json").unlink()
    terminal = Terminal("--model", str(model), "--style", "plain", "--max-new-tokens", "9999", cwd=tmp_path)
    try:
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r\n")
        time.sleep(1)
        terminal.type("\x03")
        terminal.wait_for("stopped")
        terminal.wait_for("> ")
        terminal.type("/stats\n")
        terminal.wait_for("1 turn,")
        terminal.wait_for("> ")
        terminal.type("/nonsense\n")
        terminal.wait_for("error: /nonsense")
        terminal.wait_for("> ")
        time.sleep(0.5)  # readline shows its prompt a moment before it waits for signals
        terminal.type("\x03")
        terminal.wait_for("Ctrl-C again")
        terminal.wait_for("> ")
        time.sleep(0.5)
        terminal.type("\x03")
        assert terminal.close() == 0
    finally:
        terminal.process.kill()
