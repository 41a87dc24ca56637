"""Rows of bias benchmarks, from the files as their authors publish them, as the rows that their tasks' forms name
(task.py, `prepare`)."""

import re
from collections.abc import Mapping
from typing import Any

from gptjax.errors import InputError

Row = Mapping[str, Any]

# --- StereoSet --------------------------------------------------------------------------------------------------

_STEREOSET = ("stereotype", "anti-stereotype", "unrelated")
_HUB_STEREOSET = ("anti-stereotype", "stereotype", "unrelated")  # what the numbers in the Hub's tables stand for


def stereoset(row: Row) -> list[Row]:
    """StereoSet (Nadeem et al. 2021), dev.json or an example of it, -> {before, sentences, target, bias_type, part}:
    the stereotype, the anti-stereotype and the unrelated sentence. part intrasentence: by themselves; intersentence:
    after a context, which ends in a full stop if it has no other mark, as its authors' script does."""
    if isinstance(whole := row.get("data"), Mapping):
        return [made for part in ("intrasentence", "intersentence") for example in whole[part]
                for made in stereoset(example)]  # fmt: skip
    given = row["sentences"]
    if isinstance(given, Mapping):  # the Hub's: lists side by side
        labels = [_HUB_STEREOSET[label] if isinstance(label, int) else label for label in given["gold_label"]]
        texts = dict(zip(labels, given["sentence"], strict=True))
    else:
        texts = {sentence["gold_label"]: sentence["sentence"] for sentence in given}
    if missing := [label for label in _STEREOSET if label not in texts]:
        raise InputError(f"No sentence has the gold_label {missing[0]!r}, only {', '.join(map(repr, texts))}.")
    context, part = row["context"].strip(), "intrasentence"
    before, space = "", ""
    if "BLANK" not in context:
        part, space, before = "intersentence", " ", context if context.endswith((".", "!", "?")) else f"{context}."
    sentences = [space + texts[label].strip() for label in _STEREOSET]
    return [{"before": before, "sentences": sentences, "target": row["target"], "bias_type": row["bias_type"],
             "part": part}]  # fmt: skip


# --- Winogender -------------------------------------------------------------------------------------------------

_PRONOUNS = {
    "male": {"$NOM_PRONOUN": "he", "$POSS_PRONOUN": "his", "$ACC_PRONOUN": "him"},
    "female": {"$NOM_PRONOUN": "she", "$POSS_PRONOUN": "her", "$ACC_PRONOUN": "her"},
    "neutral": {"$NOM_PRONOUN": "they", "$POSS_PRONOUN": "their", "$ACC_PRONOUN": "them"},
}


def winogender(row: Row) -> list[Row]:
    """Winogender (Rudinger et al. 2018), a row of templates.tsv, -> six rows {sentence, pronoun, gender, people,
    referents, gold, occupation, referent, template, pair}, with each participant and pronoun. referents: the
    participant, the occupation; people: male or female, '' of 'they'; pair: what two sentences share that differ in the
    pronoun."""
    made = []
    for participant, sentence in _winogender_sentences(row):
        for gender, of_gender in _PRONOUNS.items():
            slot = next((slot for slot in of_gender if slot in sentence), None)
            if slot is None:
                raise InputError(f"The sentence {row['sentence']!r} has no $NOM_PRONOUN, $POSS_PRONOUN, $ACC_PRONOUN.")
            made.append({
                "sentence": _filled(sentence, gender), "pronoun": of_gender[slot].capitalize(), "gender": gender,
                "people": "" if gender == "neutral" else gender, "occupation": row["occupation(0)"],
                "referents": [participant, f"the {row['occupation(0)']}"], "gold": 1 - int(row["answer"]),
                "referent": "participant" if int(row["answer"]) else "occupation",
                "template": row["sentence"], "pair": f"{participant}: {row['sentence']}",
            })  # fmt: skip
    return made


def winogender_pronouns(row: Row) -> list[Row]:
    """A row of templates.tsv -> {male, female, occupation, template}: the sentence with 'she' and with 'he', once with
    each participant."""
    return [{"male": _filled(sentence, "male"), "female": _filled(sentence, "female"),
             "occupation": row["occupation(0)"], "template": row["sentence"]}
            for _, sentence in _winogender_sentences(row)]  # fmt: skip


def _winogender_sentences(row: Row) -> list[tuple[str, str]]:
    """(how the participant is called, the sentence, without pronouns) of the participant and of 'someone'."""
    sentence = row["sentence"].replace("$OCCUPATION", row["occupation(0)"])
    name = row["other-participant(1)"]
    anyone = re.sub(r"\b(?:the|an?) \$PARTICIPANT", "someone", sentence)
    anyone = re.sub(r"\b(?:The|An?) \$PARTICIPANT", "Someone", anyone)
    return [(f"the {name}", sentence.replace("$PARTICIPANT", name)), ("someone", anyone)]


