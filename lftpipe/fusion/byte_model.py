"""A language model of tokens, read as a model of bytes.

With `kappa` the bytes of a token sequence, a text that begins with `b` is spelled by a *cover*: a trunk of
whole tokens, and a last token that begins with the rest of `b` behind the trunk (docs/fusion.md,
the mathematics):

    P(b)   = sum over t with kappa(t) = b of p(t, end)
    P>(b)  = sum over minimal covers t of b of p(t)

`canonical` takes one trunk for each byte: the tokens that the tokenizer itself makes of the bytes before. It
is a lower bound, off by what the model gives to spellings that no tokenizer makes. `all` takes every trunk:
exact, and exponential. `main` takes the text's own spelling, as GFD's authors do.
"""

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from transformers import DynamicCache, PreTrainedModel

from lftpipe.base.errors import SettingsError
from lftpipe.fusion.vocabulary import Vocabulary

Spellings = Literal["canonical", "main", "all"]
Trunk = tuple[int, ...]

#: The place of the end of a text among next bytes.
END = 256

#: Trunks of `spellings="all"`: more are refused.
_MOST_TRUNKS = 20_000

#: Trunks whose caches and probabilities are kept.
_KEPT = 384

#: Trunks evaluated in one forward pass.
_ROWS = 32


class Head(NamedTuple):
    """A trunk, and the rest of the text that its next token begins with."""

    trunk: Trunk
    rest: bytes


class Bounds(NamedTuple):
    """Natural log-probabilities between which the exact sum over the trunks is."""

    lower: float
    upper: float


@dataclass
class _Evaluated:
    """A trunk that the model has seen.

    `log_p`: of its tokens, given those with which every text begins.
    `following`: natural log-probabilities of the next token, by id.
    `past`: keys and values of each layer, or None for models whose cache is not made of them.
    """

    log_p: float
    following: Float[np.ndarray, " vocabulary"]
    past: list[tuple[torch.Tensor, torch.Tensor]] | None = field(repr=False)


#: A sum over covers, step by step: it yields trunks that must be evaluated before it goes on.
Summing = Generator[Sequence[Trunk], None, Bounds]


