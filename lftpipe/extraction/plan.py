"""What an extraction will compute and write, how large that is, and whether it fits."""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lftpipe.base import progress
from lftpipe.base.device import dtype_name, resolve_compute_dtype
from lftpipe.base.errors import SettingsError, StoreError
from lftpipe.base.workspace import STORE_NAME
from lftpipe.config.layers import parse_layers
from lftpipe.config.settings import ExtractSettings
from lftpipe.corpus.readers import Corpus, open_corpus
from lftpipe.families.structure import check_attention
from lftpipe.results.outcomes import PlannedExtraction
from lftpipe.storage import storage_of
from lftpipe.store import planned_spec
from lftpipe.store.codec import encoded_bytes
from lftpipe.teacher.source import Teacher, open_teacher
from lftpipe.teacher.trunk import Head, Trunk, compute_batch, load_trunk

#: Aim for the bytes of states in one shard of a small store: little is to be redone after a kill.
SHARD_BYTES = 128 * 2**20

#: And of a large one, which would have too many files.
LARGE_SHARD_BYTES = 2**30

#: Bytes of states from which a store is a large one.
LARGE_STORE_BYTES = 16 * 2**30

#: And at most so many sequences: a shard's index has a place for each, filled or not.
SHARD_SEQUENCES = 256
MOST_SHARD_SEQUENCES = 4096

#: Of a store without states: tokens are small, and never worth a file for each sequence.
SHARD_TOKENS = 2**21

#: Shards that a rolling store has room for, if no shard has fewer sequences than a batch.
SHARDS_UNDER_CAP = 16

#: Room left free on the disk beside the store.
DISK_MARGIN = 256 * 2**20


@dataclass(frozen=True)
class Plan:
    """What an extraction will compute and write."""

    teacher: Teacher
    corpus: Corpus
    path: Path
    layers: tuple[int, ...]
    attention_layers: tuple[int, ...]
    context: int
    wanted: dict[str, int]
    batch_sequences: int
    sequences_per_shard: int
    compute_dtype: torch.dtype
    dtype: str
    compression: str
    logits: int
    device: str
    batch_asked: int
    """Sequences of a batch as asked for: more than `batch_sequences` where a shard holds no more."""
    text_field: str | None = None
    """The corpus's column, where one was named."""
    seed: int = 0
    """Of the store's identity; nothing is drawn with it."""
    stream_layers: bool = False
    rolling: int = 0
    """Most bytes of states on the disk at a time; 0: all of them."""

    def load_trunk(self) -> Trunk:
        """The layers below the deepest state wanted; logits need the last state."""
        deepest = self.teacher.num_layers if self.logits else max(self.layers, default=0)
        stream = self.batch_sequences if self.stream_layers else None
        return load_trunk(self.teacher, deepest, self.compute_dtype, self.device, stream)

    def load_head(self) -> Head | None:
        """The LM head, if logits are wanted."""
        return Head(self.teacher, self.logits, self.device) if self.logits else None

    def array_bytes(self) -> dict[str, int]:
        """Bytes of every array on the disk, both splits together."""
        sequences = sum(self.wanted.values())
        positions_ = sequences * self.context
        state = state_bytes(self.dtype, self.context, self.teacher.width)
        arrays = {
            "hidden": sequences * len(self.layers) * state,
            "attention": sequences * len(self.attention_layers) * state,
            "tokens": positions_ * 4,
            "document": positions_ * 4,
        }
        if self.logits:
            value = 4 if self.dtype == "float32" else 2
            arrays["logit_values"] = positions_ * self.logits * value
            arrays["logit_ids"] = positions_ * self.logits * 4
            arrays["logit_normaliser"] = positions_ * 4
        return arrays

    def disk_bytes(self) -> int:
        """Bytes that the store takes on the disk at a time."""
        arrays = self.array_bytes()
        tokens = arrays["tokens"] + arrays["document"]
        states = sum(arrays.values()) - tokens
        return tokens + (min(states, self.rolling) if self.rolling else states)


def state_bytes(dtype: str, context: int, width: int) -> int:
    """Of one state of one sequence on the disk; values that int8 keeps exact are too few to count."""
    if dtype == "int8":
        return encoded_bytes(context, width, 0)
    return context * width * (4 if dtype == "float32" else 2)


