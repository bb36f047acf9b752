"""Computing what a store lacks, of its own corpus or of another."""

import dataclasses
import hashlib
import re
from functools import partial
from pathlib import Path
from typing import cast

from lftpipe.base import progress
from lftpipe.base.device import device_kind
from lftpipe.base.executor import Job, Place, execute
from lftpipe.base.files import fingerprint
from lftpipe.config.settings import Dtype, EvaluateSettings, ExtractSettings
from lftpipe.extraction.plan import Plan, make_plan
from lftpipe.extraction.shard_job import (
    FrozenPlan,
    Producer,
    Result,
    Task,
    partly_stored,
    start_producer,
    taker,
    tasks_of,
)
from lftpipe.extraction.tokens import packing_of, spec_of, store_tokens
from lftpipe.store import Store, StoreWriter

# --- Computing all that a store lacks: here, in several processes, or on a cluster; one driver commits it.


def compute(plan: Plan, writer: StoreWriter, settings: ExtractSettings) -> int:
    """Compute and commit every pending shard; how many tokens that were."""
    pending = writer.pending()
    if not pending:
        return 0
    frozen = freeze(plan, writer, settings)
    total = sum(len(key.sequences) for key in pending) * plan.context
    token_bytes = sum(plan.array_bytes().values()) / (sum(plan.wanted.values()) * plan.context)
    here = settings.ray is None and settings.workers == 1
    elsewhere = settings.ray is not None  # another machine may have other weights under the same name
    with progress.task(f"extract {plan.teacher.name}", total, "tokens") as task:
        job = Job[Task, Result](
            tasks=tasks_of(frozen, pending),
            start=(lambda place: Producer(frozen, place.device, plan.teacher).run)
            if here
            else partial(start_producer, frozen, elsewhere),
            done=taker(writer.commit, writer.note),
            advance=lambda tokens: task.advance(
                tokens, written=progress.human_bytes((task.done + tokens) * token_bytes)
            ),
            size=lambda each: 0 if isinstance(each, str) else len(each.sequences) * plan.context,
            place=Place(settings.device, settings.threads),
        )
        try:
            execute(job, workers=settings.workers, ray=settings.ray)
        finally:
            if not here:  # what processes that were ended have left
                writer.discard_attempts()
    return total


def freeze(plan: Plan, writer: StoreWriter, settings: ExtractSettings) -> FrozenPlan:
    """Write `plan.json`; results of earlier drivers are void from now on."""
    frozen = FrozenPlan(
        path=writer.path.resolve(),
        spec=writer.spec,
        kind=device_kind(settings.device),
        model=plan.teacher.model,
        workspace=str(settings.workspace.resolve()),
        revision=settings.revision,
        stream_layers=settings.stream_layers,
        partly=partly_stored(writer),
    )
    writer.begin_epoch(frozen.to_json())
    return dataclasses.replace(frozen, epoch=writer.epoch)


# --- The states of a store's teacher on another corpus, cached beside the store: to score runs on it.


def slug_of(corpus: str, field: str | None = None) -> str:
    """A corpus, or one column of it, as a part of a file's name: what it is called, and a digest of all."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(corpus).stem if "/" in corpus else corpus).strip("-.")
    whole = str(Path(corpus).resolve()) if Path(corpus).exists() else corpus
    whole += f"\n{field}" if field else ""
    return f"{name or 'corpus'}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def states_elsewhere(store: Store, corpus: str, settings: EvaluateSettings) -> Store:
    """A store with as many validation tokens of another corpus, whose states are those of `store`.

    The teacher runs once: what is there already is used again, after it was compared with the corpus.

    Raises `LftpipeError` if the corpus does not exist, has too little text, or changed since.
    """
    teacher = store.identity["teacher"]
    sequences = store.num_sequences("validation")
    slug = slug_of(corpus, settings.text_field)
    path = store.path.parent / "corpora" / slug / f"{_kind_of(store, sequences, settings)}.zarr"
    wanted = ExtractSettings(
        workspace=settings.workspace,
        store=path,
        model=teacher["model"],
        revision=teacher["revision"],
        corpus=corpus,
        text_field=settings.text_field,
        layers=",".join(map(str, store.layers)) or "all",
        tokens_only=not store.layers,
        context=store.context,
        tokens=store.context,  # a store has both splits; one sequence is the least
        validation_tokens=sequences * store.context,
        attention=False,
        dtype=cast(Dtype, store.spec.dtype),
        compute_dtype=store.identity["compute_dtype"],
        device=settings.device,
        threads=settings.threads,
    )
    plan = make_plan(wanted)
    # Not `force`: that is for the results. Tokens that are stored are compared with the corpus.
    with StoreWriter.open(path, spec_of(plan), resume=True) as writer:
        packing = packing_of(plan)
        packing.fit_to_small_corpus()
        store_tokens(plan, writer, packing)
        compute(plan, writer, wanted)
        writer.finish()
    return Store.open(path)


def _kind_of(store: Store, sequences: int, settings: EvaluateSettings) -> str:
    """A name for all that such states depend on beside the corpus: a store that is made anew has others."""
    teacher = {key: value for key, value in store.identity.items() if key not in ("corpus", "text_field")}
    states = [list(store.layers), store.spec.dtype, store.context, sequences, device_kind(settings.device)]
    return f"states-{fingerprint([teacher, *states])[:8]}"
