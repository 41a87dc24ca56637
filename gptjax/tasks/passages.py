"""Rows of published data sets with several questions on a passage, as the rows that a task's forms name (task.py,
`prepare`): as their authors publish them, a file's one object included, and as they are on the Hugging Face Hub.

Framing: Brown et al. 2020 (GPT-3), figures G.6, G.15, G.18, G.20, G.25 and G.33.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from gptjax.errors import InputError
from gptjax.tasks.items import NotAsked
from gptjax.tasks.metrics import token_f1

Row = Mapping[str, Any]


def multirc(row: Row) -> list[Row]:
    """MultiRC (Khashabi et al. 2018) -> {passage, question, answer, label, group} of each answer to judge. group: the
    question's."""
    if isinstance(row.get("idx"), Mapping):  # the Hub's: a row an answer
        return [{**row, "passage": row["paragraph"], "group": f"{row['idx']['paragraph']}-{row['idx']['question']}"}]
    passage = row["passage"]
    return [
        {"passage": passage["text"], "question": question["question"], "answer": answer["text"],
         "label": answer["label"], "group": f"{row['idx']}-{question['idx']}"}
        for question in passage["questions"] for answer in question["answers"]
    ]  # fmt: skip


def record(row: Row) -> list[Row]:
    """ReCoRD (Zhang et al. 2018) -> {passage, entities, sentences, answers, gold} of each query: the query with each
    entity of the passage in place of @placeholder."""
    if isinstance(passage := row["passage"], Mapping):
        text = passage["text"]
        named = [text[span["start"] : span["end"] + 1] for span in passage["entities"]]
        queries = [(asked["query"], [answer["text"] for answer in asked["answers"]]) for asked in row["qas"]]
    else:
        text, named, queries = passage, row["entities"], [(row["query"], row["answers"])]
    entities = list(dict.fromkeys(named))
    body, *highlights = text.strip().split("\n@highlight\n")
    ended = lambda line: line if line.endswith((".", "!", "?", '"', "'")) else f"{line}."
    passage = "\n".join([body, *(f"- {ended(line.strip())}" for line in highlights)])
    found = []
    for query, answers in queries:
        gold = next((i for i, entity in enumerate(entities) if entity in answers), None)
        if gold is None:
            raise InputError(f"No answer of {', '.join(map(repr, answers))} is an entity of the passage: fix the row.")
        sentences = [f"- {query.replace('@placeholder', entity)}" for entity in entities]
        found.append({"passage": passage, "entities": entities, "sentences": sentences,
                      "answers": list(dict.fromkeys(answers)), "gold": gold})  # fmt: skip
    return found


def wsc(row: Row) -> Row:
    """WSC of SuperGLUE {text, target: {span1_text, span2_text, span2_index}, label}, or these side by side, ->
    {passage, pronoun, noun, label}: the pronoun stands between asterisks. Its index counts words."""
    target = row.get("target", row)
    words, at, pronoun = row["text"].split(), target["span2_index"], target["span2_text"]
    rest = " ".join(words[at:])
    if not rest.startswith(pronoun):
        raise InputError(f"Word {at} of the text, from 0, is not the pronoun {pronoun!r}: fix span2_index.")
    passage = " ".join([*words[:at], f"*{pronoun}*{rest[len(pronoun) :]}"])
    return {"passage": passage, "pronoun": pronoun, "noun": target["span1_text"], "label": row["label"]}


# --- conversations --------------------------------------------------------------------------------------------


def coqa(row: Row) -> list[Row]:
    """CoQA (Reddy et al. 2019) -> {story, history, question, answers, shown, group} of each turn. answers: the
    conversation's own and the additional ones, which the official file and EleutherAI/coqa have and stanfordnlp/coqa
    lacks; group: the conversation's."""
    return [turn for i, story in enumerate(row.get("data", [row])) for turn in _coqa_turns(story, i)]


def _coqa_turns(story: Row, place: int) -> Iterable[Row]:
    questions, own = _inputs(story["questions"]), _inputs(story["answers"])
    others = [_inputs(answers) for answers in (story.get("additional_answers") or {}).values()]
    golds = [[given, *(answers[i] for answers in others)] for i, given in enumerate(own)]
    for turn in _turns(questions, own, golds, group=str(story.get("id", story["story"][:200] + str(place)))):
        yield {"story": story["story"], **turn}


def _inputs(given) -> list[str]:
    """Texts of CoQA's questions or answers, as [{input_text}, ...], {input_text: [...]} or [...]."""
    if isinstance(given, Mapping):
        return list(given["input_text"])
    return [text if isinstance(text, str) else text["input_text"] for text in given]


