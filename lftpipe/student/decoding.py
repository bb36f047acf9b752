"""Continuing a prompt token by token: streamed, timed, and with a draft that runs ahead."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOBase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from lftpipe.base.errors import SettingsError
from lftpipe.results.outcomes import Drafted, Written
from lftpipe.teacher.source import prompt_tokens

#: Tokens of the pass that is not timed: the first calls of a process set up kernels and threads.
WARM_UP_TOKENS = 2

#: What a model's own settings still decide: how far a draft runs ahead, which changes no text.
_DRAFTING = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; nothing of it comes from a model's `generation_config.json`."""

    temperature: float = 0.0
    """0 takes the most likely token; above, tokens are drawn by torch's generator."""
    top_k: int = 0
    """Draw among so many most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that are there already."""

    def options(self) -> dict[str, Any]:
        """In the words of transformers."""
        options: dict[str, Any] = {"repetition_penalty": self.repetition_penalty, "do_sample": False}
        if self.temperature:
            drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            options |= drawn | {"do_sample": True}
        return options


@dataclass(frozen=True)
class Continuation:
    """What a model wrote, and how fast."""

    text: str
    tokens: list[int]
    seconds: float
    first_token_seconds: float
    """Until the first new token: the prompt's forward pass."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, the prompt's pass included."""
        return len(self.tokens) / self.seconds

    def summary(self) -> Written:
        """Text and speed, rounded."""
        return Written(
            text=self.text,
            new_tokens=len(self.tokens),
            seconds=round(self.seconds, 4),
            first_token_seconds=round(self.first_token_seconds, 4),
            tokens_per_second=round(self.tokens_per_second, 2),
        )


@dataclass(frozen=True)
class Speculation:
    """A continuation by the teacher with a draft, and how much of the draft was of use."""

    continuation: Continuation
    proposed: int
    """Tokens that the draft wrote ahead."""
    accepted: int
    """Those of them that the teacher would have written."""
    teacher_calls: int

    def summary(self, alone: Continuation) -> Drafted:
        """Text and speed, beside the teacher without a draft."""
        return Drafted(
            **self.continuation.summary().to_json(),
            proposed_tokens=self.proposed,
            accepted_tokens=self.accepted,
            acceptance_rate=round(self.accepted / self.proposed, 4) if self.proposed else None,
            teacher_calls=self.teacher_calls,
            equals_teacher=self.continuation.tokens == alone.tokens,
            speed_up=round(alone.seconds / self.continuation.seconds, 4),
        )


class _Streamer(TextStreamer):
    """Writes whole words to a stream as they are made, and notes when the first token came."""

    def __init__(self, tokenizer: Any, out: TextIOBase | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out
        self.first_token: float | None = None

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt and self.first_token is None:
            self.first_token = time.perf_counter()
        if self._out is None:
            self.next_tokens_are_prompt = False
        else:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._out is not None:
            self._out.write(text + ("\n" if stream_end else ""))
            self._out.flush()


def continue_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    out: TextIOBase | None = None,
    draft: Any = None,
    processors: Sequence[LogitsProcessor] = (),
) -> Continuation:
    """Generate, streaming the text to `out`.

    `draft`: a model that proposes tokens for `model` to accept (assisted generation).
    `processors`: what changes the scores of the next token, such as another model's.
    """
    ids = torch.tensor([prompt_tokens(tokenizer, prompt)], device=model.device)
    ends = end_tokens(model, tokenizer)
    options = GenerationConfig(
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,
        bos_token_id=tokenizer.bos_token_id,
        max_new_tokens=max_new_tokens,
        **sampling.options(),
    )
    assistant = {} if draft is None else {"assistant_model": draft}
    streamer = _Streamer(tokenizer, out)
    began = time.perf_counter()
    with _without_own_settings(model, *assistant.values()):
        produced = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=options,
            streamer=streamer,
            logits_processor=LogitsProcessorList(processors),
            **assistant,
        )
    seconds = time.perf_counter() - began
    new = produced[0, ids.shape[1] :].tolist()
    return Continuation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=new,
        seconds=seconds,
        first_token_seconds=(streamer.first_token or began + seconds) - began,
    )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's, then all that the model's generation config lists."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list | tuple) else [listed]
    ends = [int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None]
    return list(dict.fromkeys(ends))


@contextmanager
def _without_own_settings(*models: Any) -> Iterator[None]:
    """Models with no generation config of their own: transformers fills from it whatever is not set."""
    own = [model.generation_config for model in models]
    for model, config in zip(models, own, strict=True):
        kept = {name: getattr(config, name) for name in _DRAFTING}
        model.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        for model, config in zip(models, own, strict=True):
            model.generation_config = config


def speculate(
    teacher: Any,
    draft: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    *,
    out: TextIOBase | None = None,
) -> Speculation:
    """The teacher's greedy continuation, with a draft that writes ahead (assisted generation).

    The draft proposes some tokens, the teacher checks them in one pass, keeps those it would have
    written and adds one of its own. So its passes are `new tokens - accepted`.

    Raises `SettingsError` if the teacher cannot take back what it has read.
    """
    if teacher._is_stateful:  # transformers' word for recurrent models
        raise SettingsError(
            f"a draft for a {teacher.config.model_type} model, which keeps one state of all it has read",
            "a teacher that can take back tokens",
            "generate with the student alone",
        )
    seen = 0
    calls = 0

    def count(_module: nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
        nonlocal seen, calls
        seen += named["input_ids"].shape[1]
        calls += 1

    hook = teacher.register_forward_pre_hook(count, with_kwargs=True)
    try:
        continuation = continue_prompt(teacher, tokenizer, prompt, max_new_tokens, out=out, draft=draft)
    finally:
        hook.remove()
    # Every pass but the first also sees the token that the one before added.
    proposed = seen - len(prompt_tokens(tokenizer, prompt)) - (calls - 1)
    return Speculation(continuation, proposed, len(continuation.tokens) - calls, calls)


def warm_up(model: Any, tokenizer: Any, prompt: str) -> None:
    """Run a model once without timing it."""
    with torch.inference_mode():
        continue_prompt(model, tokenizer, prompt, WARM_UP_TOKENS)
