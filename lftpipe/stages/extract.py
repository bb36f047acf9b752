"""`lftpipe extract`: run the frozen teacher once and write its states to the store."""

import math
import queue
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lftpipe
from lftpipe import progress
from lftpipe.corpus import Corpus, open_corpus
from lftpipe.errors import CorpusError, SettingsError, StoreError
from lftpipe.packing import SPLITS, Packing, positions
from lftpipe.settings import ExtractSettings, parse_layers
from lftpipe.store import ShardWriter, StoreSpec, StoreWriter
from lftpipe.teacher.compute import resolve_compute_dtype
from lftpipe.teacher.source import Teacher, load_tokenizer, open_teacher
from lftpipe.teacher.trunk import Trunk
from lftpipe.workspace import STORE_NAME

#: Aim for the bytes of one shard: large enough to write in one sweep, small enough to redo after a kill.
SHARD_BYTES = 128 * 2**20

BYTES_PER_FEATURE = {"float16": 2.0, "float32": 4.0, "int8": 612 / 576}

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

    def array_bytes(self) -> dict[str, int]:
        """Bytes of every array on the disk, both splits together."""
        positions_ = sum(self.wanted.values()) * self.context
        state = BYTES_PER_FEATURE[self.dtype] * self.teacher.width
        return {
            "hidden": int(positions_ * len(self.layers) * state),
            "attention": int(positions_ * len(self.attention_layers) * state),
            "tokens": positions_ * 4,
            "document": positions_ * 4,
        }


def extract(settings: ExtractSettings) -> dict[str, Any]:
    """Run the teacher over a corpus and store its states; resumes what was interrupted.

    Returns
    -------
    dict
        The plan's figures for `--dry-run`, else what was stored, JSON-plain.

    Raises
    ------
    LftpipeError
        If teacher, corpus, settings, disk or an older store do not allow it.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    plan = make_plan(settings)
    tokenizer = load_tokenizer(plan.teacher)
    if settings.dry_run:
        return _dry_run(plan)
    _check_disk(plan)
    packing = _packing(plan, tokenizer)
    spool = plan.path.with_name(plan.path.name + ".tokens")
    try:
        return _run(plan, packing, _pack(packing, plan, spool), settings)
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _run(
    plan: Plan, packing: Packing, tokens: dict[str, tuple[np.ndarray, np.ndarray]], settings: ExtractSettings
) -> dict[str, Any]:
    spec = _spec(plan, packing, settings)
    started = time.monotonic()
    with StoreWriter.open(plan.path, spec, resume=settings.resume, force=settings.force) as writer:
        fresh = not writer.complete
        computed = 0
        if fresh:
            for split in SPLITS:
                writer.put_tokens(split, *tokens[split])
            pending = writer.pending()
            computed = sum(len(key.sequences) for key in pending) * plan.context
            if pending:
                trunk = Trunk(plan.teacher, max(plan.layers), plan.compute_dtype, settings.device)
                _forward(plan, writer, trunk, tokens)
            writer.finish()
    seconds = time.monotonic() - started
    return {
        "store": str(plan.path),
        "teacher": plan.teacher.name,
        "already_complete": not fresh,
        "tokens": {split: packing.made[split] * plan.context for split in SPLITS},
        "tokens_asked": {split: count * plan.context for split, count in plan.wanted.items()},
        "documents": packing.num_documents,
        "layers": list(plan.layers),
        "attention_layers": list(plan.attention_layers),
        "compute_dtype": str(plan.compute_dtype).removeprefix("torch."),
        "bytes": sum(file.stat().st_size for file in plan.path.rglob("*") if file.is_file()),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(computed / max(seconds, 1e-9), 1),
    }


def make_plan(settings: ExtractSettings) -> Plan:
    """Resolve names and sizes, and refuse what cannot work, before anything is read or written."""
    teacher = open_teacher(
        settings.model,
        settings.workspace,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    longest = getattr(teacher.config, "max_position_embeddings", settings.context)
    if settings.context > longest:
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
    layers = parse_layers(settings.layers, teacher.num_layers + 1)
    attention = tuple(l for l in layers if l < max(layers)) if settings.attention else ()  # noqa: E741
    state = BYTES_PER_FEATURE[settings.dtype] * teacher.width * settings.context
    batch = max(1, settings.batch_tokens // settings.context)
    per_shard = max(1, int(SHARD_BYTES / (state * len(layers))))
    wanted = {
        "train": math.ceil(settings.tokens / settings.context),
        "validation": math.ceil(settings.validation_tokens / settings.context),
    }
    return Plan(
        teacher=teacher,
        corpus=open_corpus(name),
        path=settings.store or settings.workspace / teacher.name / STORE_NAME,
        layers=layers,
        attention_layers=attention,
        context=settings.context,
        wanted=wanted,
        batch_sequences=min(batch, per_shard),
        # Whole batches to a shard: bf16 results depend on the batch, so a shard redone after a kill
        # must be computed in the same batches.
        sequences_per_shard=max(per_shard // batch * batch, min(batch, per_shard)),
        compute_dtype=resolve_compute_dtype(settings.compute_dtype, settings.device),
        dtype=settings.dtype,
    )


def _packing(plan: Plan, tokenizer: Any) -> Packing:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts)]

    return Packing(plan.corpus, encode, tokenizer.eos_token_id, plan.context, plan.wanted)


def _pack(packing: Packing, plan: Plan, spool: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Token ids and document numbers of each split, `(sequence, position)`, in files mapped to memory."""
    packing.fit_to_small_corpus()
    spool.mkdir(parents=True, exist_ok=True)
    rows = {
        split: [
            np.lib.format.open_memmap(spool / f"{split}-{name}.npy", "w+", np.int32, (count, plan.context))
            if count
            else np.zeros((0, plan.context), np.int32)
            for name in ("tokens", "document")
        ]
        for split, count in plan.wanted.items()
    }
    made = dict.fromkeys(SPLITS, 0)
    total = sum(plan.wanted.values()) * plan.context
    with progress.task(f"tokenise {plan.corpus.name}", total, "tokens") as task:
        for sequence in packing:
            tokens, document = rows[sequence.split]
            tokens[made[sequence.split]] = sequence.tokens
            document[made[sequence.split]] = sequence.document
            made[sequence.split] += 1
            task.advance(plan.context)
    for split in SPLITS:
        if plan.wanted[split] and not made[split]:
            raise CorpusError(
                f"corpus {plan.corpus.name} with too little text for {split}",
                f"at least one sequence of {plan.context} tokens of it, from other documents than the rest",
                "give more documents, a shorter --context, or --validation-tokens 0",
            )
    return {
        split: (tokens[: made[split]], document[: made[split]]) for split, (tokens, document) in rows.items()
    }


