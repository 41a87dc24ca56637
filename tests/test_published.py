"""Rows in the forms they are published in: what becomes the prompt, what the response, and what is refused."""

import functools

import pytest
from rows_files import write

from gptjax.data import published
from gptjax.data.bpe import character_tokenizer
from gptjax.data.chat import Template, chat_tokenizer
from gptjax.data.comparisons import ComparisonConfig, load_comparisons
from gptjax.data.demonstrations import DemonstrationConfig, load_demonstrations
from gptjax.data.prompts import PromptConfig, load_prompts
from gptjax.errors import InputError

LONG = 200


@functools.cache
def template(kind="chat") -> Template:
    return Template(chat_tokenizer(character_tokenizer(["abcdefghijklmnopqrstuvwxyz 0123456789HA:\n"])), kind)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def compared(path, rows, kind="chat", **options):
    """{(prompt ids, better ids, worse ids)} of all comparisons, as tuples."""
    loaded = load_comparisons(ComparisonConfig(source=write(path, rows), **options), template(kind), LONG, 0)
    return {(tuple(e.prompt), *map(tuple, e.completions)) for e in loaded.train + loaded.validation}


def expected(prompt, better, worse, kind="chat"):
    t = template(kind)
    return (tuple(t.prompt(prompt)), tuple(t.response(better)), tuple(t.response(worse)))


# --- comparisons ------------------------------------------------------------------------------------------


