"""The template: ids of prompts, responses and conversations, the response mask, and every error."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.bpe import character_tokenizer, train_bpe
from gptjax.data.chat import ASSISTANT, PAD, SYSTEM, USER, Template, chat_tokenizer
from gptjax.errors import InputError

TEXTS = st.text(st.sampled_from("ab <|user|>é\n"), min_size=1, max_size=12)


@functools.cache
def tokenizer():
    return chat_tokenizer(train_bpe(["what is two and two? it is four. " * 20], 270))


def template(kind="chat"):
    return Template(tokenizer(), kind)


def said(*texts, system=None):
    """Messages of user and assistant in turn."""
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def ids(*parts):
    """Ids of texts, and of special tokens by their name."""
    specials = {name: tokenizer().special_id(name) for name in (PAD, SYSTEM, USER, ASSISTANT, "<|endoftext|>")}
    return [i for part in parts for i in ([specials[part]] if part in specials else tokenizer().encode(part))]


def test_chat_tokenizer():
    base = character_tokenizer(["ab"])
    names = ["<|endoftext|>", PAD, SYSTEM, USER, ASSISTANT]
    assert [chat_tokenizer(base).special_id(name) for name in names] == [2, 3, 4, 5, 6]
    assert chat_tokenizer(chat_tokenizer(base)).fingerprint == chat_tokenizer(base).fingerprint


def test_one_turn():
    chat, plain = template(), template("plain")
    assert chat.prompt("two?") == ids(USER, "two?", ASSISTANT)
    assert plain.prompt("two?") == ids("two?")
    assert plain.prompt("") == []
    assert chat.response("four") == plain.response("four") == ids("four", "<|endoftext|>")
    assert (chat.eos_id, chat.pad_id) == (tokenizer().eot_id, tokenizer().pad_id)


def test_conversation():
    got, is_response = template().conversation(said("a", "b", "and", "it is", system="be"))
    end = "<|endoftext|>"
    parts = [
        ([SYSTEM, "be", USER, "a", ASSISTANT], False),
        (["b", end], True),
        ([USER, "and", ASSISTANT], False),
        (["it is", end], True),
    ]
    assert got == [i for part, _ in parts for i in ids(*part)]
    assert is_response == [flag for part, flag in parts for _ in ids(*part)]
    assert template().prompt(said("a", "b", "and", system="be")) == ids(
        SYSTEM, "be", USER, "a", ASSISTANT, "b", end, USER, "and", ASSISTANT
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0), st.none() | TEXTS)
def test_a_conversation_is_its_prompt_and_its_response(texts, system):
    chat, messages = template(), said(*texts, system=system)
    got, is_response = chat.conversation(messages)
    before = chat.prompt(messages[:-1])
    assert got == before + chat.response(texts[-1])
    assert len(is_response) == len(got)
    assert is_response[len(before) - 1 :] == [False] + [True] * (len(got) - len(before))
    # A text contains no special token, so there are as many role tokens as turns.
    assert sum(i in ids(SYSTEM, USER, ASSISTANT) for i in got) == len(messages)
    assert sum(i == chat.eos_id for i in got) == len(texts) // 2
    assert chat.decode(chat.response(texts[-1])) == texts[-1]
    assert chat.prompt(texts[0]) == chat.prompt(said(texts[0]))


def test_decode_stops_at_the_first_end_of_text():
    chat = template()
    assert chat.decode(ids(PAD, PAD, USER, "a", ASSISTANT, "b", "<|endoftext|>", "c", PAD)) == "ab"
    assert chat.decode([]) == chat.decode(ids("<|endoftext|>", "a")) == ""
    with pytest.raises(InputError, match="outside the tokenizer's vocabulary"):
        chat.decode([tokenizer().vocab_size])


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "messages, error",
    [
        ([], "There are no messages, but the last turn must be the assistant's"),
        (said("a"), "Turn 1 is the user's, but the last turn must be the assistant's: fix"),
        (said("a", "b", "c"), "Turn 3 is the user's, but the last"),
        ([message("assistant", "a")], "Turn 1 is the assistant's but should be the user's"),
        (said("a") + said("b"), "Turn 2 is the user's but should be the assistant's"),
        (said("a", "b") + [message("system", "c")], "Turn 3 is the system's but should be the user's"),
        ([message("system", "c"), *said("a", "b", system="c")], "Turn 2 is the system's"),
        ([message("user", "a"), message("bot", "b")], "Turn 2 has the unknown role 'bot': use one of system"),
        ([message(["user"], "a")], r"Turn 1 has the unknown role \['user'\]"),
        ([message("user", "a"), message("assistant", 7)], r"Turn 2 \(assistant\) is int, not text"),
        ([message("user", "a"), message("assistant", "")], r"Turn 2 \(assistant\) is empty"),
        ([message("user", ""), message("assistant", "a")], r"Turn 1 \(user\) is empty"),
        ([message("user", None)], "Turn 1 has no 'content'"),
        ([{"from": "human"}], "Turn 1 has no 'role': a turn is"),
        (["a"], "Turn 1 is str: give an object"),
        ("a", "The messages are str, not a list"),
    ],
)
def test_bad_conversations(messages, error):
    with pytest.raises(InputError, match=error):
        template().conversation(messages)


def test_bad_texts():
    chat, plain = template(), template("plain")
    with pytest.raises(InputError, match="Turn 2 is the assistant's, but the last turn must be the user's"):
        chat.prompt(said("a", "b"))
    with pytest.raises(InputError, match="The prompt is empty"):
        chat.prompt("")
    with pytest.raises(InputError, match="The prompt is int, not text or a list of messages"):
        chat.prompt(7)
    for either in (chat, plain):
        with pytest.raises(InputError, match="The response is empty"):
            either.response("")
        with pytest.raises(InputError, match="The response is NoneType, not text"):
            either.response(None)
    for refused in (lambda: plain.prompt(said("a")), lambda: plain.conversation(said("a", "b"))):
        with pytest.raises(InputError, match="'plain' does not accept messages: use the template 'chat'"):
            refused()


def test_what_a_template_needs():
    with pytest.raises(InputError, match="The template 'llama' is unknown: use 'chat' or 'plain'"):
        template("llama")
    base = character_tokenizer(["ab"])
    with pytest.raises(InputError, match=r"has no <\|endoftext\|>, <\|pad\|>, <\|system\|>.*: add them with chat"):
        Template(base, "chat")
    half = base.with_specials(["<|endoftext|>"])
    with pytest.raises(InputError, match=r"The tokenizer has no <\|pad\|>, which the template 'plain' needs: add"):
        Template(half, "plain")
    enough = half.with_specials([PAD])
    assert Template(enough, "plain").response("ab") == [0, 1, 2]
    with pytest.raises(InputError, match=r"no <\|system\|>, <\|user\|>, <\|assistant\|>"):
        Template(enough, "chat")
    enough._specials[PAD] = enough.eot_id
    with pytest.raises(InputError, match="Padding and end-of-text are the same token, 2: give"):
        Template(enough, "plain")
