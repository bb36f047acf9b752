"""Fusion inside `model.generate` of transformers: a logits processor for recognisers such as Whisper."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from lftpipe.base.errors import SettingsError
from lftpipe.fusion.byte_model import ByteModel
from lftpipe.fusion.vocabulary import Vocabulary


class FusionLogitsProcessor(LogitsProcessor):
    """Correct a recogniser's tokens by a language model with another tokenizer, step by step.

    To `1 - weight` times the recogniser's log-probabilities this adds `weight`
    times `log P>(b v) - log P>(b)`, with `b` the bytes so far and `v` those of the next token. Over all steps
    that sums up to the exact fused score (arXiv 2405.14259, with no delay).

    Raises `SettingsError` if the weight is out of range, or a tokenizer loses bytes.

    Parameters
    ----------
    model, tokenizer
        The language model, such as a student, and its tokenizer.
    recogniser_tokenizer
        That of the model which generates.
    weight
        Between 0, the recogniser alone, and 1.
    prompt
        What the language model is to have read before.
    candidates
        The recogniser's tokens of each beam, the most probable first, that are scored; no other is taken.
    tolerance
        As of `ByteModel`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        recogniser_tokenizer: Any,
        *,
        weight: float = 0.2,
        prompt: str = "",
        candidates: int = 20,
        tolerance: float = 1e-2,
    ) -> None:
        if not 0 <= weight <= 1:
            raise SettingsError(
                f"weight {weight:g}", "from 0, the recogniser alone, to 1", "choose such a weight"
            )
        if candidates < 1:
            raise SettingsError(f"{candidates} candidates", "at least one", "raise them")
        self.weight, self.candidates = weight, candidates
        self.spoken = Vocabulary(recogniser_tokenizer)
        self.language = ByteModel(model, tokenizer, tolerance=tolerance, prompt=prompt)

    def __call__(
        self, input_ids: Int[Tensor, "beam token"], scores: Float[Tensor, "beam vocabulary"]
    ) -> Float[Tensor, "beam vocabulary"]:
        """The fused scores of the next tokens."""
        if self.weight == 0:
            return scores
        scores = scores.log_softmax(-1)  # as they are in beam search; in greedy search they are logits
        fused = torch.full_like(scores, -math.inf)
        count = min(self.candidates, scores.shape[-1])
        for beam, (ids, row) in enumerate(zip(input_ids.tolist(), scores, strict=True)):
            top = row.topk(count)
            said = self.spoken.text_of(ids).removeprefix(self.spoken.before)
            before = self.language.prefix(said)
            for score, id_ in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                gain = self._gain(said, id_, before)
                fused[beam, id_] = (1 - self.weight) * score + self.weight * gain
        return fused

    def _gain(self, said: bytes, id_: int, before: float) -> float:
        """What the language model gives to a token of the recogniser, as a natural log-probability."""
        if id_ in self.spoken.end:
            return float(self.language.next_bytes(said)[-1])
        more = self.spoken.text_of([id_])
        if not said:
            more = more.removeprefix(self.spoken.before)
        return self.language.prefix(said + more) - before if more else 0.0
