"""Task files and rows for lm-evaluation-harness, written to a folder: local, so that no hub is needed. The tasks have
the form of its own piqa, hellaswag, winogrande, lambada_openai, wikitext, arithmetic, blimp and gsm8k."""

import json

import numpy as np

UTILS = '''
import re


def contexts(doc):
    start = doc["sentence"].index("_")
    return [doc["sentence"][:start] + option for option in (doc["option1"], doc["option2"])]


def gold(doc):
    return {"1": 0, "2": 1}[doc["answer"]]


def rest(doc):
    return doc["sentence"][doc["sentence"].index("_") + 1 :].strip()


def of_page(doc, results):
    (log_prob,) = results
    words, size = len(re.split(r"\\s+", doc["page"])), len(doc["page"].encode("utf-8"))
    of_bytes = (log_prob, size)
    return {"word_perplexity": (log_prob, words), "byte_perplexity": of_bytes, "bits_per_byte": of_bytes}


def same(doc, results):
    return {"same": float(results[0].strip() == doc["answer"])}
'''
CHOICE = "output_type: multiple_choice\nmetric_list:\n" + "".join(
    f"  - metric: {name}\n    aggregation: mean\n    higher_is_better: true\n"
    for name in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
)
CLOZE = (
    "output_type: loglikelihood\nmetric_list:\n"
    "  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
)
TASKS = {
    "piqa": CHOICE + 'doc_to_text: "Question: {{goal}}\\nAnswer:"\ndoc_to_target: label\n'
    'doc_to_choice: "{{[sol1, sol2]}}"\n',
    "hellaswag": CHOICE + 'doc_to_text: "{{ctx}}"\ndoc_to_target: "{{label}}"\ndoc_to_choice: endings\n',
    "winogrande": "output_type: multiple_choice\nmetric_list:\n"
    "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    "doc_to_text: !function utils.gold\ndoc_to_target: !function utils.rest\ndoc_to_choice: !function utils.contexts\n",
    "blimp": CHOICE + 'doc_to_text: ""\ndoc_to_target: 0\ndoc_to_choice: "{{[sentence_good, sentence_bad]}}"\n',
    "lambada": CLOZE + "doc_to_text: \"{{text.split(' ')[:-1]|join(' ')}}\"\n"
    "doc_to_target: \"{{' '+text.split(' ')[-1]}}\"\n",
    "arithmetic": CLOZE + 'doc_to_text: "{{context}}"\ndoc_to_target: "{{completion}}"\ntarget_delimiter: ""\n',
    "wikitext": "output_type: loglikelihood_rolling\nmetric_list:\n  - metric: word_perplexity\n"
    "  - metric: byte_perplexity\n  - metric: bits_per_byte\n"
    'doc_to_text: ""\ndoc_to_target: "{{page}}"\nprocess_results: !function utils.of_page\n',
    "gsm8k": "output_type: generate_until\nmetric_list:\n"
    "  - {metric: same, aggregation: mean, higher_is_better: true}\n"
    'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\nprocess_results: !function utils.same\n'
    'generation_kwargs: {until: ["\\n", "at", "é", "og"], max_gen_toks: 40}\n',
    "everything": "output_type: generate_until\nmetric_list:\n"
    "  - {metric: same, aggregation: mean, higher_is_better: true}\n"
    'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\nprocess_results: !function utils.same\n'
    "generation_kwargs: {until: [], max_gen_toks: 24, do_sample: false}\n",
}
ROWS_OF = {"everything": "gsm8k"}
WORDS = "the cat sat on a mat and ran to its naïve café where 345 dogs jump over lazy foxes — quickly ; isn't".split()


def write(folder, answers, n: int = 12, seed: int = 0):
    """Task files and rows. answers: contexts -> what the model writes after each, so that some answers are greedy."""
    folder.mkdir(parents=True)
    (folder / "utils.py").write_text(UTILS)
    rows = made_rows(np.random.default_rng(seed), answers, n)
    for task, values in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values)
        (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")
    for task, keys in TASKS.items():
        data = folder / f"{ROWS_OF.get(task, task)}.jsonl"
        (folder / f"{task}.yaml").write_text(
            f"task: {task}_local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
            f"test_split: test\nfewshot_split: test\nfewshot_config:\n  sampler: first_n\n{keys}"
        )


def made_rows(rng, answers, n):
    def text(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    rows = {
        "piqa": [{"goal": text(3, 7) + "?", "sol1": text(1, 4), "sol2": text(1, 4), "label": int(rng.integers(2))}
                 for _ in range(n)],
        "hellaswag": [{"ctx": text(4, 9) + ".", "endings": [f"Ünter {text(1, 5)} 東京 é" for _ in range(4)],
                       "label": str(rng.integers(4))} for _ in range(n)],
        "winogrande": [{"sentence": f"{text(2, 5)} _ {text(2, 5)}.", "option1": "Zoë", "option2": text(1, 3),
                        "answer": str(rng.integers(1, 3))} for _ in range(n)],
        "blimp": [{"sentence_good": text(3, 8), "sentence_bad": text(3, 8)} for _ in range(n)],
        "wikitext": [{"page": f" = {text(1, 3)} = \n\n" + text(5 + 20 * i, 8 + 20 * i) + " \n"} for i in range(n)],
        "gsm8k": [{"question": text(3, 9), "answer": text(1, 2)} for _ in range(n)],
    }  # fmt: skip
    contexts = [text(3, 8) for _ in range(n - 2)] + [text(60, 80), text(90, 120)]  # the last two beyond the context
    greedy = answers(contexts)
    last = [" " + text(1, 2) if i % 3 == 2 else greedy[i] for i in range(n)]
    rows["lambada"] = [{"text": context + answer} for context, answer in zip(contexts, last, strict=True)]
    rows["arithmetic"] = [{"context": c, "completion": a} for c, a in zip(contexts, last, strict=True)]
    return rows
