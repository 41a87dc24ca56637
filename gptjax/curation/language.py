"""Language identification offline: py3langid, whose model of 97 languages comes with the package."""

from __future__ import annotations

import dataclasses
import functools

from gptjax.curation.documents import Document, Drop
from gptjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Language:
    """Keeps documents in one of some languages (ISO 639-1) with at least a probability, FineWeb's .65. characters: of
    the beginning that are looked at."""

    languages: tuple[str, ...] = ("en",)
    least: float = 0.65
    characters: int = 4_000
    name = "language"

    def check(self) -> None:
        """InputError: the package is not installed."""
        _identifier()

    def __call__(self, document: Document) -> Document | Drop:
        language, probability = _identifier().classify(document.text[: self.characters])
        document.scores["language"] = round(float(probability), 4)
        document.fields.setdefault("language", language)
        if language not in self.languages:
            return Drop("language", float(probability), detail=language)
        return document if probability >= self.least else Drop("uncertain", float(probability))


@functools.cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise InputError("Languages are told apart by a package: run `pip install 'gptjax[curate]'`.") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