def quac(row: Row) -> list[Row | NotAsked]:
    """QuAC (Choi et al. 2018) -> {title, paragraph, history, question, answers, shown, group} of each turn, as its
    scorer takes them: without turns on whose answer the annotators agree by an F1 of less than .4; an answer is that
    there is none, CANNOTANSWER, where at least half of them say so, and else those of the others."""
    if "data" in row:
        articles = [(article, part) for article in row["data"] for part in article["paragraphs"]]
    else:
        articles = [(row, row)]
    return [turn for article, part in articles for turn in _quac_turns(article, part)]


def _quac_turns(article: Row, part: Row) -> Iterable[Row | NotAsked]:
    if "qas" in part:
        questions = [q["question"] for q in part["qas"]]
        golds = [[answer["text"] for answer in q["answers"]] for q in part["qas"]]
        own, title, group = [q["orig_answer"]["text"] for q in part["qas"]], article["title"], part["id"]
    else:
        questions, golds, own = part["questions"], part["answers"]["texts"], part["orig_answers"]["texts"]
        title, group = part["wikipedia_page_title"], part["dialogue_id"]
    about = {"title": f"{title} - {article['section_title']}",
             "paragraph": part["context"].removesuffix("CANNOTANSWER").strip()}  # fmt: skip
    for turn in _turns(questions, own, [_answerable(of_one) for of_one in golds], group):
        agreed = _agreement(turn["answers"]) >= 0.4
        yield {**about, **turn} if agreed else NotAsked("turns on whose answer the annotators disagree")


def _answerable(answers: list[str]) -> list[str]:
    given = [answer for answer in answers if answer != "CANNOTANSWER"]
    return given if len(given) > len(answers) / 2 else ["CANNOTANSWER"]


def _agreement(answers: list[str]) -> float:
    """Mean over annotators of the best F1 with another's answer; 1 of a single one."""
    if len(answers) == 1:
        return 1.0
    best = [max(token_f1(a, b) for j, b in enumerate(answers) if j != i) for i, a in enumerate(answers)]
    return sum(best) / len(best)


def _turns(questions: list[str], own: list[str], golds: list[list[str]], group: str) -> Iterable[Row]:
    """Each turn with the turns before it and their answers."""
    history = ""
    for question, answer, answers in zip(questions, own, golds, strict=True):
        yield {"history": history, "question": question, "answers": answers, "shown": answer, "group": group}
        history += f"Q: {question}\n\nA: {answer}\n\n"


# --- DROP -----------------------------------------------------------------------------------------------------


def drop(row: Row) -> list[Row | NotAsked]:
    """DROP (Dua et al. 2019) -> {passage, question, answers, shown, group} of each question. An answer is a number, a
    date, or spans, a line each (metrics.drop_f1); group: the passage's. An annotator's answer that is empty counts for
    nothing, as in drop_eval.py; a question with no other is not asked, where that script gives every model a 0. On the
    Hub: EleutherAI/drop."""
    if "passage" in row and "qa_pairs" not in row:
        return [_drop_question(row["passage"], row)]
    passages = [row] if "passage" in row else row.values()
    return [_drop_question(of["passage"], question) for of in passages for question in of["qa_pairs"]]


def _drop_question(passage: str, row: Row) -> Row | NotAsked:
    if "answers_spans" in row:
        raise InputError(
            "The row has answers_spans (ucinlp/drop), one list of all annotators' spans, which does not say which of "
            "them are one answer: use drop_dataset_dev.json or EleutherAI/drop."
        )
    validated = row.get("validated_answers") or []
    if isinstance(validated, Mapping):  # the Hub's: lists side by side
        validated = [dict(zip(validated, values, strict=True)) for values in zip(*validated.values(), strict=True)]
    answers = [spans for given in (row["answer"], *validated) if any(map(str.strip, spans := _drop_spans(given)))]
    if not answers:
        return NotAsked("questions without an answer")
    return {"passage": passage, "question": row["question"], "answers": ["\n".join(spans) for spans in answers],
            "shown": ", ".join(answers[0]), "group": passage}  # fmt: skip


def _drop_spans(answer: Row) -> list[str]:
    if str(answer.get("number", "")):
        return [str(answer["number"])]
    if len(answer.get("spans") or []):
        return list(answer["spans"])
    date = answer.get("date") or {}
    return [" ".join(filter(None, (date.get(key, "") for key in ("day", "month", "year"))))]
