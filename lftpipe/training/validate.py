"""From the settings that were given to those a run is trained with: all chosen, all checked."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import torch

from lftpipe.base.device import dtype_name, resolve_compute_dtype
from lftpipe.base.errors import SettingsError, StoreError
from lftpipe.config.layers import check_apart
from lftpipe.config.loss import (
    CLOSED_FORM,
    LOSSES,
    ON_LOGITS,
    ON_STORED_LOGITS,
    SHAPED,
    TIMELESS,
    TWO_FOR,
    parse_loss,
)
from lftpipe.config.settings import (
    ComputeDtype,
    HealSettings,
    MuonDtype,
    TrainSettings,
    depth_of,
    loss_text,
    width_of,
)
from lftpipe.store import Store
from lftpipe.teacher.layers import load_layer
from lftpipe.teacher.source import Teacher
from lftpipe.training.estimator import parts
from lftpipe.training.optimizer import muon_dtype, peak_rate
from lftpipe.training.rolling import check_rolling, window_of

#: As `--depth` has it.
Depth = int | tuple[int, ...] | None

#: Steps between evaluations where some of the training sequences are held back, if nothing is said.
EVALUATE_EVERY = 100

#: Tokens that one step may have even on a store of fewer.
LARGEST_BATCH = 2**16

#: What the parts of one student replace, in order.
Blocks = Sequence[tuple[int, int]]

#: A run to be trained: its folder, settings and blocks.
Wanted = tuple[Path, TrainSettings, Blocks]


#: What a command has once, for all its variants.
_OF_ALL = {"store", "workspace", "device", "threads", "workers", "cache", "cache_bytes"}


def variants_of(settings: TrainSettings) -> list[TrainSettings]:
    """One settings for each `[train.variants.NAME]` of a recipe, or the settings themselves."""
    if not settings.variants:
        return [settings]
    chosen = settings.run.split(",") if settings.run else list(settings.variants)
    if unknown := [name for name in chosen if name not in settings.variants]:
        raise SettingsError(
            f"--run {unknown[0]}", f"one of the recipe's variants: {', '.join(settings.variants)}", "name one"
        )
    for name in chosen:
        if foreign := sorted(_OF_ALL & settings.variants[name].keys()):
            raise SettingsError(
                f"{foreign[0]} in variant {name}",
                "what may differ between the runs of one command",
                "put it into [train], or train the variant by a recipe of its own",
            )
    plain = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return [
        TrainSettings(**plain | settings.variants[name] | {"variants": {}, "run": name}) for name in chosen
    ]


def resolved(settings: TrainSettings, store: Store, blocks: Blocks, teacher: Teacher) -> TrainSettings:
    """Settings with all that was left open chosen, and checked against the store.

    `teacher`: the store's, whose layers training begins from.
    Raises `LftpipeError` if the store lacks a state of a block or has nothing to train on, or the settings
    contradict.
    """
    _check_objective(settings)
    _check_student(settings, blocks)
    loss = _loss(settings, blocks)
    settings = replace(settings, loss=loss, depth=_depths(settings, blocks))
    terms = _terms(settings)
    for number, block in enumerate(blocks):
        _check_layers(settings, block, number)
        _check_states(settings, store, block, number, terms)
        _check_terms(settings, store, block, terms)
        if "branches" in terms:
            _check_branches(teacher, block)
    _check_tokens(settings, store)
    check_rolling(settings, store)
    # All settled here is recorded with the run, and compared when it is resumed.
    return replace(
        settings,
        block="each" if settings.block == "each" else ",".join(f"{m}:{n}" for m, n in blocks),
        threads=torch.get_num_threads(),
        compute_dtype=cast(
            ComputeDtype, dtype_name(resolve_compute_dtype(settings.compute_dtype, settings.device))
        ),
        learning_rate=_rate(settings, blocks[0], teacher),
        muon_dtype=cast(MuonDtype, muon_dtype(settings)),
        window=window_of(settings, store),
        evaluate_every=settings.evaluate_every or (EVALUATE_EVERY if settings.hold_back else 0),
    )


def _loss(settings: TrainSettings, blocks: Blocks) -> str | None:
    """The `--loss` of our recipe: part by part first, where a student has many parts or narrow ones."""
    if settings.objective != "distil" or settings.loss is not None:
        return settings.loss
    narrow = any(width_of(settings, number) < 1 for number in range(len(blocks)))
    return SHAPED if narrow or len(blocks) > 2 else LOSSES["distil"]


def _depths(settings: TrainSettings, blocks: Blocks) -> Depth:
    """The layers in place of each block; one number for a single block."""
    depths = [_depth(settings, block, number) for number, block in enumerate(blocks)]
    if len(set(depths)) == 1:
        return depths[0]
    return tuple(1 if depth is None else depth for depth in depths)


def _check_student(settings: TrainSettings, blocks: Blocks) -> None:
    """Refuse blocks, or an objective, that are not of one student."""
    check_apart(blocks, "--joint with blocks")
    if settings.joint and settings.objective in CLOSED_FORM:
        raise SettingsError(
            f"--joint with --objective {settings.objective}", "an objective of steps", "leave out --joint"
        )


def _rate(settings: TrainSettings, block: tuple[int, int], teacher: Teacher) -> float:
    """The rate at its peak; where it is given, or nothing uses it, the teacher's weights are not read."""
    given = settings.learning_rate is not None or settings.objective in CLOSED_FORM
    return peak_rate(settings, None if given else load_layer(teacher, block[0]))


