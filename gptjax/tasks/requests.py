"""What is scored: a continuation, given a context, as token ids. The rules of framing, splitting and truncation are
lm-evaluation-harness 0.4.13's, so that its numbers are ours (`encode_pair`, `rolling_windows`)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError


class Request(NamedTuple):
    """log p(continuation | context) is asked for; both are token ids, neither is empty.

    spanned: a token crossed the border between context and continuation, so the two were encoded apart."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    spanned: bool = False


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The request for a continuation of a context.

    Spaces at the end of the context are moved to the continuation, since tokens begin with their space. The
    continuation's tokens are those that context + continuation has beyond the context's own; where a token spans both,
    so that nothing would be left, the two are encoded apart. An empty context is the prefix token (`prefix_token`).
    InputError: an empty continuation.
    """
    if not continuation:
        raise InputError("The continuation to score is empty: every choice and answer needs text.")
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    if not context:
        return prefixed(tokenizer, tokenizer.encode(continuation))
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    bos = (tokenizer.bos_id,) if tokenizer.specials.adds_bos else ()
    after = whole[len(before) :]
    if after:
        return Request((*bos, *whole[: len(before)]), tuple(after))
    return Request((*bos, *before), tuple(tokenizer.encode(continuation)), spanned=True)


def prefixed(tokenizer: Tokenizer, ids: Sequence[int]) -> Request:
    """A request without context: it is scored after the prefix token, or after its own first token if it begins with
    that one."""
    prefix = prefix_token(tokenizer)
    if len(ids) > 1 and ids[0] == prefix:
        return Request((prefix,), tuple(ids[1:]))
    return Request((prefix,), tuple(ids))


def prefix_token(tokenizer: Tokenizer) -> int:
    """What an empty context is scored after: beginning-of-text if the tokenizer has one, else end-of-text, as GPT-2.
    InputError: it has neither."""
    if tokenizer.bos_id is None:
        raise InputError(
            "The tokenizer has no end-of-text or beginning-of-text, so nothing can be scored without a context."
        )
    return tokenizer.bos_id


def rolling_windows(prefix: int, ids: Sequence[int], context_length: int) -> Iterator[Request]:
    """The text as requests of at most context_length scored tokens, each token scored once.

    The first window begins with the prefix token, later ones with the last token before them; the last one is moved
    back to have a full context. lm-evaluation-harness: get_rolling_token_windows with context_len=1, disjoint.
    """
    if ids and len(ids) <= context_length:
        yield Request((prefix,), tuple(ids))
        return
    for start in range(0, len(ids), context_length):
        end = min(start + context_length, len(ids))
        first = max(end - context_length, 1) - 1 if start else 0
        context = (prefix,) if start == 0 else tuple(ids[first:start])
        yield Request(context, tuple(ids[start:end]))


def truncated(request: Request, context_length: int) -> tuple[Request, bool]:
    """(The request with at most context_length + 1 tokens, whether any were cut): from the left, as
    lm-evaluation-harness does. The last token is predicted, not read. A continuation that alone is longer keeps its
    last tokens, after one of its own."""
    excess = len(request.context) + len(request.continuation) - (context_length + 1)
    if excess <= 0:
        return request, False
    ids = (*request.context, *request.continuation)[excess:]
    n = min(len(request.continuation), context_length)
    return Request(ids[:-n], ids[-n:], request.spanned), True
