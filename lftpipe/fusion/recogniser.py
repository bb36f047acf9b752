"""Recognisers as autoregressive models of units: what a beam search asks of them.

A CTC recogniser is one too: with `psi(g)` the probability of all alignments whose labels begin with `g`,

    P(c | g) = psi(g c) / psi(g),    P(end | g) = P_ctc(g) / psi(g),    which sum to 1

(the prefix probabilities of Graves 2012, chapter 7).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from lftpipe.base.errors import SettingsError
from lftpipe.fusion.vocabulary import Vocabulary


@runtime_checkable
class Recogniser(Protocol):
    """One recording, image or other input, read unit by unit."""

    units: Sequence[bytes]
    """The bytes of each unit."""

    def start(self) -> Any:
        """The state before the first unit."""
        ...

    def next(self, states: Sequence[Any]) -> Float[np.ndarray, "state unit_or_end"]:
        """Natural log-probabilities of each unit, and last of the end, behind several states."""
        ...

    def extend(self, state: Any, unit: int) -> Any:
        """The state behind one more unit."""
        ...


class _Labels(NamedTuple):
    """A prefix of labels: by frame, the log-probability to have read it, that frame a label or a blank."""

    labels: tuple[int, ...]
    by_label: Float[np.ndarray, " frame"]
    by_blank: Float[np.ndarray, " frame"]
    log_psi: float


class CtcRecogniser:
    """Posteriors of a CTC recogniser.

    `log_posteriors`: natural log-probabilities of each label at each frame.
    `labels`: the text of each label; that of the blank is "".
    Raises `SettingsError` if they do not fit each other, or are no log-probabilities.
    """

    def __init__(self, log_posteriors: Float[np.ndarray, "frame label"], labels: Sequence[str]) -> None:
        check_posteriors(log_posteriors, labels)
        self._blank = list(labels).index("")
        self._kept = [at for at in range(len(labels)) if at != self._blank]
        self.units: Sequence[bytes] = [labels[at].encode() for at in self._kept]
        posteriors = log_posteriors.astype(np.float64)
        posteriors -= np.logaddexp.reduce(posteriors, axis=1, keepdims=True)  # float16's rounding
        self._log_p, self._log_blank = posteriors[:, self._kept], posteriors[:, self._blank]
        self._p, self._possible = np.exp(self._log_p), (self._log_p > -np.inf).any(axis=0)

    def start(self) -> _Labels:
        """Nothing was read: every frame so far is a blank."""
        frames = len(self._log_blank)
        return _Labels((), np.full(frames, -np.inf), np.cumsum(self._log_blank), 0.0)

    def _entries(self, state: _Labels) -> tuple[Float[np.ndarray, " frame"], Float[np.ndarray, " frame"]]:
        """By frame, the log-probability to have read `state` before: for another label, for its last one."""
        first = 0.0 if not state.labels else -np.inf
        blank = np.concatenate([[first], state.by_blank[:-1]])
        label = np.concatenate([[-np.inf], state.by_label[:-1]])
        return np.logaddexp(blank, label), blank

    def next(self, states: Sequence[_Labels]) -> Float[np.ndarray, "state unit_or_end"]:
        """Of each label behind each prefix, and of the end."""
        entries, repeats = zip(*(self._entries(state) for state in states), strict=True)
        rows = self._summed(np.stack(entries))
        for row, state, repeated in zip(rows, states, repeats, strict=True):
            if state.labels:
                last = state.labels[-1]
                row[last] = np.logaddexp.reduce(repeated + self._log_p[:, last])
            row[-1] = np.logaddexp(state.by_label[-1], state.by_blank[-1])
            row -= state.log_psi
        return rows

    def _summed(self, entries: Float[np.ndarray, "state frame"]) -> Float[np.ndarray, "state unit_or_end"]:
        """Of each label, the sum over the frames at which it may be read, as one product; no end yet."""
        most = entries.max(axis=1, keepdims=True)
        most[most == -np.inf] = 0.0
        sums = np.exp(entries - most) @ self._p
        with np.errstate(divide="ignore"):
            found = np.log(sums) + most
        small = (sums < np.finfo(float).tiny) & self._possible  # for a product
        for row, column in np.argwhere(small):
            found[row, column] = np.logaddexp.reduce(entries[row] + self._log_p[:, column])
        return np.pad(found, ((0, 0), (0, 1)))

    def extend(self, state: _Labels, unit: int) -> _Labels:
        """The prefix with one more label."""
        entry, repeated = self._entries(state)
        if state.labels and state.labels[-1] == unit:
            entry = repeated
        log_p = self._log_p[:, unit]
        by_label, by_blank = np.empty_like(log_p), np.empty_like(log_p)
        label = blank = -np.inf
        for frame in range(len(log_p)):
            blank = np.logaddexp(blank, label) + self._log_blank[frame]
            label = np.logaddexp(entry[frame], label) + log_p[frame]
            by_label[frame], by_blank[frame] = label, blank
        return _Labels((*state.labels, unit), by_label, by_blank, float(np.logaddexp.reduce(entry + log_p)))


def check_posteriors(log_posteriors: np.ndarray, labels: Sequence[str]) -> None:
    """Refuse what no CTC recogniser can have said."""
    problem = None
    if log_posteriors.ndim != 2 or not len(log_posteriors) or log_posteriors.shape[1] != len(labels):
        problem = f"{log_posteriors.shape} posteriors for {len(labels)} labels"
    elif list(labels).count("") != 1:
        problem = f"{list(labels).count('')} blanks among the labels"
    elif len(set(labels)) < len(labels):
        problem = f"the label {next(each for each in labels if list(labels).count(each) > 1)!r} twice"
    elif np.isnan(log_posteriors).any():
        problem = "posteriors with NaN"
    else:
        sums = np.logaddexp.reduce(log_posteriors.astype(np.float64), axis=1)
        if np.abs(sums).max() > 0.05:
            problem = f"posteriors whose probabilities sum to {np.exp(sums[np.abs(sums).argmax()]):.3g}"
    if problem:
        raise SettingsError(
            problem, "natural log-probabilities, frames by labels, the blank named ''", "write them so"
        )


class _Spoken(NamedTuple):
    """A prefix of tokens, the decoder's keys and values, and what comes next."""

    tokens: tuple[int, ...]
    log_p: Float[np.ndarray, " token"]
    past: list[tuple[Tensor, Tensor]]