def _spec(plan: Plan, packing: Packing, settings: ExtractSettings) -> StoreSpec:
    import tokenizers
    import transformers
    import zarr

    identity = {
        "teacher": plan.teacher.identity(),
        "tokenizer_digest": plan.teacher.tokenizer_digest,
        "corpus": {"name": plan.corpus.name, "digest": packing.digest, "documents": packing.num_documents},
        "packing": "isolated",
        "seed": settings.seed,
        "compute_dtype": str(plan.compute_dtype).removeprefix("torch."),
        "batch_sequences": plan.batch_sequences,
        "versions": {
            "lftpipe": lftpipe.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "zarr": zarr.__version__,
        },
    }
    return StoreSpec(
        identity=identity,
        layers=plan.layers,
        attention_layers=plan.attention_layers,
        context=plan.context,
        width=plan.teacher.width,
        dtype=settings.dtype,
        sequences_per_shard=plan.sequences_per_shard,
        sequences=packing.made,
    )


def _forward(
    plan: Plan, writer: StoreWriter, trunk: Trunk, tokens: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Compute every pending shard; a thread encodes and writes while the teacher computes the next layer."""
    pending = writer.pending()
    total = sum(len(key.sequences) for key in pending) * plan.context
    state_bytes = (
        BYTES_PER_FEATURE[plan.dtype] * plan.teacher.width * (len(plan.layers) + len(plan.attention_layers))
    )
    with progress.task(f"extract {plan.teacher.name}", total, "tokens") as task:
        for key in pending:
            ids, documents = tokens[key.split]
            with writer.shard(key) as shard, _Behind() as behind:
                for first in range(0, len(key.sequences), plan.batch_sequences):
                    rows = key.sequences[first : first + plan.batch_sequences]
                    batch = slice(rows[0], rows[-1] + 1)

                    def sink(array: str, kept: tuple[int, ...], first: int = first):
                        def put(layer: int, state: Tensor) -> None:
                            if layer in kept:
                                behind.do(_put, shard, array, layer, first, state)

                        return put

                    trunk.run(
                        torch.from_numpy(ids[batch]).long(),
                        torch.from_numpy(positions(documents[batch])).long(),
                        hidden=sink("hidden", plan.layers),
                        attention=sink("attention", plan.attention_layers) if plan.attention_layers else None,
                    )
                    task.advance(
                        len(rows) * plan.context, written=progress.human_bytes(task.done * state_bytes)
                    )


def _put(shard: ShardWriter, array: str, layer: int, first: int, state: Tensor) -> None:
    shard.put(array, layer, first, state.to("cpu", torch.float32).numpy())


class _Behind:
    """Calls done in order by one thread, a bounded few behind; its error is raised in the caller."""

    def __init__(self, length: int = 4) -> None:
        self._queue: queue.Queue[tuple[Any, ...] | None] = queue.Queue(length)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def do(self, function: Any, *arguments: Any) -> None:
        if self._error:
            raise self._error
        self._queue.put((function, *arguments))

    def _run(self) -> None:
        while call := self._queue.get():
            if self._error is None:
                try:
                    call[0](*call[1:])
                except BaseException as error:  # handed to the caller, whatever it is
                    self._error = error

    def __enter__(self) -> "_Behind":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error and kind is None:
            raise self._error


def _check_disk(plan: Plan) -> None:
    """Refuse a run that would not fit, counting what an interrupted run has written already."""
    needed = sum(plan.array_bytes().values())
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
            "room for it",
            "free space, or pass fewer --layers or --tokens, --no-attention or another --store",
        )


def _dry_run(plan: Plan) -> dict[str, Any]:
    """The plan's figures, with a time estimated from a short measured probe."""
    trunk = Trunk(plan.teacher, max(plan.layers), plan.compute_dtype)
    rng = np.random.default_rng(0)
    shape = (plan.batch_sequences, plan.context)
    probe = torch.from_numpy(rng.integers(0, plan.teacher.config.vocab_size, shape))
    places = torch.arange(plan.context).expand(shape)

    def timed() -> float:
        started = time.monotonic()
        trunk.run(probe, places)
        return time.monotonic() - started

    timed()  # the first pass also sets up kernels
    rate = probe.numel() / min(timed() for _ in range(2))
    parent = next(folder for folder in (plan.path, *plan.path.parents) if folder.exists())
    by_array = plan.array_bytes()
    tokens = {split: count * plan.context for split, count in plan.wanted.items()}
    return {
        "store": str(plan.path),
        "dry_run": True,
        "teacher": plan.teacher.name,
        "corpus": plan.corpus.name,
        "tokens": tokens,
        "layers": list(plan.layers),
        "attention_layers": list(plan.attention_layers),
        "dtype": plan.dtype,
        "compute_dtype": str(plan.compute_dtype).removeprefix("torch."),
        "bytes": sum(by_array.values()),
        "bytes_by_array": by_array,
        "free_bytes": shutil.disk_usage(parent).free,
        "probe_tokens_per_second": round(rate, 1),
        "seconds": round(sum(tokens.values()) / rate, 1),
    }


def summary(result: dict[str, Any]) -> str:
    """What was made, where, and what to type next."""
    size = progress.human_bytes(result["bytes"])
    tokens = " and ".join(f"{count:,} {split}" for split, count in result["tokens"].items())
    layers = f"{len(result['layers'])} states and {len(result['attention_layers'])} attention contexts"
    if result.get("dry_run"):
        arrays = ", ".join(
            f"{name} {progress.human_bytes(n)}" for name, n in result["bytes_by_array"].items()
        )
        return (
            f"{result['store']} would hold {tokens} tokens x {layers}\n"
            f"  {size} as {result['dtype']} ({arrays}); {progress.human_bytes(result['free_bytes'])} are free\n"
            f"  about {result['seconds']:.0f} s at {result['probe_tokens_per_second']:,.0f} tokens/s "
            f"({result['compute_dtype']})"
        )
    lines = [f"{result['store']} holds {tokens} tokens of {result['teacher']} x {layers}, {size}"]
    if result["already_complete"]:
        lines.append("  it was complete already: nothing was computed")
    else:
        lines.append(f"  {result['seconds']:.0f} s, {result['tokens_per_second']:,.0f} tokens/s")
    for split, asked in result["tokens_asked"].items():
        if result["tokens"][split] < asked:
            lines.append(f"  the corpus ended before the {asked:,} {split} tokens asked for")
    lines.append(f"next: lftpipe recouple --store {result['store']}")
    return "\n".join(lines)
