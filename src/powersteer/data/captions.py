"""Which captions a base's text encoders cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

PLACEHOLDER = 1_000_000
"""From here on, a tokenizer's greatest length is no length: transformers writes 10³⁰ where there is none."""
_BATCH = 1000


def token_limit(tokenizers: Sequence[Any]) -> int | None:
    """The tokens, with begin and end, that the shortest of the text encoders reads; None where none has a limit."""
    limits = [one.model_max_length for one in tokenizers if one is not None]
    return min((limit for limit in limits if limit < PLACEHOLDER), default=None)


def cut_captions(tokenizers: Sequence[Any], captions: Iterable[str]) -> list[tuple[str, int]]:
    """The captions that are too long, each once: (caption, its tokens with begin and end), in the order given.

    Args:
        tokenizers: The base's; None, for an encoder that is not there, is passed over.
        captions: Whichever, as often as they come.
    """
    limit = token_limit(tokenizers)
    if limit is None:
        return []
    distinct = list(dict.fromkeys(captions))
    counts: dict[str, int] = {}
    for tokenizer in (one for one in tokenizers if one is not None):
        spare = limit - len(tokenizer("").input_ids) - 1
        # Of plain letters, a token is one or more: most captions need not be looked at closely.
        doubtful = [text for text in distinct if not (text.isascii() and len(text) <= spare)]
        for start in range(0, len(doubtful), _BATCH):
            part = doubtful[start : start + _BATCH]
            # verbose: the tokenizer would log that a text is too long; that is what is asked here.
            for text, ids in zip(part, tokenizer(part, verbose=False).input_ids, strict=True):
                counts[text] = max(counts.get(text, 0), len(ids))
    return [(text, counts[text]) for text in distinct if counts.get(text, 0) > limit]
