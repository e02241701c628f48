"""Retrieval tasks: prompts as long and as deep as they say, answers scored right, models read as they are."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_support import CHATML
from hf_support import tiny
from retrieval_support import CACHE, read_needle, read_passkey, read_topics, reader
from tokenizers.processors import TemplateProcessing
from transformers import DynamicCache

import sinklora
from sinklora import H2OCache, SFPattern
from sinklora.evaluation import dialogues, filler
from sinklora.evaluation.answers import Encoder, answers
from sinklora.evaluation.dialogues import Dialogue, read_dialogues
from sinklora.evaluation.lengths import most_pieces
from sinklora.evaluation.needle import Needle
from sinklora.evaluation.passkey import GARBAGE, LARGEST_KEY, QUESTION, TASK, Passkey
from sinklora.evaluation.retrieval import Retrieval, wilson
from sinklora.evaluation.task import Cell, NotMeasurableError, Row, Way
from sinklora.evaluation.topics import Topics, normalised, ordinal
from sinklora.loading import OpenedModel
from sinklora.tokenizer import byte_tokenizer

TASKS: dict[str, Retrieval] = {
    "passkey": Passkey(lengths=[512, 1024], repeats=4),
    "passkey at random": Passkey(lengths=[700], repeats=4, depths=None),
    "needle": Needle(lengths=[900, 1500], repeats=4, depths=[0.0, 0.3, 1.0]),
    "topics": Topics(lengths=[1500, 3000], repeats=4, turns=3),
}
LONGEST_PIECE = {"passkey": 23, "needle": 120, "topics": 300}
STORY = (
    "It was late. Nobody had seen 12345 or 99999 of them!\n\nThe road went on\nand on, past 3.5 miles of "
    "hedges. “Where to?” she asked. There was no answer to that"
)
TALKS = [
    Dialogue(topic, tuple((f"Question {i} on it?", f"Answer {i}, and some more words.") for i in range(6)))
    for topic in ("trains", "night trains", "Café-au-lait", "stones")
]


def every_cell() -> list[Any]:
    return [
        pytest.param(task, cell, id=f"{name}-{cell.length}-{cell.depth}")
        for name, task in TASKS.items()
        for cell in task.cells()
    ]


def nothing(tokens: int) -> None:
    pass


def measure(task: Retrieval, opened: OpenedModel, cell: Cell | None = None, way: Way = CACHE) -> Any:
    return task.measure(opened, way, cell or task.cells()[0], nothing)


# ---- lengths ----


def test_most_pieces_is_the_largest_number_that_fits() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        sizes = [draw.randint(1, draw.choice([2, 60])) for _ in range(2000)]
        tokens = list(itertools.accumulate(sizes, initial=draw.randint(0, 300)))
        room = draw.randint(0, draw.choice([400, tokens[-1] + 50]))
        expected = bisect.bisect_right(tokens, room) - 1
        found = most_pieces(tokens.__getitem__, room, supply=2000, guess=draw.randint(1, 3000))
        assert found == (None if expected < 0 else expected), f"seed {seed}"


@pytest.mark.parametrize(("task", "cell"), every_cell())
def test_prompts_fill_their_length_and_no_more(task: Retrieval, cell: Cell) -> None:
    opened = reader(str)
    room = cell.length - task.max_new_tokens
    asked = task.questions(opened, cell)
    assert len(asked) == task.repeats
    for each in asked:
        assert each.tokens == list(each.question.text.encode())
        assert room - LONGEST_PIECE[task.name] < len(each.tokens) <= room
    assert len({each.question.text for each in asked}) == len(asked)


def test_a_length_that_nothing_fits_into_is_named() -> None:
    with pytest.raises(NotMeasurableError, match="lengths: expected about 320 tokens or more"):
        measure(Passkey(lengths=[200]), reader(read_passkey))
    for task in (task for name, task in TASKS.items() if name != "topics"):
        with pytest.raises(NotMeasurableError, match="lengths: expected about ") as error:
            task.questions(reader(str), Cell(100, 0.5))
        enough = int(re.findall(r"\d+", str(error.value))[0])
        assert len(task.questions(reader(str), Cell(enough, 0.5))) == 4
        with pytest.raises(NotMeasurableError):
            task.questions(reader(str), Cell(enough - 110, 0.5))


@pytest.mark.parametrize(("task", "cell"), every_cell())
def test_a_cell_is_the_same_whatever_else_is_measured(task: Retrieval, cell: Cell) -> None:
    opened = reader(str)
    alone = dataclasses.replace(task, lengths=[cell.length], tokens_per_batch=1)
    assert [a.tokens for a in alone.questions(opened, cell)] == [
        a.tokens for a in task.questions(opened, cell)
    ]
    fewer = dataclasses.replace(task, repeats=2)
    assert [a.tokens for a in fewer.questions(opened, cell)] == [
        a.tokens for a in task.questions(opened, cell)
    ][:2]
    other = dataclasses.replace(task, seed=1)
    assert other.questions(opened, cell)[0].tokens != task.questions(opened, cell)[0].tokens
    assert alone.settings() == task.settings() != other.settings()


# ---- what stands where ----


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_passkey_wording_and_depth(depth: float) -> None:
    for each in Passkey(lengths=[2000], repeats=5).questions(reader(str), Cell(2000, depth)):
        lines = each.question.text.split("\n")
        assert len(lines) == 5 and (lines[0], lines[4]) == (TASK, QUESTION)
        key = each.question.expected
        assert lines[2] == f"The pass key is {key}. Remember it. {key} is the pass key."
        assert 1 <= int(key) <= LARGEST_KEY
        before, after = (re.findall(r"[A-Z][^.]*\.", line) for line in (lines[1], lines[3]))
        for part in (before, after):
            assert part == [GARBAGE[i % 5] for i in range(len(part))]
        total = len(before) + len(after)
        assert total == each.pieces and abs(len(before) - depth * total) <= 0.5


def test_random_depths_reach_both_halves() -> None:
    asked = Passkey(lengths=[1000], repeats=20, depths=None).questions(reader(str), Cell(1000))
    places = [each.question.text.index("The pass key is") / len(each.tokens) for each in asked]
    assert min(places) < 0.4 and max(places) > 0.6 and len(set(places)) > 10


@pytest.mark.parametrize("texts", [(), (STORY, STORY * 3)], ids=["made up", "texts"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_stand_among_others(depth: float, texts: tuple[str, ...]) -> None:
    task = Needle(lengths=[2500], repeats=6, depths=[depth], distractors=7, filler=texts)
    for each in task.questions(reader(str), Cell(2500, depth)):
        question, text = each.question, each.question.text
        found = re.findall(r"The pass key of the ([a-z]+) ([a-z]+) is (\d{5})\. ?", text)
        values = [value for _, _, value in found]
        assert sorted(values) == sorted([question.expected, *question.others]) and len(set(values)) == 8
        assert len({name for *name, _ in map(list, found) for name in [tuple(name)]}) == 8
        asked = next((colour, thing) for colour, thing, value in found if value == question.expected)
        assert text.endswith(f"The pass key of the {' '.join(asked)} is")
        assert sum(colour == asked[0] or thing == asked[1] for colour, thing, _ in found) >= 5
        # Without the needles, the filler is cut where the depth says.
        bare = re.sub(r"The pass key of the [a-z ]+ is (?!\d+\.)", "", text)
        before, after = bare.split(f"The pass key of the {' '.join(asked)} is {question.expected}.")
        before, after = (
            re.sub(r"The pass key of the [a-z ]+ is \d+\. ?", "", part) for part in (before, after)
        )
        start, end = len(before.split("\n", 1)[1]), len(after.rsplit("\n", 1)[0])
        assert abs(start - depth * (start + end)) < 250
        assert not texts or not {"12345", "99999"} & set(values)


def test_users_text_is_cut_between_sentences_and_comes_back() -> None:
    pieces = filler.split([STORY, "x" * 600 + " end\n"])
    assert "".join(pieces) == f"{STORY}\n{'x' * 600} end\n"
    assert pieces[:3] == [
        "It was late. ",
        "Nobody had seen 12345 or 99999 of them!\n\n",
        "The road went on\nand on, past 3.5 miles of hedges. ",
    ]
    assert max(map(len, pieces)) <= filler.LONGEST_PIECE
    around = list(itertools.islice(filler.from_texts(pieces, random.Random(1)), 3 * len(pieces)))
    assert around[: len(pieces)] == around[len(pieces) : 2 * len(pieces)] and set(around) == set(pieces)


def test_keys_avoid_the_numbers_of_the_text() -> None:
    numbers = " ".join(str(number) for number in range(10000, 100000) if number % 1000)
    task = Needle(lengths=[1500], repeats=8, depths=[0.5], filler=[numbers])
    for each in task.questions(reader(str), Cell(1500, 0.5)):
        assert all(int(value) % 1000 == 0 for value in (each.question.expected, *each.question.others))
    full = Needle(lengths=[1500], filler=[f"{numbers} {' '.join(map(str, range(10000, 100000, 1000)))}"])
    with pytest.raises(ValueError, match="filler: "):
        full.questions(reader(str), Cell(1500, 0.5))


def test_topics_come_one_after_the_other() -> None:
    task = Topics(lengths=[4000], repeats=3, turns=3, topic=2)
    for each in task.questions(reader(str), Cell(4000)):
        topics = read_topics(each.question.text)
        assert each.question.expected == topics[1]
        assert sorted(topics) == sorted([topics[1], *each.question.others]) and len(topics) >= 3
        assert (
            each.question.text.count("\nUSER: ") == each.question.text.count("\nASSISTANT: ") == each.pieces
        )
        assert math.ceil(each.pieces / 3) == len(topics)
        assert "What was the second topic" in each.question.text


def test_made_up_topics_are_told_apart() -> None:
    names = [f" {normalised(name)} " for name, _ in dialogues.made_up_topics()]
    joined = "|".join(names)
    assert len(names) > 500 and all(joined.count(name) == 1 for name in names)


def test_users_dialogues() -> None:
    task = Topics(lengths=[1300], repeats=8, dialogues=TALKS)
    firsts = {each.question.expected for each in task.questions(reader(str), Cell(1300))}
    assert len(firsts) > 1 and firsts <= {talk.topic for talk in TALKS}
    with pytest.raises(NotMeasurableError, match="lengths: expected fewer tokens"):
        task.questions(reader(str), Cell(5000))
    with pytest.raises(
        NotMeasurableError, match="lengths: expected room for 4 topics at least, got 1300 tokens"
    ):
        Topics(lengths=[1300], dialogues=TALKS, topic=4).questions(reader(str), Cell(1300))
    assert task.settings() != Topics(lengths=[1300], repeats=8).settings()


# ---- scores ----


def test_what_is_found_is_right() -> None:
    for task in (TASKS["passkey"], TASKS["passkey at random"]):
        for cell in task.cells():
            assert measure(task, reader(read_passkey), cell)["accuracy"] == 1
    for cell in TASKS["needle"].cells():
        assert measure(TASKS["needle"], reader(read_needle), cell)["accuracy"] == 1
    for cell in TASKS["topics"].cells():
        values = measure(TASKS["topics"], reader(lambda text: f"\n{read_topics(text)[0].upper()}."), cell)
        assert values["accuracy"] == 1 and values["wrong"] is None


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" {key}", True),
        ("{key}, not 99", True),
        ("it is: {key}.", True),
        (" {key}7", False),
        ("0{key}", False),
        (" 99 or {key}", False),
        ("no idea", False),
        ("", False),
    ],
)
def test_the_first_number_counts(said: str, right: bool) -> None:
    def find(text: str) -> str:
        return said.format(key=read_passkey(text).split(".")[0].strip())

    values = measure(TASKS["passkey"], reader(find))
    assert (values["correct"], values["repeats"]) == ((4, 4) if right else (0, 4))
    assert values["confused"] == 0
    if not right:
        # Nothing is read any more once a number has ended.
        shown = said.format(key=values["wrong"]["expected"])
        assert values["wrong"]["got"] == re.sub(r"^(\D*\d+\D).*", r"\1", shown)


def test_another_needle_is_wrong_and_counted() -> None:
    def find(text: str) -> str:
        right = read_needle(text).strip(" .")
        return next(value for value in re.findall(r"is (\d{5})\.", text) if value != right)

    values = measure(TASKS["needle"], reader(find))
    assert (values["correct"], values["confused"]) == (0, 4)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("the Night Trains.", "night trains"),
        ("trains, and then night trains", "trains"),
        ("CAFÉ AU LAIT", "Café-au-lait"),
        ("Trains at night!", "trains at night"),
        ("constrains", None),
        ("", None),
    ],
)
def test_the_topic_named_first_counts(answer: str, found: str | None) -> None:
    task = Topics(lengths=[1300], dialogues=TALKS)
    question = task.questions(reader(str), Cell(1300))[0].question
    question = question._replace(
        expected="trains", others=("trains at night", *(talk.topic for talk in TALKS[1:]))
    )
    assert task.said(answer, question) == found


def test_answers_end_when_they_are_decided() -> None:
    passkey = reader(read_passkey)
    measure(TASKS["passkey"], passkey)
    assert max(passkey.model.written) <= len(" 50000.")  # type: ignore[operator, arg-type]
    topics = reader(lambda text: f" {read_topics(text)[0]}\nUSER: more")
    measure(TASKS["topics"], topics)
    assert all(n == len(f" {each.question.expected}\n") for n, each in zip(
        topics.model.written, TASKS["topics"].questions(topics, Cell(1500)), strict=True))  # type: ignore[arg-type]  # fmt: skip


def test_wilson() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)
    assert wilson(10, 10)[1] == 1.0 and wilson(1, 1)[0] == pytest.approx(0.2065, abs=1e-4)


def test_values_are_json_and_progress_adds_up() -> None:
    for task in TASKS.values():
        seen: list[int] = []
        opened, cell = reader(lambda text: "x" * 500), task.cells()[0]
        values = task.measure(opened, CACHE, cell, seen.append)
        assert json.loads(json.dumps(values)) == values and set(task.columns()) <= set(values)
        assert sum(seen) == task.work(opened, CACHE, cell)
        assert values["accuracy"] == values["correct"] == 0 and len(values["wrong"]["got"]) < 100
        assert not task.takes(Way("sf", attention="sf"))
        with pytest.raises(ValueError, match="way: "):
            measure(task, opened, way=Way("sf", attention="sf"))
        json.dumps(task.settings())
        assert all(isinstance(line, str) for line in task.notes([Row(task.name, "m", "w", cell, values)]))


def test_batches() -> None:
    for tokens, batches in ((1024, [2, 2]), (1, [1] * 4), (16384, [4])):
        opened: Any = reader(read_passkey)
        task = dataclasses.replace(TASKS["passkey"], tokens_per_batch=tokens)
        assert measure(task, opened)["accuracy"] == 1
        assert opened.model.batches == batches


# ---- real models ----


@pytest.fixture(scope="module")
def llama() -> OpenedModel:
    model = tiny("Llama", vocab_size=259, initializer_range=0.3, max_position_embeddings=1024)
    return OpenedModel(sinklora.patch(model, SFPattern(group_size=64)).eval(), byte_tokenizer(1024), "tiny")


def h2o(model: Any, length: int) -> H2OCache:
    return H2OCache(model.config, heavy=length // 10, recent=length // 10, num_sink_tokens=2)


@pytest.mark.parametrize("way", [Way("full"), Way("h2o", make_cache=h2o)], ids=lambda way: way.name)
@pytest.mark.parametrize("name", ["passkey", "needle", "topics"])
def test_a_model_reads_and_answers(llama: OpenedModel, name: str, way: Way) -> None:
    cell = TASKS[name].cells()[0]
    values = measure(TASKS[name], llama, cell, way)
    again = measure(TASKS[name], llama, cell, way)
    assert {**values, "seconds": 0} == {**again, "seconds": 0}
    assert values["repeats"] == 4 and values["seconds"] > 0


@pytest.mark.parametrize("way", [Way("full"), Way("h2o", make_cache=h2o)], ids=lambda way: way.name)
@pytest.mark.parametrize("chunk", [None, 64])
def test_a_batch_is_its_rows_alone(llama: OpenedModel, way: Way, chunk: int | None) -> None:
    """Prompts of unequal length together, against each with transformers' generate of its own."""
    model: Any = llama.model
    texts = ["The grass is green. " * 7, "x", "There and back again. " * 5, "Here we go. " * 9]
    prompts = [list(text.encode()) for text in texts]
    options: dict[str, Any] = {"max_new_tokens": 12, "prefill_chunk": chunk}
    together = answers(llama, way, 200, prompts, **options)
    for prompt, found in zip(prompts, together, strict=True):
        assert answers(llama, way, 200, [prompt], **options) == [found]
        if chunk is None:
            cache = DynamicCache(config=model.config) if way.make_cache is None else h2o(model, 200)
            ids = torch.tensor([prompt])
            new = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                do_sample=False,
                max_new_tokens=12,
            )[0, len(prompt) :]
            assert found == llama.tokenizer.decode(new, skip_special_tokens=True)


