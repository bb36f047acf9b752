"""A text scored as a whole, as the field scores WikiText-2: in windows, every token predicted once."""

from collections.abc import Iterator

import numpy as np
import torch

from lftpipe.base.errors import CorpusError
from lftpipe.data.batches import Batch, BatchFields, make_batch
from lftpipe.data.teacher_reader import LiveTeacher
from lftpipe.teacher.layers import load_rotary
from lftpipe.teacher.source import Teacher, load_tokenizer, max_positions_of

#: Tokens of a window where the model's context is longer: what tables of the field use.
WINDOW = 2048


class WholeText:
    """A text in windows, with the states that the teacher computes for them.

    A window begins with the last token of the one before it, the first with the token that starts a text. So
    each token is predicted once, from what is before it in its window.
    """

    def __init__(
        self, text: str, teacher: Teacher, device: str, dtype: torch.dtype, batch_tokens: int
    ) -> None:
        tokenizer = load_tokenizer(teacher)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise CorpusError("a text without tokens", "some text", "check the file")
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._ids = np.array([start, *ids], np.int32)
        self.num_tokens = len(ids)
        self.words: int | None = len(text.split())
        self.states = tuple(range(teacher.num_layers + 1))
        self.window = min(WINDOW, max_positions_of(teacher.config) or WINDOW)
        self._size = max(1, batch_tokens // self.window)
        self._teacher, self._device, self._dtype = teacher, torch.device(device), dtype

    def batches(self, fields: BatchFields) -> Iterator[Batch]:
        """Batches of whole windows, and at last the shorter rest."""
        live = LiveTeacher(self._teacher, self._dtype, self._device)
        rotary = load_rotary(self._teacher).to(self._device)
        for number, tokens in enumerate(self._rows()):
            windows = number * self._size + np.arange(len(tokens), dtype=np.int32)[:, None]
            document = np.broadcast_to(windows, tokens.shape).copy()  # what intervals draw
            yield live.fill(make_batch(tokens, document, self._device, rotary, step=number), fields)

    def _rows(self) -> Iterator[np.ndarray]:
        step = self.window - 1
        whole = self.num_tokens // step
        for first in range(0, whole, self._size):
            starts = range(first * step, min(first + self._size, whole) * step, step)
            yield np.stack([self._ids[start : start + self.window] for start in starts])
        if self.num_tokens % step:
            yield self._ids[None, whole * step :]