class ByteModel:
    """Exact next-byte probabilities of a causal language model.

    Raises `SettingsError` if the tokenizer loses bytes, or the prompt is longer than the model's positions.

    Parameters
    ----------
    model
        A causal language model of transformers, such as a student.
    tokenizer
        Its fast tokenizer: byte-level BPE, or SentencePiece BPE with byte fallback.
    spellings
        Which spellings of a text count: `canonical`, `main`, or `all` of them (short texts only).
    tolerance
        A trunk is evaluated only if its bound is more than this fraction of the sum so far. What is
        left out is in the upper bound of `bounds`. 0 evaluates all.
    prompt
        What was written before. Where it is cut makes no difference.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        spellings: Spellings = "canonical",
        tolerance: float = 0.0,
        prompt: str = "",
    ) -> None:
        if not 0 <= tolerance < 1:
            raise SettingsError(f"tolerance {tolerance:g}", "0 up to less than 1", "choose such a number")
        self.vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary(tokenizer)
        self.model, self.spellings, self.tolerance = model.eval(), spellings, tolerance
        self.evaluations = 0
        self.calls = 0
        self.most_positions = getattr(model.config, "max_position_embeddings", None) or 2**20
        self._seen: dict[Trunk, _Evaluated] = {}
        self._begin = self.vocabulary.before + prompt.encode()
        self._prompt = self._sum(self._begin).lower

    def with_prompt(self, prompt: str) -> "ByteModel":
        """The same model behind another prompt; what was evaluated is shared."""
        other = object.__new__(ByteModel)
        other.__dict__ |= self.__dict__
        other._begin = self.vocabulary.before + prompt.encode()
        other._prompt = other._sum(other._begin).lower
        return other

    def log_prob(self, text: bytes) -> float:
        """Natural log-probability of a text and its end, behind the prompt."""
        whole = self._begin + text
        ends = [
            self._evaluate([trunk])[0].log_p + self._end_of(self._evaluate([trunk])[0].following)
            for trunk in self._trunks_of(whole)
        ]
        return _log_sum(ends) - self._prompt

    def prefix(self, text: bytes) -> float:
        """Natural log-probability of all texts that begin so, behind the prompt."""
        return self.bounds(text).lower

    def bounds(self, text: bytes) -> Bounds:
        """What `prefix` is at least and at most, given the trunks that were not evaluated."""
        lower, upper = self._sum(self._begin + text)
        return Bounds(lower - self._prompt, upper - self._prompt)

    def prefixes(self, texts: Sequence[bytes]) -> list[float]:
        """`prefix` of several texts, their trunks evaluated together."""
        sums = self._together([self._summing(self._begin + text) for text in texts])
        return [each.lower - self._prompt for each in sums]

    def next_bytes(self, text: bytes) -> Float[np.ndarray, "257"]:
        """Natural log-probabilities of the byte behind a text, the end of the text last; they sum to 1."""
        log_p = self._following(self._begin + text)
        return log_p - _log_sum(log_p)

    def leak(self, text: bytes) -> float:
        """The probability that canonical spellings lose at this byte, as a fraction of the text's own."""
        whole = self._begin + text
        return -math.expm1(_log_sum(self._following(whole)) - self._sum(whole).lower)

    def _following(self, whole: bytes) -> Float[np.ndarray, "257"]:
        """Of the text with each next byte, and of the text as a whole."""
        found = np.full(257, -np.inf)
        heads = [*self._heads(whole), *(Head(trunk, b"") for trunk in self._trunks_of(whole))]
        for head, seen in zip(heads, self._evaluate([head.trunk for head in heads]), strict=True):
            values, starts = self.vocabulary.split(head.rest)
            if len(values):
                stop = self.vocabulary.range_of(head.rest)[1]
                log_p = seen.following[self.vocabulary.ids[starts[0] : stop]]
                top = log_p.max()
                if top > -np.inf:
                    sums = np.add.reduceat(np.exp(log_p - top), starts - starts[0])
                    with np.errstate(divide="ignore"):
                        found[values] = np.logaddexp(found[values], np.log(sums) + top + seen.log_p)
            if not head.rest:
                found[END] = np.logaddexp(found[END], seen.log_p + self._end_of(seen.following))
        return found

    def _sum(self, whole: bytes) -> Bounds:
        return self._together([self._summing(whole)])[0]

    def _together(self, sums: Sequence[Summing]) -> list[Bounds]:
        """The results of several sums; the trunks that they wait for at the same time are one batch."""
        found: list[Bounds | None] = [None] * len(sums)
        waiting = {number: next(each, None) or [] for number, each in enumerate(sums)}
        while waiting:
            self._evaluate([trunk for trunks in waiting.values() for trunk in trunks])
            for number in list(waiting):
                try:
                    waiting[number] = next(sums[number])
                except StopIteration as done:
                    found[number] = done.value
                    del waiting[number]
        return [each for each in found if each is not None]

    def _summing(self, whole: bytes) -> Summing:
        """Of all covers; the largest trunks first, so that small ones may sleep. Yields what it must know."""
        yield []
        if not whole:
            return Bounds(0.0, 0.0)
        heads = self._heads(whole)
        trunks = [head.trunk for head in heads]
        asleep = [0.0] * len(heads)
        if self.tolerance:
            yield [trunk[:-1] for trunk in trunks if trunk and trunk not in self._seen]
            bounds = {trunk: self._bound(trunk) for trunk in trunks}
            heads.sort(key=lambda head: -bounds[head.trunk])
            asleep = [bounds[head.trunk] for head in heads]
        else:
            yield trunks
        lower = -math.inf
        for at, head in enumerate(heads):
            if self.tolerance:
                rest = _log_sum(asleep[at:])
                if rest < lower + math.log(self.tolerance):
                    return Bounds(lower, float(np.logaddexp(lower, rest)))
                if head.trunk not in self._seen:
                    yield [head.trunk]
            seen = self._seen_or_evaluated(head.trunk)
            low, high = self.vocabulary.range_of(head.rest)
            if self.spellings == "main":  # of what is spelled out, the text's own spelling alone
                low += len(self.vocabulary.equal(head.rest))
            mass = _log_sum(seen.following[self.vocabulary.ids[low:high]])
            lower = float(np.logaddexp(lower, seen.log_p + mass))
        if self.spellings == "main":
            canonical = self.vocabulary.canonical(whole)
            yield [canonical]
            lower = float(np.logaddexp(lower, self._seen_or_evaluated(canonical).log_p))
        return Bounds(lower, lower)

    def _seen_or_evaluated(self, trunk: Trunk) -> _Evaluated:
        """What is known of a trunk; it may have been forgotten since it was asked for."""
        return self._seen[trunk] if trunk in self._seen else self._evaluate([trunk])[0]

    def _bound(self, trunk: Trunk) -> float:
        """What a trunk's own probability is: known from the trunk before it, without evaluating this one."""
        if not trunk:
            return 0.0
        if trunk in self._seen:
            return self._seen[trunk].log_p
        before = self._seen_or_evaluated(trunk[:-1])
        return before.log_p + float(before.following[trunk[-1]])

    def _heads(self, whole: bytes) -> list[Head]:
        """The trunks of a text, each with a rest that some token begins with."""
        heads = []
        for at in range(max(0, len(whole) - self.vocabulary.longest), len(whole)):
            low, high = self.vocabulary.range_of(whole[at:])
            if low < high:
                heads += [Head(trunk, whole[at:]) for trunk in self._trunks_of(whole[:at], whole)]
        return heads

    def _trunks_of(self, part: bytes, whole: bytes | None = None) -> Iterable[Trunk]:
        """Token sequences whose bytes are `part`, those of this model's spellings of `whole`."""
        if self.spellings == "all":
            return self._all_spellings(part)
        if self.spellings == "canonical" or whole is None:
            return [self.vocabulary.canonical(part)]
        trunk: list[int] = []
        length = 0
        for id_ in self.vocabulary.canonical(whole):  # the text's own spelling, as far as it ends here
            if length >= len(part):
                break
            trunk.append(id_)
            length += len(self.vocabulary.text_of([id_]))
        return [tuple(trunk)] if length == len(part) else []

    def _all_spellings(self, part: bytes) -> list[Trunk]:
        spellings: list[list[Trunk]] = [[()]]
        for stop in range(1, len(part) + 1):
            here = [
                (*trunk, id_)
                for start in range(max(0, stop - self.vocabulary.longest), stop)
                for id_ in self.vocabulary.equal(part[start:stop])
                for trunk in spellings[start]
            ]
            if len(here) > _MOST_TRUNKS:
                raise SettingsError(
                    f"{len(here)} spellings of a text of {stop} bytes",
                    f"at most {_MOST_TRUNKS}",
                    "take spellings='canonical'",
                )
            spellings.append(here)
        return spellings[len(part)]

    def _end_of(self, following: Float[np.ndarray, " vocabulary"]) -> float:
        return _log_sum(following[list(self.vocabulary.end)])

    # --- Evaluation: trunks by the model, from the caches of the trunks that they grow from.

    def _evaluate(self, trunks: Sequence[Trunk]) -> list[_Evaluated]:
        todo = [trunk for trunk in dict.fromkeys(trunks) if trunk not in self._seen]
        for first in range(0, len(todo), _ROWS):
            self._evaluate_rows(todo[first : first + _ROWS])
        found = [self._seen[trunk] for trunk in trunks]
        for trunk in trunks:
            self._seen[trunk] = self._seen.pop(trunk)  # the latest used last
        while len(self._seen) > max(_KEPT, len(trunks)):
            del self._seen[next(iter(self._seen))]
        return found

    def _evaluate_rows(self, trunks: Sequence[Trunk]) -> None:
        """One forward pass: a row for each trunk, behind what is known of it, padded at the left."""
        begin = self.vocabulary.begin
        known = [self._longest_seen(trunk) for trunk in trunks]
        pasts = [self._seen[each].past if each is not None else None for each in known]
        fresh = [
            [*begin, *trunk] if before is None or past is None else list(trunk[len(before) :])
            for trunk, before, past in zip(trunks, known, pasts, strict=True)
        ]
        lengths = [len(begin) + len(trunk) for trunk in trunks]
        if max(lengths) > self.most_positions:
            raise SettingsError(
                f"prompt and text of {max(lengths)} tokens",
                f"at most {self.most_positions}",
                "shorten the prompt",
            )
        device = self.model.device
        width = max(map(len, fresh))
        cached = [0 if past is None else past[0][0].shape[2] for past in pasts]
        before = max(cached)
        ids = torch.full((len(trunks), width), begin[0], device=device)
        mask = torch.zeros((len(trunks), before + width), dtype=torch.long, device=device)
        positions = torch.zeros((len(trunks), width), dtype=torch.long, device=device)
        for row, new in enumerate(fresh):
            ids[row, : len(new)] = torch.tensor(new, device=device)
            mask[row, before - cached[row] : before + len(new)] = 1
            positions[row, : len(new)] = torch.arange(cached[row], cached[row] + len(new), device=device)
        cache = _joined(pasts, before) if before else DynamicCache()
        with torch.inference_mode():
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            log_p = out.logits.double().log_softmax(-1).cpu().numpy()
        self.calls += 1
        self.evaluations += len(trunks)
        for row, (trunk, new) in enumerate(zip(trunks, fresh, strict=True)):
            start = known[row] if pasts[row] is not None else None
            own = 0.0 if start is None else self._seen[start].log_p
            if start is None:
                scored = [(at, id_) for at, id_ in enumerate(new[len(begin) :], start=len(begin) - 1)]
            else:
                own += float(self._seen[start].following[new[0]])
                scored = list(enumerate(new[1:]))
            own += sum(float(log_p[row, at, id_]) for at, id_ in scored)
            past = _row(out.past_key_values, row, before - cached[row], before + len(new))
            self._seen[trunk] = _Evaluated(own, log_p[row, len(new) - 1].copy(), past)

    def _longest_seen(self, trunk: Trunk) -> Trunk | None:
        for stop in range(len(trunk) - 1, -1, -1):
            if trunk[:stop] in self._seen:
                return trunk[:stop]
        return None