def _check_objective(settings: TrainSettings) -> None:
    """Refuse options that contradict one another, whatever the store."""
    if settings.condition != "none" and settings.objective in TIMELESS + CLOSED_FORM:
        raise SettingsError(
            f"--condition {settings.condition} with --objective {settings.objective}",
            "a flow: this layer sees x_0 and makes one step",
            "use --objective fw",
        )
    check_patience(settings)
    if settings.objective == "hybrid" and settings.alpha == 0:
        raise SettingsError("--objective hybrid --alpha 0", "a positive --alpha", "use --objective fw")
    if settings.loss is not None and settings.objective in ("hybrid", *CLOSED_FORM):
        raise SettingsError(
            f"--loss with --objective {settings.objective}",
            "one of the two",
            "write the sum as --loss fw,sfm:0.001",
        )


def check_patience(settings: TrainSettings | HealSettings) -> None:
    """Refuse to wait for a better loss where none is measured."""
    if settings.patience and not settings.hold_back:
        raise SettingsError(
            "--patience without --hold-back", "sequences to judge by", "give --hold-back 0.02"
        )


def _check_states(
    settings: TrainSettings, store: Store, block: tuple[int, int], number: int, terms: set[str]
) -> None:
    """Refuse a block whose states are not stored, unless the teacher runs."""
    m, n = block
    needed = [m, n]
    if "trajectory" in terms:
        needed = list(range(m, n + 1))
    elif width_of(settings, number) < 1:  # each layer is fitted on what its teacher's layer reads
        needed += [start for start, _ in parts(block, depth_of(settings, number) or 1)]
    needed = sorted(set(needed))
    absent = [state for state in needed if state not in store.layers]
    fitted = settings.objective in CLOSED_FORM and settings.objective != "skip"  # from the store alone
    if absent and (fitted or not settings.from_teacher):
        raise SettingsError(
            f"block {m}:{n}, which needs state {absent[0]}",
            f"states that the store holds: {_ranges(store.layers)}",
            f"choose another block, or extract with --layers {','.join(map(str, needed))}"
            if store.layers
            else "pass --from-teacher, or extract without --tokens-only into another --store",
        )
    if settings.objective == "replaceme":
        _check_layer_before(m, store)


def _check_branches(teacher: Teacher, block: tuple[int, int]) -> None:
    """Refuse a loss on each branch where a layer of the block has no two of them."""
    for layer in range(*block):
        form = teacher.family.form(teacher.config, layer)
        if form is None or not form.is_attention:
            raise SettingsError(
                f"a loss with branches on {teacher.name}, whose layer {layer} adds no attention output",
                "layers that add attention and MLP to the residual stream",
                "leave branches out of --loss",
            )


def _check_terms(settings: TrainSettings, store: Store, block: tuple[int, int], terms: set[str]) -> None:
    """Refuse terms that the store can't serve, or that the objective's layer has no time for."""
    m, n = block
    missing = [layer for layer in range(m, n) if layer not in store.attention_layers]
    if "branches" in terms and missing and not settings.from_teacher:
        raise SettingsError(
            f"a loss with branches on a store without the attention output of layer {missing[0]}",
            f"attention outputs of layers {m} to {n - 1}",
            "extract with --attention",
        )
    stored = sorted(terms & ON_STORED_LOGITS)
    if stored and not store.spec.logits:
        raise SettingsError(
            f"a loss with {stored[0]} on a store without logits",
            "a store with the teacher's top-K logits",
            "extract with --logits 64, or use the term logits",
        )
    walks = sorted(terms & {"fw", "sfm", "trajectory", "branches"})
    if settings.objective in TIMELESS and walks:
        raise SettingsError(
            f"--loss {settings.loss} with --objective {settings.objective}",
            f"terms without time: regression, local, {', '.join(sorted(ON_LOGITS))}",
            f"use --objective fw for the term {walks[0]}",
        )


