"""Greedy continuations of held-out passages: what multiple choice and perplexity do not show."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from lftpipe.base import progress
from lftpipe.base.errors import SettingsError
from lftpipe.results.scores import Comparison, Continuations
from lftpipe.store import Store

#: Tokens of a passage that are shown, and then written.
SHOWN, WRITTEN = 64, 64

#: Of the exact match: so many first tokens.
FIRST = 4

#: Passages that are continued together.
TOGETHER = 8

Tokens = list[int]


class Continuing:
    """Continues the same passages with every model; the first model is the teacher."""

    def __init__(self, store: Store, tokenizer: Any, count: int) -> None:
        self._tokenizer, self._passages = tokenizer, list(passages(store, count))
        if not self._passages:
            raise SettingsError(
                f"--continuations with validation documents shorter than {SHOWN + WRITTEN} tokens",
                "one that is as long within a sequence",
                "extract with longer documents or another --context, or leave it out",
            )
        self._teacher: list[Tokens] | None = None

    def columns(self, label: str, identity: Any, model: Callable[[], Any]) -> dict[str, Continuations]:
        """What a model's continuations are like, beside the text's own and the teacher's."""
        del identity
        texts = self._written(label, model())
        self._teacher = self._teacher or texts
        own = [passage[SHOWN:] for passage in self._passages]
        return {
            "continuations": Continuations(
                passages=len(texts),
                exact=fmean(text[:FIRST] == true[:FIRST] for text, true in zip(texts, own, strict=True)),
                as_teacher=fmean(common(*pair) for pair in zip(texts, self._teacher, strict=True)),
                distinct_2=fmean(map(distinct_2, texts)),
                repetition=fmean(map(repetition, texts)),
            )
        }

    def comparisons(self) -> list[Comparison]:
        """None: nobody is said to be ahead by its continuations."""
        return []

    @torch.inference_mode()
    def _written(self, label: str, model: Any) -> list[Tokens]:
        end, texts = self._tokenizer.eos_token_id, []
        with progress.task(f"{label} continues", len(self._passages), "passages") as task:
            for first in range(0, len(self._passages), TOGETHER):
                some = self._passages[first : first + TOGETHER]
                shown = torch.tensor([passage[:SHOWN] for passage in some], device=model.device)
                found = model.generate(
                    input_ids=shown,
                    attention_mask=torch.ones_like(shown),
                    max_new_tokens=WRITTEN,
                    do_sample=False,
                    pad_token_id=end,
                    eos_token_id=end,
                )
                texts += [_until(end, row) for row in found[:, SHOWN:].tolist()]
                task.advance(len(some))
        return texts


def passages(store: Store, count: int) -> Iterator[Tokens]:
    """The beginnings of so many segments of the validation split that are long enough, one a sequence."""
    length, found = SHOWN + WRITTEN, 0
    for row in range(store.num_sequences("validation")):
        if found == count:
            return
        document, tokens = store.document("validation", [row])[0], store.tokens("validation", [row])[0]
        starts = [0, *(place + 1 for place, pair in enumerate(pairwise(document)) if pair[0] != pair[1])]
        for start, stop in zip(starts, [*starts[1:], len(document)], strict=True):
            if stop - start >= length:
                found += 1
                yield tokens[start : start + length].tolist()
                break


def common(one: Tokens, other: Tokens) -> int:
    """How many first tokens are equal."""
    length = min(len(one), len(other))
    return next((place for place in range(length) if one[place] != other[place]), length)


def distinct_2(text: Tokens) -> float:
    """Different pairs of neighbours over all pairs; 1 of a text without a pair."""
    pairs = list(pairwise(text))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def repetition(text: Tokens) -> float:
    """Fraction of runs of four tokens that were there before in the same text."""
    runs = list(zip(text, text[1:], text[2:], text[3:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _until(end: int, text: Tokens) -> Tokens:
    return text[: text.index(end)] if end in text else text