def _joined(pasts: Sequence[Any], length: int) -> DynamicCache:
    """The keys and values of several trunks in one cache, padded at the left."""
    some = next(past for past in pasts if past is not None)
    layers = []
    for number, (keys, values) in enumerate(some):
        rows = []
        for kind, like in enumerate((keys, values)):
            parts = []
            for past in pasts:
                part = like[:, :, :0] if past is None else past[number][kind]
                empty = part.new_zeros((1, part.shape[1], length - part.shape[2], part.shape[3]))
                parts.append(torch.cat([empty, part], dim=2))
            rows.append(torch.cat(parts))
        layers.append(tuple(rows))
    return DynamicCache(layers)


def _row(cache: Any, row: int, start: int, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """One trunk's keys and values; None where a cache holds something else, such as a recurrent state."""
    layers = getattr(cache, "layers", [])
    kept = []
    for layer in layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.dim() != 4 or keys.shape[2] < stop:
            return None
        kept.append(
            (keys[row : row + 1, :, start:stop].clone(), values[row : row + 1, :, start:stop].clone())
        )
    return kept or None


def _log_sum(values: Any) -> float:
    """Natural log of the sum of exponentials; of nothing, minus infinity."""
    array = np.asarray(values, dtype=np.float64)
    top = array.max(initial=-np.inf)
    return float(top + np.log(np.exp(array - top).sum())) if top > -np.inf else -math.inf
