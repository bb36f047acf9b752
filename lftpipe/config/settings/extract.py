"""Settings of `lftpipe extract`."""

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from lftpipe.config.settings.base import (
    CONFIG,
    MAIN,
    Batch,
    Compression,
    ComputeDtype,
    Count,
    CountOrZero,
    Dtype,
    OfStore,
    OnDevice,
    Seed,
    Text,
    Writing,
)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ExtractSettings(OfStore, OnDevice, Writing):
    """Of `lftpipe extract`."""

    model: Text = "pythia-tiny"
    """The teacher: a registered name, a Hub id, a local folder, or a `.gguf` file."""
    revision: Text | None = None
    """Branch, tag or commit on the Hub."""
    corpus: Text | None = None
    """The text: a registered name, a file, a folder, or `hf:<dataset>[:<config>[:<split>]]`; default: the
    teacher's own corpus."""
    text_field: Text | None = None
    """The column of a table that holds the documents: a text, a chat's messages, or token ids; default: the
    first of `text`, `content`, `messages` and `input_ids`."""
    max_document_bytes: Annotated[int, Field(ge=1, le=2**31)] = 64 * 2**20
    """Refuse a corpus with a larger document."""
    layers: Text = "all"
    """States to store: `all`, a list such as `6,18`, or a half-open range such as `0:13`."""
    context: Annotated[int, Field(ge=2, le=2**24)] = 512
    """Tokens in a sequence."""
    tokens: Count = 200_000
    """Training tokens to store, rounded up to whole sequences."""
    validation_tokens: CountOrZero = 20_000
    """Validation tokens to store, from other documents."""
    attention: bool = True
    """Also store each layer's attention output."""
    logits: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Also store the top-K next-token logits per position; 64 is a good K."""
    dtype: Dtype = "float16"
    """Number format of the stored states."""
    compress: Compression = "none"
    """Compress float16 or float32 states without loss: a tenth fewer bytes, written and read more slowly."""
    compute_dtype: ComputeDtype = "auto"
    """Number format of the teacher's matrix products; `auto`: bfloat16 if the processor has it, else float32.
    The residual stream is always float32."""
    batch_tokens: Batch = 2048
    """Tokens in one forward pass of the teacher."""
    stream_layers: bool = False
    """Hold one layer of the teacher in memory at a time, read from its checkpoint for every shard: for
    teachers larger than the memory. The store is the same."""
    dry_run: bool = False
    """Print the sizes and the estimated time, and write nothing."""
    resume: bool = True
    """Continue an interrupted store, or extend a smaller one."""
    repair: bool = False
    """Recompute the shards that `lftpipe verify` finds damaged."""
    check_corpus: bool = False
    """Read the corpus again and compare it with the stored tokens, which are trusted otherwise."""
    tokens_only: bool = False
    """Store no states; `train --from-teacher` computes them."""
    shard_bytes: Annotated[int, Field(ge=1, le=2**40)] | None = None
    """Bytes of states in one file; no batch is larger. Default: 1 GiB, but 128 MiB for stores of less than
    16 GiB of states; an existing store keeps its own."""
    rolling: Annotated[int, Field(ge=1, le=2**60)] | None = None
    """Keep at most so many bytes of states on the disk, for `train` beside it: windows of training states
    come, are dropped once every run's checkpoint has passed them, and are made again if a run needs them."""
    seed: Seed = 0
    """Recorded in the store: extraction draws no random numbers."""
    trust_remote_code: bool = False
    """Accepted, without effect: a model's own code is never run."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes of this machine that compute: each has a GPU with `--device cuda`, else its part of the
    threads."""
    part: Text | None = None
    """Compute the I-th of N parts, such as `3/8`, without a driver; `env` reads RANK and WORLD_SIZE, or
    SLURM_PROCID and SLURM_NTASKS. Whoever finds all parts there completes the store."""
    ray: Text | None = None
    """Compute as tasks of the Ray cluster at this address; without an address, of one on this machine."""

    PANELS: ClassVar[dict[str, str]] = {
        MAIN: "model corpus tokens layers store workspace device",
        "The corpus": "text_field max_document_bytes",
        "What to store": "context validation_tokens attention logits dtype compress tokens_only rolling",
        "New, continued or repaired": "dry_run resume force repair check_corpus",
        "Many processes": "workers part ray shard_bytes",
    }
