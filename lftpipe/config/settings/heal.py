"""Settings of `lftpipe heal`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from lftpipe.config.settings.base import (
    CONFIG,
    MAIN,
    Batch,
    ComputeDtype,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    OfStore,
    OnDevice,
    Role,
    Seeded,
    Text,
    TrackerName,
    Writing,
)

Trained = Literal["tail", "student"]
Adapter = Literal["lora", "full"]
HealLoss = Literal["top-logits", "sampled-logits", "logits", "tokens"]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class HealSettings(OfStore, OnDevice, Seeded, Writing):
    """Of `lftpipe heal`."""

    target: Annotated[Text | None, Role.ARGUMENT] = None
    """Name or path of the run to heal; default: the store's only one."""
    train: Trained = "tail"
    """What learns: `tail`, the flow layer and those after it, from cached states; `student`, all layers."""
    adapter: Adapter = "lora"
    """How: `lora` trains low-rank adapters of all linear maps, merged at the end; `full` all weights."""
    rank: Annotated[int, Field(ge=1, le=2**16)] = 16
    """Rank of the adapters."""
    loss: HealLoss = "top-logits"
    """What is learned: the store's `top-logits` (`sampled-logits`: without the whole head), the `logits` of
    the teacher's own last layers, or the `tokens` alone."""
    tokens: Count = 200_000
    """Training tokens."""
    batch_tokens: Batch = 1024
    """Tokens in one step."""
    learning_rate: NonNegative | None = None
    """Peak learning rate; default: 1e-3 for `lora`, 1e-4 for `full`."""
    warmup: Fraction = 0.05
    """Fraction of the steps in which the learning rate rises; cosine decay follows."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    clip: NonNegative = 1.0
    """Largest gradient norm; 0 does not clip."""
    hold_back: Fraction = 0.02
    """Fraction of the training sequences held back, on which the best weights are chosen."""
    evaluate_every: Count = 50
    """Steps between evaluations on the sequences held back."""
    compute_dtype: ComputeDtype = "auto"
    """Number format of matrix products; `auto`: bfloat16 if the processor has it, else float32."""
    run: Text | None = None
    """Name or path of the new run; default: the healed run's name with `-healed`."""
    resume: bool = False
    """Continue an interrupted healing."""
    track: TrackerName | None = None
    """Also send the metrics to a tracker: `tensorboard` writes into the run's folder."""
    log_every: Count = 20
    """Steps between lines of `metrics.jsonl`."""
    checkpoint_minutes: NonNegative = 5.0
    """Minutes between checkpoints; 0: by `--checkpoint-every` alone."""
    checkpoint_every: CountOrZero = 0
    """Steps between further checkpoints; 0: by the clock alone."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "train adapter rank loss tokens learning_rate run seed device store workspace resume force",
        "The steps": "batch_tokens warmup weight_decay clip hold_back evaluate_every track",
    }