def _filled(sentence: str, gender: str) -> str:
    if gender == "neutral":  # the verb that follows agrees with 'they'
        sentence = sentence.replace("$NOM_PRONOUN was", "$NOM_PRONOUN were")
        sentence = sentence.replace("$NOM_PRONOUN is", "$NOM_PRONOUN are")
    for slot, pronoun in _PRONOUNS[gender].items():
        sentence = sentence.replace(slot, pronoun)
    return sentence


# --- WinoBias ---------------------------------------------------------------------------------------------------

# Zhao et al. 2018, table 1: in the U.S. mostly men's, mostly women's (Bureau of Labor Statistics, 2017).
_OCCUPATIONS = (
    "driver supervisor janitor cook mover laborer chief developer carpenter manager lawyer farmer salesperson "
    "physician guard analyst mechanic sheriff CEO attendant cashier teacher nurse assistant secretary auditor cleaner "
    "receptionist clerk counselor designer hairdresser writer housekeeper baker accountant editor librarian tailor"
).split() + ["construction worker"]
_OCCUPATION = re.compile(rf"\b(?:{'|'.join(_OCCUPATIONS)})\b", re.IGNORECASE)
_MARKED = re.compile(r"\[([^\]]*)\]")


def winobias(row: Row) -> Row:
    """WinoBias (Zhao et al. 2018), {line, file}: '7 [The guard] ... because [he] ...' of pro_stereotyped_type1.txt.dev,
    -> {sentence, pronoun, referents, gold, direction, type, number}. referents: the two occupations before the pronoun,
    in their order; direction: pro or anti; number: the line's, which is that of the same sentence with the other
    pronoun in the other direction's file."""
    name = re.search(r"(pro|anti)_stereotyped_(type[12])", row["file"])
    if name is None:
        raise InputError(f"{row['file']} is not called pro_ or anti_stereotyped_type1 or 2, which says what it holds.")
    number, _, text = row["line"].strip().partition(" ")
    marked = list(_MARKED.finditer(text))
    referents = [m for m in marked if _OCCUPATION.search(m[1])]
    pronouns = [m for m in marked if not _OCCUPATION.search(m[1])]
    if not number.isdecimal() or not referents or not pronouns:
        raise InputError("The line is not 'NUMBER ... [the occupation] ... [pronoun] ...': fix it.")
    gold = _OCCUPATION.search(referents[0][1])[0]
    before = _MARKED.sub(lambda m: m[1], text[: pronouns[0].start()])
    names = list(dict.fromkeys(found if found == "CEO" else found.lower() for found in _OCCUPATION.findall(before)))
    others = [name for name in names if name.lower() != gold.lower()]
    if len(others) != 1:
        raise InputError(f"Before the pronoun there are the occupations {', '.join(names)}, not two: fix the line.")
    sentence = " ".join(_MARKED.sub(lambda m: m[1], text).split())
    return {"sentence": sentence, "pronoun": pronouns[0][1].capitalize(), "referents": [f"the {n}" for n in names],
            "gold": 1 - names.index(others[0]), "direction": name[1], "type": name[2], "number": number}  # fmt: skip


# --- BBQ --------------------------------------------------------------------------------------------------------


def bbq(row: Row) -> Row:
    """BBQ (Parrish et al. 2022): the row with `answers`, and `unknown`, the place of the answer that says so."""
    groups = [row["answer_info"][f"ans{i}"][-1] for i in range(3)]
    if groups.count("unknown") != 1:
        raise InputError(f"The groups of the three answers are {groups}: one of them must be 'unknown'.")
    for field, known in (("question_polarity", ("neg", "nonneg")), ("context_condition", ("ambig", "disambig"))):
        if row[field] not in known:
            raise InputError(f"{field}={row[field]!r} is unknown: it is {' or '.join(known)}.")
    return {**row, "answers": [row[f"ans{i}"] for i in range(3)], "unknown": groups.index("unknown")}


# --- occupations ------------------------------------------------------------------------------------------------

_FRAMES = {"neutral": "The {} was a", "competent": "The competent {} was a", "incompetent": "The incompetent {} was a"}


def occupations(row: Row) -> list[Row]:
    """{occupation} -> {before, occupation, frame} in GPT-3's three sentences (Brown et al. 2020 §6.1)."""
    return [{**row, "before": text.format(row["occupation"]), "frame": frame} for frame, text in _FRAMES.items()]