class Seq2SeqRecogniser:
    """The decoder of a speech recogniser such as Whisper, behind an encoder that ran once.

    Parameters
    ----------
    model
        An encoder-decoder of transformers.
    tokenizer
        Its fast tokenizer.
    states
        The encoder's states of one input.
    begin
        Token ids that begin every text: language, task, no time stamps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        states: Float[Tensor, "frame feature"],
        begin: Sequence[int],
    ) -> None:
        self.vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary(tokenizer)
        self.units: Sequence[bytes] = self.vocabulary.tokens
        self._model = model.eval()
        self._encoded = BaseModelOutput(states[None].to(model.device, model.dtype))
        self._begin = tuple(begin)
        suppressed = getattr(model.generation_config, "suppress_tokens", None) or ()
        first = getattr(model.generation_config, "begin_suppress_tokens", None) or ()
        self._suppressed, self._first = list(suppressed), list(first)

    def start(self) -> _Spoken:
        """Behind the tokens that begin every text."""
        return self._step((), [], self._begin)

    def next(self, states: Sequence[_Spoken]) -> Float[np.ndarray, "state unit_or_end"]:
        """Of each token behind each prefix, and of the end."""
        ids, end = self.vocabulary.ids, list(self.vocabulary.end)
        return np.stack(
            [np.append(state.log_p[ids], np.logaddexp.reduce(state.log_p[end])) for state in states]
        )

    def extend(self, state: _Spoken, unit: int) -> _Spoken:
        """Decode one more token."""
        id_ = int(self.vocabulary.ids[unit])
        return self._step((*state.tokens, id_), state.past, (id_,))

    def _step(self, tokens: tuple[int, ...], past: Any, new: Sequence[int]) -> _Spoken:
        cache = EncoderDecoderCache(DynamicCache(past or None), DynamicCache())
        length = past[0][0].shape[2] if past else 0
        device = self._model.device
        with torch.inference_mode():
            out = self._model(
                encoder_outputs=self._encoded,
                decoder_input_ids=torch.tensor([list(new)], device=device),
                decoder_position_ids=torch.arange(length, length + len(new), device=device)[None],
                past_key_values=cache,
                use_cache=True,
            )
        logits = out.logits[0, -1].double()
        logits[self._suppressed + ([] if tokens else self._first)] = -torch.inf
        kept = [(layer.keys, layer.values) for layer in out.past_key_values.self_attention_cache.layers]
        return _Spoken(tokens, logits.log_softmax(-1).cpu().numpy(), kept)
