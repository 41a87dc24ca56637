"""Personal data in text, replaced by placeholders: addresses of mail and networks, phone, card and account numbers.

A pattern proposes and a rule decides: check digits (Luhn, ISO 7064), ranges that are assigned, phonenumbers' own
patterns by country. What looks alike (versions, dates, ISBNs, hexadecimal) is left as it is; so are addresses of
networks that are not public.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Iterator

from gptjax.curation.documents import Document, Drop
from gptjax.errors import InputError

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-]+(?:\.[A-Za-z0-9_%+-]+)*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}(?![\w@])"
)
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w|-\w)")
_VERSION = re.compile(
    r"(?i)(?:\bv(?:er(?:sion|\.)?)?|release[sd]?|build|rev(?:ision|\.)?|sections?|§|chapter|clause|table)[\s:=(]*$"
)
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_CARD = re.compile(
    r"(?<![\w.+/-])(?:\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{1,7}|3\d{3}[ -]\d{6}[ -]\d{5}|\d{13,19})(?!\w|[.-]\d)"
)
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d{2}|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}"
)  # Visa, Mastercard, American Express, Discover, Diners Club, JCB
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_SSN = re.compile(r"(?<![\w.-])\d{3}-\d{2}-\d{4}(?!\w|[.-]\d)")
_LINE = re.compile(r"[^\n]+")
_SEVEN_DIGITS = re.compile(r"(?:\d\D{0,3}){7}")  # phonenumbers is slow: other lines are passed over


def _emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" in text:
        yield from (match.span() for match in _EMAIL.finditer(text))


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV4.finditer(text):
        if _public(match[0]) and not _VERSION.search(text, max(match.start() - 24, 0), match.start()):
            yield match.span()
    for match in _IPV6.finditer(text):
        if _public(match[0]):
            yield match.span()


def _public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _cards(text: str) -> Iterator[tuple[int, int]]:
    from stdnum import luhn

    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _ISSUERS.fullmatch(digits) and luhn.is_valid(digits):
            yield match.span()


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    from stdnum import iban

    for match in _IBAN.finditer(text):
        found = match[0]
        while len(found) >= 15:  # a word in capitals after it looks like its continuation
            if iban.is_valid(found):
                yield match.start(), match.start() + len(found)
                break
            found = found[: found.rfind(" ")] if " " in found else ""


def _social_security(text: str) -> Iterator[tuple[int, int]]:
    from stdnum.us import ssn

    for match in _SSN.finditer(text):
        if ssn.is_valid(match[0]):
            yield match.span()


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    import phonenumbers

    for line in _LINE.finditer(text):
        for region in regions if _SEVEN_DIGITS.search(line[0]) else ():
            for match in phonenumbers.PhoneNumberMatcher(line[0], region, phonenumbers.Leniency.STRICT_GROUPING):
                raw = match.raw_string
                if raw.startswith("+") or (not raw.isdigit() and re.search(r"\d[ ().-]+\d", raw)):
                    yield line.start() + match.start, line.start() + match.end


@dataclasses.dataclass(frozen=True)
class Personal:
    """regions: countries (ISO 3166) whose national phone numbers are looked for, as ('US', 'GB'); numbers that begin
    with + are found everywhere. most: a document with more places than this is dropped, as Dolma does above 5; None =
    none is."""

    regions: tuple[str, ...] = ("US",)
    most: int | None = None
    name = "personal"

    def check(self) -> None:
        """InputError: the packages that know numbers are not installed."""
        try:
            import phonenumbers  # noqa: F401
            import stdnum  # noqa: F401
        except ImportError as error:
            raise InputError(f"{error}: personal data needs packages, `pip install 'gptjax[curate]'`.") from None

    def __call__(self, document: Document) -> Document | Drop:
        text, counts = redacted(document.text, self.regions)
        if self.most is not None and sum(counts.values()) > self.most:
            return Drop("personal_data", sum(counts.values()))
        document.text = text
        document.edits |= counts
        return document


def redacted(text: str, regions: tuple[str, ...] = ("US",)) -> tuple[str, dict[str, int]]:
    """(the text with placeholders |||KIND||| in place of personal data, {kind: how many})."""
    kinds: tuple[tuple[str, Callable], ...] = (
        ("EMAIL_ADDRESS", _emails), ("IBAN", _ibans), ("CREDIT_CARD", _cards), ("US_SSN", _social_security),
        ("IP_ADDRESS", _addresses), ("PHONE_NUMBER", lambda text: _phones(text, regions)),
    )  # fmt: skip
    counts = {}
    for kind, find in kinds:
        pieces, end, number = [], 0, 0
        for begin, stop in sorted(find(text)):
            if begin >= end:  # of two that overlap the first
                pieces += [text[end:begin], f"|||{kind}|||"]
                end, number = stop, number + 1
        if number:
            text, counts[kind] = "".join([*pieces, text[end:]]), number
    return text, counts