def _check_tokens(settings: TrainSettings, store: Store) -> None:
    """Refuse a store without training sequences, and a batch far larger than it."""
    if store.num_sequences("train") == 0:
        raise StoreError(
            f"store {store.path} without training sequences", "at least one", "extract with more --tokens"
        )
    largest = max(LARGEST_BATCH, store.num_sequences("train") * store.context)
    if settings.batch_tokens > largest:
        raise SettingsError(
            f"--batch-tokens {settings.batch_tokens}",
            f"at most {largest}, what the store holds",
            "lower --batch-tokens",
        )


def _terms(settings: TrainSettings) -> set[str]:
    """The terms of all stages of a loss."""
    if settings.objective in CLOSED_FORM:
        return set()
    return {term for stage in parse_loss(loss_text(settings)) for term in stage.weights}


def _depth(settings: TrainSettings, block: tuple[int, int], number: int) -> int | None:
    if settings.depth is None and settings.objective == "distil":
        return 2 if block[1] - block[0] >= TWO_FOR and settings.init != "readout" else 1  # it fits one alone
    return depth_of(settings, number)


def _check_layers(settings: TrainSettings, block: tuple[int, int], number: int) -> None:
    """Refuse a start, or a number of layers, that the objective has no use for."""
    given = f"with --objective {settings.objective}"
    if settings.init != "layer" and settings.objective in CLOSED_FORM:
        raise SettingsError(f"--init {settings.init} {given}", "an objective of steps", "leave out --init")
    if settings.init == "readout" and settings.objective == "looped" and settings.walk_steps > 1:
        raise SettingsError(f"--init readout {given}", "a layer that is evaluated once", "leave out --init")
    width = width_of(settings, number)
    if width < 1 and (settings.objective in CLOSED_FORM or settings.init != "layer"):
        other = given if settings.objective in CLOSED_FORM else f"with --init {settings.init}"
        raise SettingsError(
            f"--width {width:g} {other}",
            "an objective of steps that starts from a layer",
            "leave out one of them",
        )
    depth = depth_of(settings, number)
    if depth in (None, 1):
        return
    if depth == 0 and not settings.joint:
        raise SettingsError("--depth 0 for a student of its own", "a layer", "use --objective skip")
    if settings.objective not in TIMELESS:
        raise SettingsError(f"--depth {depth} {given}", f"one of {', '.join(TIMELESS)}", "use one")
    if settings.init == "readout":
        raise SettingsError(f"--depth {depth} --init readout", "one layer", "leave out one of them")
    if depth >= block[1] - block[0]:
        raise SettingsError(
            f"--depth {depth} for a block of {block[1] - block[0]} layers",
            "fewer layers than are replaced",
            "choose a lower --depth, or a longer block",
        )


def _check_layer_before(m: int, store: Store) -> None:
    """ReplaceMe changes the layer before the block: there must be one, and what it gave."""
    if m == 0:
        raise SettingsError(
            "--objective replaceme for a block from layer 0",
            "a layer before the block, into which the map is merged",
            "choose another block, or --objective linear",
        )
    if m - 1 not in store.layers or m - 1 not in store.attention_layers:
        raise SettingsError(
            f"--objective replaceme on a store without state or attention output {m - 1}",
            "both: the output of that layer's MLP is their difference",
            "extract with --layers all --attention",
        )


def _ranges(layers: tuple[int, ...]) -> str:
    if not layers:
        return "none"
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))


def run_name(settings: TrainSettings, blocks: Blocks) -> str:
    """What a run is called that was given no name: after its blocks, objective and seed."""
    objective = settings.objective
    if objective in ("fw", "hybrid"):
        objective += str(settings.walk_steps) + ("" if settings.solver == "midpoint" else "-euler")
    if settings.objective == "looped":
        objective += str(settings.walk_steps)
    depths = [depth_of(settings, number) or 1 for number in range(len(blocks))]
    if max(depths) > 1 and settings.objective != "distil":
        objective += "-depth" + "-".join(map(str, dict.fromkeys(depths)))
    if settings.block == "each":
        place = "each"
    else:
        place = "+".join(f"{m}-{n}" for m, n in blocks) if len(blocks) <= 4 else f"{len(blocks)}-blocks"
    widths = {width_of(settings, number): None for number in range(len(blocks))}
    if widths.keys() != {1.0}:
        place += "-width" + "-".join(f"{width:g}" for width in widths)
    return f"{place}-{objective}-seed{settings.seed}"
