"""`lftpipe info`: who made a store or a run, from what, and what is in it."""

import json
from pathlib import Path

import numpy as np
from rich.console import Group

from lftpipe import runs
from lftpipe.base import progress
from lftpipe.base.errors import SettingsError
from lftpipe.base.files import read_json
from lftpipe.base.workspace import find_run, find_store
from lftpipe.config.settings import InfoSettings
from lftpipe.corpus.packing import SPLITS
from lftpipe.reporting.terminal import Column, FittedTable
from lftpipe.results.facts import RunFacts, StateStatistics, StoreFacts
from lftpipe.results.run import read_metrics
from lftpipe.storage import storage_of
from lftpipe.store import Store

#: Training sequences, spread over the store, that the statistics are taken from.
SAMPLED_SEQUENCES = 16


def info(settings: InfoSettings) -> StoreFacts | RunFacts:
    """Describe a store, or a run.

    Raises `LftpipeError` if there is no such store or run, or it is incomplete.
    """
    target = settings.target
    if target is None or (target / "zarr.json").exists():
        return _of_store(Store.open(find_store(settings.workspace, target or settings.store)))
    run = find_run(settings.workspace, settings.store, str(target))
    if not run.is_dir():
        raise SettingsError(f"{target}", "a run's name, or the folder of a store or a run", "check it")
    return _of_run(run)


def _of_run(path: Path) -> RunFacts:
    run = runs.open_run(path)
    metrics = read_metrics(path / runs.METRICS, run.metrics_digest)
    return RunFacts(
        path=str(run.path),
        manifest=read_json(path / runs.MANIFEST),
        last_metrics=metrics.rows[-1] if metrics.rows else None,
        damaged_metrics=metrics.damage,
        weights_bytes=(path / runs.WEIGHTS).stat().st_size,
    )


def _of_store(store: Store) -> StoreFacts:
    size = storage_of(store.path).total_bytes()
    coded = store.shards.num_bytes("hidden", "attention")
    stay = [split for split in SPLITS if not store.rolls(split)]
    states = sum(store.num_sequences(split) for split in stay) * store.context * store.width
    states *= len(store.layers) + len(store.attention_layers)
    return StoreFacts(
        path=str(store.path),
        fingerprint=store.fingerprint,
        identity=store.identity,
        details=store.spec.details,
        compute_error=store.spec.details.get("compute_error"),
        layers=list(store.layers),
        attention_layers=list(store.attention_layers),
        logits=store.spec.logits,
        context=store.context,
        width=store.width,
        dtype=store.dtype,
        tokens={split: store.num_sequences(split) * store.context for split in SPLITS},
        bytes=size,
        bytes_of_float16_states=2 * states,
        compression=round(2 * states / max(coded, 1), 4),
        statistics=[_statistics(store, layer, stay[0]) for layer in store.layers],
        window_sequences=store.windows.sequences if store.spec.rolling else None,
    )


def _statistics(store: Store, layer: int, split: str) -> StateStatistics:
    """RMS and the largest activation of one state, over sequences spread over a split."""
    total = store.num_sequences(split)
    rows = sorted({int(row) for row in np.linspace(0, total - 1, SAMPLED_SEQUENCES)}) if total else []
    energy = energy_rest = 0.0
    count = count_rest = 0
    largest, where = -1.0, (0, 0, 0)
    for row in rows:
        state = store.read(split, layer, [row])[0].astype(np.float32)
        squares = np.square(state, dtype=np.float64)
        energy += squares.sum()
        energy_rest += squares[1:].sum()
        count += state.size
        count_rest += state[1:].size
        position, channel = np.unravel_index(np.abs(state).argmax(), state.shape)
        if abs(state[position, channel]) > largest:
            largest = float(abs(state[position, channel]))
            where = (row, int(position), int(channel))
    return StateStatistics(
        layer=layer,
        rms=float(np.sqrt(energy / max(count, 1))),
        rms_without_first=float(np.sqrt(energy_rest / max(count_rest, 1))),
        largest=largest,
        sequence=where[0],
        position=where[1],
        channel=where[2],
    )


def summary(result: StoreFacts | RunFacts) -> Group | FittedTable:
    """Tables for a terminal."""
    if isinstance(result, RunFacts):
        return _facts(
            result.path,
            [
                (key, json.dumps(value) if isinstance(value, dict | list) else str(value))
                for key, value in result.items()
                if key not in ("kind", "path")
            ],
        )
    return Group(_facts(result.path, _store_facts(result)), _activations(result))


def _store_facts(result: StoreFacts) -> list[tuple[str, str]]:
    identity, details, error = result.identity, result.details, result.compute_error
    teacher, digest = identity["teacher"], details["corpus_digest"]
    tokens = ", ".join(f"{count:,} {split}" for split, count in result.tokens.items())
    facts = [
        ("teacher", f"{teacher['name']} ({teacher['family']}, weights {teacher['weights_digest'][:12]})"),
        ("corpus", f"{identity['corpus']} (train {digest['train'][:12]})"),
        ("tokens", f"{tokens}, in sequences of {result.context}"),
        ("states", f"{len(result.layers)} x {result.width} features, {result.dtype}"),
        ("attention outputs", str(len(result.attention_layers))),
        ("logits", f"the largest {result.logits}" if result.logits else "none"),
        ("size", f"{progress.human_bytes(result.bytes)}, 1 : {result.compression:.2f} to float16"),
        ("computed in", identity["compute_dtype"]),
    ]
    if result.window_sequences:
        facts.append(("rolls", f"in windows of {result.window_sequences:,} sequences"))
    if error:
        nmse = error["hidden"]["nmse"]
        worst = result.layers[int(np.argmax(nmse))]
        told = f"NMSE to float32 {np.mean(nmse):.2g}, at most {max(nmse):.2g} (state {worst}), "
        facts.append(("its error", told + f"over {error['tokens']:,} tokens"))
    facts.append(("made by", ", ".join(f"{name} {version}" for name, version in details["versions"].items())))
    return [*facts, ("fingerprint", result.fingerprint)]


def _activations(result: StoreFacts) -> FittedTable:
    """A line for each state."""
    names = ["state", "RMS", "RMS w/o position 0", "largest", "position", "channel"]
    error = result.compute_error
    rows = [
        [
            str(row.layer),
            f"{row.rms:.3g}",
            f"{row.rms_without_first:.3g}",
            f"{row.largest:.4g}",
            str(row.position),
            str(row.channel),
            *([f"{error['hidden']['nmse'][index]:.2g}"] if error else []),
        ]
        for index, row in enumerate(result.statistics)
    ]
    columns = [
        Column(name, needed=name in ("state", "RMS", "largest"))
        for name in ([*names, "compute error"] if error else names)
    ]
    return FittedTable(columns, rows, title="\nactivations")


def _facts(title: str, facts: list[tuple[str, str]]) -> FittedTable:
    """Names and values under each other; long values are folded."""
    return FittedTable([Column("", "left"), Column("", "left", folds=True)], facts, title=title)