def hh(*turns):
    """A transcript as Anthropic's HH has it, Human and Assistant by turns."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def test_transcripts_become_chat_turns(tmp_path):
    rows = [
        {"chosen": hh("hi", "good"), "rejected": hh("hi", "bad")},
        {"chosen": hh("who", "me", "why", "so it is"), "rejected": hh("who", "me", "why", "no")},
    ]
    assert compared(tmp_path / "x.jsonl", rows) == {
        expected("hi", "good", "bad"),
        expected([user("who"), assistant("me"), user("why")], "so it is", "no"),
    }


def test_transcripts_without_a_template_are_cut_at_the_last_assistant(tmp_path):
    rows = [
        {"chosen": hh("hi", "good"), "rejected": hh("hi", "bad")},
        {"chosen": hh("who", "me", "why", "so it is"), "rejected": hh("who", "me", "why", "no")},
    ]
    assert compared(tmp_path / "x.jsonl", rows, kind="plain") == {
        expected("\n\nHuman: hi\n\nAssistant:", " good", " bad", kind="plain"),
        expected("\n\nHuman: who\n\nAssistant: me\n\nHuman: why\n\nAssistant:", " so it is", " no", kind="plain"),
    }


@pytest.mark.parametrize("given", [{}, {"prompt": "hi"}, {"prompt": [user("hi")]}], ids=str)
def test_message_lists_with_and_without_a_prompt(tmp_path, given):
    """As in TRL: a prompt that both conversations hold is theirs, whether the row names it or not."""
    row = given | {"chosen": [user("hi"), assistant("good")], "rejected": [user("hi"), assistant("bad")]}
    other = {"prompt": "yo", "chosen": [assistant("c")], "rejected": [assistant("d")]}
    assert compared(tmp_path / "x.jsonl", [row, other]) == {expected("hi", "good", "bad"), expected("yo", "c", "d")}


def test_the_prompt_the_row_names_tells_prompts_apart(tmp_path):
    """Its messages may be others: which rows are held out goes by its own name for the prompt."""
    rows = [
        {"prompt": f"p{i}", "chosen": [user("p"), assistant(f"a{i}")], "rejected": [user("p"), assistant("b")]}
        for i in range(20)
    ]
    assert len(compared(tmp_path / "x.jsonl", rows)) == 20


def test_a_transcript_as_prompt_and_a_message_as_completion(tmp_path):
    rows = [
        {"prompt": hh("hi", "ho", "so", "").rstrip(), "chosen": "c", "rejected": "d"},
        {"prompt": "e", "completions": ["f", [assistant("g")]], "ranks": [1, 0]},
    ]
    turns = [user("hi"), assistant("ho"), user("so")]
    assert compared(tmp_path / "x.jsonl", rows) == {expected(turns, "c", "d"), expected("e", "f", "g")}


TEXTS = {"chosen": "a b", "rejected": "a c"}


@pytest.mark.parametrize(
    "row, options, error",
    [
        (TEXTS, {}, "There is no field 'prompt', and .* are not conversations.*fields.prompt=NAME"),
        (TEXTS, {"kind": "plain"}, "There is no field 'prompt', and the fields chosen and rejected"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, {}, "There is no field 'prompt', and the"),
        ({"chosen": hh("hi", "a", "x", "b"), "rejected": hh("hi", "c", "x", "d")}, {}, "differ from turn 2 on"),
        (
            {"chosen": hh("hi", "a", "x", "b"), "rejected": hh("hi", "c", "x", "d")},
            {"kind": "plain"},
            "differ before their last .*: they need the same prompt",
        ),
        ({"chosen": hh("hi", "a", "x", "b"), "rejected": hh("hi", "c")}, {}, "differ from turn 2 on"),
        ({"chosen": hh("hi", "a"), "rejected": hh("ho", "a")}, {}, "differ from turn 1 on"),
        (
            {"chosen": [user("a"), user("b")], "rejected": [user("a"), assistant("b")]},
            {},
            "but the turns are of user: remove",
        ),
        (
            {"prompt": [user("x")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            {},
            "begin with other turns than the prompt's: remove",
        ),
        ({"chosen": hh("hi", "a"), "rejected": hh("hi", "")}, {}, "Completion 2: The response is empty"),
    ],
)
def test_comparisons_without_a_prompt_are_rejected(tmp_path, row, options, error):
    with pytest.raises(InputError, match=error):
        compared(tmp_path / "x.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, row], **options)


def test_one_field_for_two_names_is_rejected():
    """fields.prompt=chosen would train on transcripts that follow themselves."""
    with pytest.raises(
        InputError, match="fields.prompt and data.fields.chosen are both 'chosen'.*give another .* needs no field"
    ):
        ComparisonConfig(fields={"prompt": "chosen"})
    with pytest.raises(InputError, match="fields.prompt and data.fields.response are both 'text'"):
        DemonstrationConfig(fields={"prompt": "text", "response": "text"})


# --- demonstrations ---------------------------------------------------------------------------------------


def demonstrated(path, row, **options):
    """(ids, response) of a row, read beside another."""
    source = write(path, [{"prompt": "z", "response": "z"}, row])
    loaded = load_demonstrations(DemonstrationConfig(source=source, **options), template(), LONG, 0)
    other = template().prompt("z")
    (found,) = [e for e in loaded.train + loaded.validation if e.ids.tolist()[: len(other)] != other]
    return found.ids.tolist(), found.response.tolist()


CONVERSATION = [user("a"), assistant("b"), user("c"), assistant("d")]


@pytest.mark.parametrize(
    "row, options",
    [
        ({"messages": CONVERSATION}, {}),
        ({"conversations": CONVERSATION}, {}),
        (
            {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate("abcd")]},
            {},
        ),
        ({"messages": hh(*"abcd")}, {}),
        ({"chosen": hh(*"abcd")}, {"fields": {"messages": "chosen"}}),
    ],
    ids=str,
)
def test_conversations(tmp_path, row, options):
    assert demonstrated(tmp_path / "x.jsonl", row, **options) == template().conversation(CONVERSATION)


def test_sharegpt_turns_of_the_system(tmp_path):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    messages = [{"role": "system", "content": "s"}, user("a"), assistant("b")]
    assert demonstrated(tmp_path / "x.jsonl", {"conversations": turns}) == template().conversation(messages)
    with pytest.raises(InputError, match="unknown role 'bing'"):
        demonstrated(tmp_path / "x.jsonl", {"conversations": [{"from": "bing", "value": "s"}]})


@pytest.mark.parametrize(
    "row, options",
    [
        ({"prompt": "a", "completion": "b"}, {}),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, {}),
        ({"prompt": "\n\nHuman: a\n\nAssistant:", "response": "b"}, {}),
        ({"q": {"text": "a"}, "outs": [{"o": "b"}]}, {"fields": {"prompt": "q.text", "response": "outs.0.o"}}),
        ({"i": "a", "in": "", "o": "b"}, {"fields": {"prompt": "i,in", "response": "o"}}),
    ],
    ids=str,
)
def test_prompts_and_responses(tmp_path, row, options):
    if "fields" in options:  # the other row has our names
        row = row | {"prompt": None}
        options = {"fields": options["fields"]}
        source = write(tmp_path / "x.jsonl", [row, row | {"i": "e", "q": {"text": "e"}}])
        loaded = load_demonstrations(DemonstrationConfig(source=source, **options), template(), LONG, 0)
        found = {tuple(e.ids.tolist()) for e in loaded.train + loaded.validation}
        assert tuple(template().prompt("a") + template().response("b")) in found
        return
    ids, response = demonstrated(tmp_path / "x.jsonl", row)
    before, after = template().prompt("a"), template().response("b")
    assert ids == before + after and response == [False] * len(before) + [True] * len(after)


# --- prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        [user("a"), assistant("b"), user("c")],
        [user("a"), assistant("b"), user("c"), assistant("d")],
        hh(*"abc") + "\n\nAssistant:",
        hh(*"abcd"),
    ],
    ids=str,
)
def test_prompts_end_before_the_answer(tmp_path, prompt):
    source = write(tmp_path / "x.jsonl", [{"prompt": prompt}])
    loaded = load_prompts(PromptConfig(source=source), template(), LONG)
    assert loaded.ids == [template().prompt([user("a"), assistant("b"), user("c")])]
    assert loaded.texts == ["c"]
    if isinstance(prompt, str):
        plain = load_prompts(PromptConfig(source=source), template("plain"), LONG)
        assert plain.texts == [hh(*"abc") + "\n\nAssistant:"]


def test_other_texts_stay_what_they_are():
    for text in ("", "a", "Human: a", "say\n\nHuman: a\n\nAssistant: b"):
        assert published.messages(text) == published.prompt(text, "chat", answered=True) == text
    assert published.response(["a"]) == ["a"] and published.response([]) == [] and published.prompt(7, "chat") == 7