def make_plan(settings: ExtractSettings) -> Plan:
    """Resolve names and sizes, and refuse what cannot work, before anything is read or written."""
    teacher = open_teacher(settings.model, settings.workspace, revision=settings.revision)
    longest = teacher.max_positions
    if longest is not None and settings.context > longest:
        raise SettingsError(
            f"--context {settings.context}", f"at most {longest}, the teacher's", f"pass --context {longest}"
        )
    name = settings.corpus or teacher.corpus
    if name is None:
        raise SettingsError(
            f"no corpus for {settings.model}",
            "--corpus, as this teacher has no default",
            "name a file or folder",
        )
    if not 0 <= settings.logits <= teacher.config.vocab_size:
        raise SettingsError(
            f"--logits {settings.logits}",
            f"0 to {teacher.config.vocab_size}, the teacher's vocabulary",
            "pass --logits 64, or leave it out",
        )
    if settings.compress != "none" and settings.dtype == "int8":
        raise SettingsError(
            f"--compress {settings.compress} with --dtype int8",
            "--dtype float16 or float32: int8 codes hardly get smaller",
            "leave one of the two out",
        )
    layers = () if settings.tokens_only else parse_layers(settings.layers, teacher.num_layers + 1)
    attention = tuple(l for l in layers if l < max(layers)) if settings.attention else ()  # noqa: E741
    check_attention(teacher.model, teacher.family, teacher.config, attention)
    state = state_bytes(settings.dtype, settings.context, teacher.width)
    batch = max(1, settings.batch_tokens // settings.context)
    wanted = {
        "train": math.ceil(settings.tokens / settings.context),
        "validation": math.ceil(settings.validation_tokens / settings.context),
    }
    path = settings.store or settings.workspace / teacher.name / STORE_NAME
    per_shard = _sequences_per_shard(settings, path, state * len(layers), sum(wanted.values()), batch)
    return Plan(
        teacher=teacher,
        corpus=open_corpus(name, settings.max_document_bytes, settings.text_field),
        text_field=settings.text_field,
        seed=settings.seed,
        path=path,
        layers=layers,
        attention_layers=attention,
        context=settings.context,
        wanted=wanted,
        batch_sequences=min(batch, per_shard),
        sequences_per_shard=per_shard,
        compute_dtype=resolve_compute_dtype(settings.compute_dtype, settings.device),
        dtype=settings.dtype,
        compression=settings.compress,
        logits=settings.logits,
        device=settings.device,
        stream_layers=settings.stream_layers,
        batch_asked=batch,
        rolling=settings.rolling or 0,
    )


def _sequences_per_shard(
    settings: ExtractSettings, path: Path, sequence_bytes: int, sequences: int, batch: int
) -> int:
    """Whole batches: bf16 results depend on the batch, so a shard redone must be computed in the same ones.

    A store that is there keeps its own; else a large one gets larger shards than a small one.
    """
    if settings.shard_bytes is None and not settings.force and (old := planned_spec(path)):
        return old.sequences_per_shard
    if not sequence_bytes:
        per_shard = max(1, SHARD_TOKENS // settings.context)
    elif settings.shard_bytes is not None:
        per_shard = min(max(1, settings.shard_bytes // sequence_bytes), MOST_SHARD_SEQUENCES)
    elif settings.rolling is not None:
        aim = min(SHARD_BYTES, settings.rolling // SHARDS_UNDER_CAP)
        per_shard = min(max(batch, aim // sequence_bytes), SHARD_SEQUENCES)
    elif sequence_bytes * sequences > LARGE_STORE_BYTES:
        per_shard = min(max(1, LARGE_SHARD_BYTES // sequence_bytes), MOST_SHARD_SEQUENCES)
    else:
        per_shard = min(max(1, SHARD_BYTES // sequence_bytes), SHARD_SEQUENCES)
    return max(per_shard // batch * batch, min(batch, per_shard))


def check_disk(plan: Plan) -> None:
    """Refuse a run that would not fit, counting what an interrupted run has written already."""
    if storage_of(plan.path).remote:
        return  # only what is being written lies on this machine's disk
    needed = plan.disk_bytes()
    there = (
        sum(file.stat().st_size for file in plan.path.rglob("*") if file.is_file())
        if plan.path.exists()
        else 0
    )
    parent = next(folder for folder in (plan.path, *plan.path.parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed - there > free - DISK_MARGIN:
        raise StoreError(
            f"a store of {progress.human_bytes(needed)} with {progress.human_bytes(free)} free at {parent}",
            f"room for it and {progress.human_bytes(DISK_MARGIN)} to spare",
            "free space, or pass fewer --layers or --tokens, --no-attention or another --store",
        )


def dry_run(plan: Plan) -> PlannedExtraction:
    """The plan's figures, with a time estimated from a short measured probe."""
    trunk, head = plan.load_trunk(), plan.load_head()
    rng = np.random.default_rng(0)
    shape = (plan.batch_sequences, plan.context)
    probe = torch.from_numpy(rng.integers(0, plan.teacher.config.vocab_size, shape))
    places = torch.arange(plan.context).expand(shape)

    def timed() -> float:
        started = time.monotonic()
        compute_batch(trunk, head, probe, places, lambda array, layer, state: None)
        return time.monotonic() - started

    timed()  # the first pass also sets up kernels
    rate = probe.numel() / min(timed() for _ in range(2))
    parent = next(folder for folder in (plan.path, *plan.path.parents) if folder.exists())
    by_array = plan.array_bytes()
    tokens = {split: count * plan.context for split, count in plan.wanted.items()}
    return PlannedExtraction(
        store=str(plan.path),
        teacher=plan.teacher.name,
        corpus=plan.corpus.name,
        tokens=tokens,
        layers=list(plan.layers),
        attention_layers=list(plan.attention_layers),
        logits=plan.logits,
        dtype=plan.dtype,
        compute_dtype=dtype_name(plan.compute_dtype),
        bytes=plan.disk_bytes(),
        bytes_by_array=by_array,
        free_bytes=shutil.disk_usage(parent).free,
        batch_sequences=plan.batch_sequences,
        batch_asked=plan.batch_asked,
        probe_tokens_per_second=round(rate, 1),
        seconds=round(sum(tokens.values()) / rate, 1),
    )