def test_chunks_and_cache_are_what_was_asked_for(llama: OpenedModel) -> None:
    widths: list[int] = []
    lengths: list[int] = []

    def make(model: Any, length: int) -> H2OCache:
        lengths.append(length)
        return h2o(model, length)

    hook = llama.model.register_forward_pre_hook(
        lambda module, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    answers(llama, Way("h2o", make_cache=make), 300, [[65] * 100], max_new_tokens=3, prefill_chunk=40)
    assert widths == [40, 40, 40, 1, 1] and lengths == [300]
    widths.clear()
    answers(llama, Way("full"), 300, [[65] * 100], max_new_tokens=3)
    hook.remove()
    assert widths == [100, 1, 1]


def test_generation_settings_of_the_model_do_not_act(llama: OpenedModel) -> None:
    model: Any = llama.model
    prompts = [list(b"The sky is blue. " * 4)]
    expected = answers(llama, Way("full"), 100, prompts, max_new_tokens=12)
    own = model.generation_config
    try:
        model.generation_config = type(own)(
            repetition_penalty=9.0, do_sample=True, temperature=5.0, min_new_tokens=30, num_beams=2
        )
        kept = model.generation_config
        assert answers(llama, Way("full"), 100, prompts, max_new_tokens=12) == expected
        assert model.generation_config is kept and kept.repetition_penalty == 9.0
    finally:
        model.generation_config = own


# ---- tokenizers ----


def test_begin_tokens_stay_and_end_tokens_go() -> None:
    tokenizer: Any = byte_tokenizer(512)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 257), ("<|end|>", 258)]
    )
    assert Encoder(tokenizer)("ab") == [257, 97, 98]
    opened = OpenedModel(reader(str).model, tokenizer, "reader")
    for each in TASKS["passkey"].questions(opened, Cell(512, 0.5)):
        assert each.tokens[0] == 257 and len(each.tokens) <= 512 - 32


