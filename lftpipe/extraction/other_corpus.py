"""The states of a store's teacher on another corpus, cached beside the store: to score runs on it."""

import hashlib
import re
from pathlib import Path
from typing import cast

from lftpipe.base.device import device_kind
from lftpipe.base.files import fingerprint
from lftpipe.config.settings import Dtype, EvaluateSettings, ExtractSettings
from lftpipe.extraction.compute import compute
from lftpipe.extraction.plan import make_plan
from lftpipe.extraction.tokens import packing_of, spec_of, store_tokens
from lftpipe.store import Store, StoreWriter


def slug_of(corpus: str, field: str | None = None) -> str:
    """A corpus, or one column of it, as a part of a file's name: what it is called, and a digest of all."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(corpus).stem if "/" in corpus else corpus).strip("-.")
    whole = str(Path(corpus).resolve()) if Path(corpus).exists() else corpus
    whole += f"\n{field}" if field else ""
    return f"{name or 'corpus'}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def states_elsewhere(store: Store, corpus: str, settings: EvaluateSettings) -> Store:
    """A store with as many validation tokens of another corpus, whose states are those of `store`.

    The teacher runs once: what is there already is used again, after it was compared with the corpus.

    Raises
    ------
    LftpipeError
        If the corpus does not exist, has too little text, or changed since.
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
