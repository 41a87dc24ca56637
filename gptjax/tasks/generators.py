"""GPT-3's synthetic tasks (Brown et al. 2020, section 3.9.1-3.9.2), made anew with any seed: arithmetic, word scramble.

    python -m gptjax.tasks.generators --task=arithmetic_2da --n=2000 --out=DIR
    python -m gptjax.tasks.generators --task=cycle_letters --words=FILE --n=10000 --out=DIR

Rows are those of OpenAI's files (github.com/openai/gpt-3, data/), {"context", "completion"}: the context begins with
line breaks, so that examples can be set one after another, and the completion with a space. --task=arithmetic and
--task=scramble make all of their tasks. A task has no row twice, and the same seed makes the same rows.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from absl import flags

from gptjax import command_line, json_files
from gptjax.errors import InputError

Row = dict[str, str]
OPERATIONS = {"a": ("plus", int.__add__), "s": ("minus", int.__sub__), "m": ("times", int.__mul__)}
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
# The ten tasks of the paper, by lm-eval's names: digits, then addition, subtraction, multiplication, or composite.
ARITHMETIC = tuple(f"arithmetic_{name}" for name in "1dc 2da 2ds 2dm 3da 3ds 4da 4ds 5da 5ds".split())
SCRAMBLE = ("cycle_letters", "anagrams1", "anagrams2", "random_insertion", "reversed_words")
SCRAMBLE_INSTRUCTION = "Please unscramble the letters into a word, and write that word:"  # before the first context


def _draw(rng: random.Random, population: int, n: int) -> Iterator[int]:
    """n different numbers below population: Fisher-Yates, of which only what was moved is kept. random() gives the same
    numbers in every version of Python, which its other methods do not promise."""
    moved = {}
    for i in range(n):
        j = i + int(rng.random() * (population - i))
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)


def arithmetic(task: str, n: int, seed: int = 0) -> list[Row]:
    """n rows of one of ARITHMETIC, or of any other number of digits, as 'arithmetic_6da'.

    Operands are uniform from 0 to 10^digits - 1. In the composite task the digits are 1 to 9 and the parentheses are
    around the first two, as in OpenAI's file; the paper's text has digits from 0, and parentheses around the last two.
    Raises InputError for another name, and where there are fewer than n different rows.
    """
    name = re.fullmatch(r"arithmetic_(?:(1)dc|([1-9])d([asm]))", task)
    if not name:
        raise InputError(f"There is no task {task!r}: the tasks of arithmetic are {', '.join(ARITHMETIC)}.")
    rng = random.Random(seed)
    if name[1]:
        rows = [_composite(index) for index in _draw(rng, _enough(task, 9**3 * 3**2, n), n)]
    else:
        limit, (word, operation) = 10 ** int(name[2]), OPERATIONS[name[3]]
        pairs = (divmod(index, limit) for index in _draw(rng, _enough(task, limit**2, n), n))
        rows = [(f"{a} {word} {b}", operation(a, b)) for a, b in pairs]
    return [{"context": f"\n\nQ: What is {question}?\n\nA:", "completion": f" {answer}"} for question, answer in rows]


def _composite(index: int) -> tuple[str, int]:
    """Row `index` of the 9^3 3^2 of single digits with two operations: (question, answer)."""
    *digits, first, second = _places(index, (9, 9, 9, 3, 3))
    a, b, c = (digit + 1 for digit in digits)
    first, second = (list(SIGNS)[i] for i in (first, second))
    return f"({a} {first} {b}) {second} {c}", SIGNS[second](SIGNS[first](a, b), c)


def _places(index: int, bases: Sequence[int]) -> list[int]:
    places = []
    for base in bases:
        index, place = divmod(index, base)
        places.append(place)
    return places


def _enough(task: str, rows: int, n: int) -> int:
    if not 0 <= n <= rows:
        raise InputError(f"{task}: n={n} different rows are not to be had: there are {rows}.")
    return rows


def scramble(task: str, words: Iterable[str], n: int, seed: int = 0) -> list[Row]:
    """n rows of one of SCRAMBLE, each of another word.

    words: a list, from which those of the letters a-z are used that the task can change: 'aaaaaa' has no anagram, and
    OpenAI's files do have 193 words of 10,000 that are their own anagram (A2), and one palindrome. GPT-3's words were
    the 10,000 most frequent of more than 4 and less than 15 letters. Raises InputError for another name, and for fewer
    than n such words.
    """
    if task not in SCRAMBLE:
        raise InputError(f"There is no task {task!r}: the tasks of word scramble are {', '.join(SCRAMBLE)}.")
    usable = [word for word in dict.fromkeys(words) if re.fullmatch("[a-z]+", word) and _changes(task, word)]
    rng = random.Random(seed)
    chosen = [usable[i] for i in _draw(rng, _enough(task, len(usable), n), n)]
    return [{"context": f"\n{_scrambled(task, word, rng)} =", "completion": f" {word}"} for word in chosen]


def _kept(task: str) -> int:
    """Letters at both ends that stay in their place: 1 in the first kind of anagrams, 2 in the second."""
    return int(task[-1])


def _changes(task: str, word: str) -> bool:
    """Whether the task can make another string of a word."""
    if task.startswith("anagrams"):
        return len(set(word[_kept(task) : -_kept(task)])) > 1
    if task == "reversed_words":
        return word != word[::-1]
    return len(word) > 1 if task == "random_insertion" else len(set(word)) > 1


def _scrambled(task: str, word: str, rng: random.Random) -> str:
    if task == "reversed_words":
        return word[::-1]
    if task == "random_insertion":  # a mark or a space between all letters
        return "".join(letter + " ./!"[int(4 * rng.random())] for letter in word[:-1]) + word[-1]
    found = word
    while found == word:
        if task == "cycle_letters":
            cut = 1 + int((len(word) - 1) * rng.random())
            found = word[cut:] + word[:cut]
        else:
            k = _kept(task)
            middle = word[k:-k]
            order = _draw(rng, len(middle), len(middle))
            found = word[:k] + "".join(middle[i] for i in order) + word[-k:]
    return found


def write(task: str, rows: Sequence[Row], folder) -> Path:
    """FOLDER/TASK.jsonl, as OpenAI's files are written."""
    path = Path(folder) / f"{task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    json_files.write_json_lines(path, rows)
    return path


def main(_):
    tasks = {"arithmetic": ARITHMETIC, "scramble": SCRAMBLE}.get(FLAGS.task, (FLAGS.task,))
    words = None
    if set(tasks) & set(SCRAMBLE):
        if FLAGS.words is None:
            raise InputError(f"--task={FLAGS.task} needs words to scramble: give --words=FILE, one word a line.")
        words = Path(FLAGS.words).read_text(encoding="utf-8").split()
    for task in tasks:
        rows = scramble(task, words, FLAGS.n, FLAGS.seed) if task in SCRAMBLE else arithmetic(task, FLAGS.n, FLAGS.seed)
        print(f"{len(rows)} rows in {write(task, rows, FLAGS.out)}")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("task", None, f"One of {', '.join(ARITHMETIC + SCRAMBLE)}, or arithmetic or scramble: all.")
    flags.DEFINE_integer("n", 2000, "Rows to make.", lower_bound=1)
    command_line.define_path("words", None, "A file of words to scramble, one a line.")
    command_line.define_path("out", None, "The folder of the file that is written, TASK.jsonl.")
    flags.DEFINE_integer("seed", 0, "The same seed makes the same rows.", lower_bound=0)
    flags.mark_flags_as_required(["task", "out"])
    command_line.run(main)