def test_chat() -> None:
    tokenizer: Any = byte_tokenizer(512)
    with pytest.raises(ValueError, match="chat: expected a tokenizer with a chat template"):
        Encoder(tokenizer, chat=True)
    tokenizer.chat_template = CHATML
    task = Passkey(lengths=[600], repeats=3, chat=True)
    opened = reader(read_passkey)._replace(tokenizer=tokenizer)
    for each in task.questions(opened, Cell(600, 0.5)):
        text = tokenizer.decode(each.tokens)
        assert text == f"<|im_start|>user\n{each.question.text}<|im_end|>\n<|im_start|>assistant\n"
        assert 600 - 32 - 23 < len(each.tokens) <= 600 - 32
    assert measure(task, opened)["accuracy"] == 1


# ---- settings and files ----


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        (Passkey, {"lengths": []}, "lengths"),
        (Passkey, {"lengths": [0]}, "lengths"),
        (Passkey, {"lengths": [512, 512]}, "lengths"),
        (Passkey, {"depths": [1.5]}, "depths"),
        (Passkey, {"depths": []}, "depths"),
        (Passkey, {"depths": [math.nan]}, "depths"),
        (Needle, {"depths": [0.5, 0.5]}, "depths"),
        (Needle, {"distractors": -1}, "distractors"),
        (Needle, {"distractors": 192}, "distractors"),
        (Needle, {"filler": [" \n"]}, "filler"),
        (Topics, {"topic": 0}, "topic"),
        (Topics, {"topic": 5, "dialogues": TALKS}, "topic"),
        (Topics, {"turns": 0}, "turns"),
        (Topics, {"dialogues": [TALKS[0], TALKS[0]]}, "dialogues"),
        (Passkey, {"repeats": 0}, "repeats"),
        (Passkey, {"seed": -1}, "seed"),
        (Passkey, {"max_new_tokens": 0}, "max_new_tokens"),
        (Passkey, {"prefill_chunk": 1}, "prefill_chunk"),
    ],
)
def test_settings_out_of_range(kind: Any, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        kind(**{"lengths": [512], **settings})


def line(**changes: Any) -> str:
    messages = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Ho"}]
    return json.dumps({"topic": "greetings", "messages": messages, **changes})


def test_dialogues_are_read(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{line()}\n\n{line(topic='goodbyes')}\n")
    assert read_dialogues([path]) == [Dialogue(t, (("Hi", "Ho"),)) for t in ("greetings", "goodbyes")]


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[1]",
        "[" * 100000,
        line(topic=""),
        line(topic=3),
        line(messages=[]),
        line(messages=[{"role": "user", "content": "Hi"}]),
        line(messages=[{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}]),
        line(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]),
        line(messages=["Hi", "Ho"]),
        line(topic="Seen"),
    ],
    ids=lambda bad: bad[:40],
)
def test_bad_dialogues_are_named_by_line(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{line(topic='seen')}\n{bad}\n")
    with pytest.raises(ValueError, match=rf"^dialogues: {re.escape(str(path))}:2: expected"):
        read_dialogues([path])
    path.write_text("\n")
    with pytest.raises(ValueError, match="found none"):
        read_dialogues([path])


def test_ordinals() -> None:
    assert [ordinal(n) for n in (1, 10, 11, 12, 21, 22, 103, 111)] == [
        *("first", "tenth", "11th", "12th", "21st", "22nd", "103rd", "111th")
    ]


# ---- pictures ----


def rows(task: Retrieval, *ways: str) -> list[Row]:
    return [Row(task.name, "m", way, cell, {"accuracy": 0.25}) for way in ways for cell in task.cells()]


def test_a_map_for_each_way_and_lines_without_depths() -> None:
    figure = TASKS["passkey"].draw(rows(TASKS["passkey"], "full", "h2o 20%"))
    assert [axes.get_title() for axes in figure.axes] == ["m, full", "m, h2o 20%"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["25"] * 10
    for name in ("topics", "passkey at random"):
        figure = TASKS[name].draw(rows(TASKS[name], "full", "h2o 20%"))
        (axes,) = figure.axes
        assert [line.get_label() for line in axes.lines] == ["m, full", "m, h2o 20%"]
        assert list(axes.lines[0].get_xdata()) == [cell.length for cell in TASKS[name].cells()]
