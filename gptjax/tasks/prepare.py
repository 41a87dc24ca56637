"""Rows of published data as the rows that a task's forms name (task.py, `prepare`). A row already in that form is
passed on."""

import re
from collections.abc import Mapping
from typing import Any

from gptjax.errors import InputError
from gptjax.tasks import detokenize

Row = Mapping[str, Any]


def _field(row: Row, *names: str) -> Any:
    """The first of several fields that is in a row. InputError: none is."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InputError(f"The row has no field {' or '.join(map(repr, names))}, only {', '.join(map(repr, row))}.")


def last_word(row: Row) -> Row:
    """LAMBADA {text} -> {context, answer}: split at the last space, as OpenAI's files are read."""
    if "answer" in row:
        return row
    if "continuation" in row:
        return {"context": row["context"], "answer": row["continuation"].strip()}
    context, _, answer = _field(row, "text").strip().rpartition(" ")
    return {"context": context, "answer": answer}


def hellaswag(row: Row) -> Row:
    """HellaSwag {activity_label, ctx_a, ctx_b, endings, label} -> {query, choices, gold}, cleaned as in
    lm-evaluation-harness: the activity first, WikiHow's bracketed marks taken out."""
    if "query" in row:
        return row

    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {_field(row, 'ctx_b').capitalize()}"
    return {"query": clean(context), "choices": [clean(ending) for ending in row["endings"]], "gold": row["label"]}


def race(row: Row) -> list[Row]:
    """RACE {article, question(s), options, answer(s)} -> a row for each question; answers are letters."""
    questions, options, answers = (
        _field(row, *names) for names in (("questions", "question"), ("options",), ("answers", "answer"))
    )
    if isinstance(questions, str):
        questions, options, answers = [questions], [options], [answers]
    return [
        {"article": row["article"], "question": question, "options": choices, "gold": list("ABCD").index(answer)}
        for question, choices, answer in zip(questions, options, answers, strict=True)
    ]


def science_question(row: Row) -> Row:
    """ARC and OpenBookQA as AllenAI publishes them, {question: {stem, choices: [{text, label}]}, answerKey}, -> as
    Hugging Face has them, {question, question_stem, choices: {text: [...], label: [...]}, answerKey}."""
    if not isinstance(row.get("question"), Mapping):
        return row
    stem, choices = row["question"]["stem"], row["question"]["choices"]
    lists = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    return {**row, "question": stem, "question_stem": stem, "choices": lists}


def copa(row: Row) -> Row:
    """COPA {premise, choice1, choice2, question, label} -> {query, choices, gold}: the premise without its full stop,
    'because' or 'therefore', and the choices in lower case."""
    if "query" in row:
        return row
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    lower = lambda text: text[:1].lower() + text[1:]
    return {"query": f"{row['premise'].strip().rstrip('.')} {word}",
            "choices": [lower(row["choice1"]), lower(row["choice2"])], "gold": row["label"]}  # fmt: skip


def winograd(row: Row) -> Row:
    """WSC273 {text, pronoun_loc, pronoun, options, label} -> {context_options, continuation, gold}."""
    if "context_options" in row:
        return row
    text, at = row["text"], row["pronoun_loc"]
    before, after = text[:at], text[at + len(row["pronoun"]) :]
    return {"context_options": [before + _fitted(option, before, row["pronoun"]) for option in row["options"]],
            "continuation": after.strip(), "gold": row["label"]}  # fmt: skip


def _fitted(option: str, before: str, pronoun: str) -> str:
    """A referent in place of a pronoun: with 's where that is a possessive, and within a sentence without the capital
    of an article or a possessive pronoun."""
    if pronoun.lower() in ("his", "her", "its", "their") and not option.endswith("s"):
        option += "'s"
    first, _, rest = option.partition(" ")
    if before.strip() and first.lower() in ("the", "a", "an", "his", "her", "their", "my", "your", "our"):
        option = f"{first.lower()} {rest}".strip()
    return option


def winogrande(row: Row) -> Row:
    """WinoGrande {sentence with _, option1, option2, answer 1 or 2} -> {context_options, continuation, gold}."""
    if "context_options" in row:
        return row
    before, _, after = row["sentence"].partition("_")
    return {"context_options": [before + row["option1"], before + row["option2"]], "continuation": after.strip(),
            "gold": int(row["answer"]) - 1}  # fmt: skip


def cbt(row: Row) -> Row:
    """Children's Book Test {sentences, question with XXXXX, options, answer} -> {context, choices, gold}, detokenized
    (GPT-2 §3.2); a choice is the word, with the quotes around it, and the rest of the sentence."""
    if "choices" in row:
        return row
    natural = lambda text: " ".join(detokenize.cbt(text).split())
    question = natural(row["question"])
    start = question.rfind(" ", 0, question.index("XXXXX")) + 1
    context = " ".join([*map(natural, row["sentences"]), question[:start]]).strip()
    choices = [question[start:].replace("XXXXX", option, 1) for option in row["options"]]
    return {"context": context, "choices": choices, "gold": row["options"].index(row["answer"])}


def squad(row: Row) -> list[Row]:
    """SQuAD {title, context, question, answers: {text: [...]}}, or its own file, {data: [...]}, -> the same with a list
    of answers."""
    if "data" in row:
        return [
            {"title": article["title"], "context": paragraph["context"], "question": asked["question"],
             "answers": [answer["text"] for answer in asked["answers"]] or ["unanswerable"]}
            for article in row["data"] for paragraph in article["paragraphs"] for asked in paragraph["qas"]
        ]  # fmt: skip
    answers = row["answers"]["text"] if isinstance(row["answers"], Mapping) else row["answers"]
    return [{**row, "answers": list(answers) or ["unanswerable"]}]


def triviaqa(row: Row) -> Row:
    """TriviaQA {question, answer: {value, aliases}}, or {context, answer, aliases} -> {context, shown, answers}."""
    answer = row["answer"] if isinstance(row["answer"], Mapping) else {**row, "value": row["answer"]}
    context = row["context"] if "context" in row else f"Q: {row['question']}\n\nA:"
    answers = list(dict.fromkeys([answer["value"], *answer["aliases"]]))
    return {"context": context, "shown": answer["value"], "answers": answers}


_HEADING = re.compile(r"^ = [^=](?:.*[^=])? = $", re.MULTILINE)


def wikitext_pages(row: Row) -> list[Row]:
    """WikiText {text}, a whole file or a page -> {page}: split before each heading of the first level. InputError: a
    row that is a single line, as in Hugging Face's tables, whose pages are lost."""
    if "page" in row:
        return [row]
    text = row["text"]
    if "\n" not in text.strip():
        raise InputError("The row is a single line, and pages are scored whole: join the lines in a .txt file.")
    starts = [match.start() for match in _HEADING.finditer(text)]
    bounds = [0, *(start for start in starts if text[:start].strip()), len(text)]
    return [{"page": text[a:b]} for a, b in zip(bounds, bounds[1:], strict=False) if text[a:b].strip()]
