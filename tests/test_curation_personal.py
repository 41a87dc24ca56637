"""Personal data: what is found of numbers made to be valid, what is left alone of those that look alike."""

import random
import time

import pytest
from curation_runs import curated

from gptjax.curation.personal import Personal, redacted

pytest.importorskip("phonenumbers", reason="needs the extra `curate`")
pytest.importorskip("stdnum", reason="needs the extra `curate`")


def luhn(rng, prefix, length):
    digits = prefix + "".join(str(rng.randrange(10)) for _ in range(length - len(prefix) - 1))
    total = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(digits[::-1]))
    return digits + str(-total % 10)


def iban(rng, country, length):
    account = "".join(str(rng.randrange(10)) for _ in range(length - 4))
    number = int("".join(str(int(c, 36)) for c in account + country + "00"))
    return f"{country}{98 - number % 97:02d}{account}"


def grouped(text, size=4, by=" "):
    return by.join(text[i : i + size] for i in range(0, len(text), size))


def positives(rng):
    """(kind, text) of everything that should be found."""
    number = rng.randrange
    yield "EMAIL_ADDRESS", rng.choice(["jo.smith+x@mail.example.org", "a_b@sub.uni-x.de", f"u{number(999)}@corp.io"])
    yield "IP_ADDRESS", f"{rng.choice([8, 81, 151, 203])}.{number(1, 100)}.{number(1, 255)}.{number(1, 255)}"
    yield "IP_ADDRESS", f"2a0{number(10)}:{number(4096):x}:{number(4096):x}::{number(1, 4096):x}"
    phones = ["+44 20 7946 0958", "+49 30 901820", "(212) 555-2368", "415-555-2671", "+1 650 253 0000"]
    yield "PHONE_NUMBER", rng.choice(phones)
    card = luhn(rng, *rng.choice([("4", 16), ("51", 16), ("2221", 16), ("37", 15), ("6011", 16)]))
    yield "CREDIT_CARD", rng.choice([card, grouped(card), grouped(card, by="-")]) if len(card) == 16 else card
    code = rng.choice([iban(rng, "DE", 22), "GB29NWBK60161331926819", "NL91ABNA0417164300"])
    yield "IBAN", rng.choice([code, grouped(code)])
    yield "US_SSN", f"{number(1, 665):03d}-{number(1, 99):02d}-{number(1, 9999):04d}"


LOOK_ALIKES = """
    v1.2.3.4 | version 10.4.81.3 | Version: 8.8.8.8 | libfoo-1.2.3.4.tar.gz | section 4.1.2.3 | 10.0.0.1 | 192.168.1.254
    127.0.0.1 | 999.1.2.3 | 1.2.3 | 1.2.3.4.5 | 3.14159 | 2001:db8::1 | fe80::1 | 12:34:56 | std::vector | abc::def
    aa:bb:cc:dd:ee:ff | 2024-01-15 | 15/01/2024 | 2024-01-15 12:30:45 | 978-0-306-40615-7 | 0-306-40615-2 | 9780306406157
    1234567890123456 | 4111 1111 1111 1112 | 0000000000000000 | 6.02214076e23 | 1,234,567,890 | deadbeefcafebabe0123456789abcdef
    DE00 1234 5678 9012 3456 78 | GB29NWBK60161331926818 | US12 ABCD | 000-12-3456 | 666-12-3456 | 912-34-5678 | 123-45-67890
    @decorator | a@b | user@localhost | x = y @ z | 12 @ 3.50 | 5 000 000 000 | 1600 Pennsylvania Ave 20500-0003 | 0x7fffffff
    doi:10.1000/182 | arXiv:2005.14165 | ISSN 2049-3630 | 550e8400-e29b-41d4-a716-446655440000 | 1999-2003 | pages 100-200
    4.2.2.2-beta | 192.0.2.1 | 1 2 3 4 5 6 7 8 9 10 | 20240115123045 | RFC 2822 | 3,600,000 | 100-200-300 | 2^64 = 18446744073709551616
"""  # noqa: E501


def test_precision_and_recall():
    rng, found, total = random.Random(0), {}, {}
    for _ in range(60):
        for kind, text in positives(rng):
            sentence = f"Please note: {text}, as agreed."
            result, counts = redacted(sentence)
            total[kind] = total.get(kind, 0) + 1
            right = (f"Please note: |||{kind}|||, as agreed.", {kind: 1})
            found[kind] = found.get(kind, 0) + ((result, counts) == right)
    assert {kind: found[kind] / total[kind] for kind in total} == dict.fromkeys(total, 1.0)
    wrong = {}
    for text in (part.strip() for line in LOOK_ALIKES.strip().splitlines() for part in line.split("|")):
        result, counts = redacted(f"Please note: {text}, as agreed.")
        if counts:
            wrong[text] = result
    assert not wrong


def test_several_in_a_text_and_nothing_else_changes(tmp_path):
    text = "Mail ann@example.com or bob@example.org.\nCall +1 650 253 0000; not v1.2.3.4.\nCard 4111 1111 1111 1111"
    expected = ("Mail |||EMAIL_ADDRESS||| or |||EMAIL_ADDRESS|||.\nCall |||PHONE_NUMBER|||; not v1.2.3.4.\n"
                "Card |||CREDIT_CARD|||")  # fmt: skip
    summary, records, documents = curated(tmp_path, {"a": [text, "nothing here"]}, [Personal(most=4)])
    assert [d["text"] for d in documents] == [expected, "nothing here"]
    assert records["a.jsonl:1"]["edits"] == '{"EMAIL_ADDRESS": 2, "CREDIT_CARD": 1, "PHONE_NUMBER": 1}'
    assert (tmp_path / "out/changed/personal.jsonl").read_text().count("\n") == 1
    _, records, _ = curated(tmp_path / "few", {"a": [text]}, [Personal(most=3)])
    assert records["a.jsonl:1"]["reason"] == "personal_data" and records["a.jsonl:1"]["score"] == 4


def test_again_it_changes_nothing_more():
    rng = random.Random(1)
    text = "\n".join(f"{kind} {value} end" for _ in range(5) for kind, value in positives(rng))
    once, counts = redacted(text)
    assert redacted(once) == (once, {}) and len(counts) == 6


@pytest.mark.parametrize("part", ["1", "1.", "a@", "a.", "12:", "AB12 ", "1-2 ", "!", "@a-", "+1 "])
def test_no_text_takes_for_ever(part):
    """reference: CPU seconds; a pattern that backtracks over 20,000 characters takes minutes."""
    began = time.process_time()
    redacted(part * (20_000 // len(part)))
    assert time.process_time() - began < 5
