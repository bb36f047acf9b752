"""Candidates for the parts of a student, each trained alone on cached states, all from the same reads."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lftpipe import runs
from lftpipe.base.errors import RunError, TeacherError
from lftpipe.base.shape import Part, channels_of
from lftpipe.config.settings import PlanSettings, TrainSettings
from lftpipe.data.batches import BatchFields, BatchReader
from lftpipe.families.narrow import mlp_maps
from lftpipe.flow.objective import TINY
from lftpipe.store import Store
from lftpipe.teacher.layers import empty_layer
from lftpipe.teacher.source import Teacher
from lftpipe.training.checkpoint import changed_settings
from lftpipe.training.several import train_runs
from lftpipe.training.validate import Wanted, resolved

#: Layers of the longest block that a candidate replaces, and of the deepest replacement.
LONGEST, DEEPEST = 8, 2

#: Bytes of weights, gradients and momenta of candidates that are trained side by side, and their number.
GROUP_BYTES, GROUP = 2**31, 48

#: Of weights, gradients, momentum and an evaluation's copy, for each parameter.
BYTES_EACH = 16

#: Sequences on which displacements are measured.
DISPLACED = 8


def candidates(teacher: Teacher, store: Store, settings: PlanSettings) -> list[Part]:
    """Every part that is worth a trial, the most promising first.

    Single layers come first: narrow ones, then none at all. Blocks follow by what they do to the states
    for each layer that is saved, which is known without training.
    """
    single = _narrow(teacher, settings.widths)
    single += [Part(index, index + 1, "skip") for index in range(teacher.num_layers)]
    moved = _displacements(teacher, store, settings.device, range(2, LONGEST + 1))
    blocks = [
        Part(m, n, "layer" if depth == 1 else "layers", depth=depth)
        for m, n in moved
        for depth in range(1, DEEPEST + 1)
        if n - m > depth
    ]
    blocks.sort(key=lambda part: moved[part.block] / (part.stop - part.start - part.depth))
    return [part for part in single + blocks if set(part.block) <= set(store.layers)]


def _narrow(teacher: Teacher, widths: Sequence[float]) -> list[Part]:
    """Every layer at every width below its own; none where the family's MLPs cannot be narrowed."""
    found: list[Part] = []
    for index in range(teacher.num_layers):
        try:
            channels = mlp_maps(empty_layer(teacher, index)).channels
        except TeacherError:
            return []
        counts = {channels_of(width, channels): width for width in sorted(widths)}
        found += [
            Part(index, index + 1, "layer", width=width)
            for count, width in counts.items()
            if count < channels
        ]
    return found


def stillest_block(teacher: Teacher, store: Store, device: str, length: int) -> tuple[int, int]:
    """The block of so many layers that changes states least."""
    moved = _displacements(teacher, store, device, range(length, length + 1))
    return min(moved, key=lambda block: moved[block])


def _displacements(
    teacher: Teacher, store: Store, device: str, lengths: range
) -> dict[tuple[int, int], float]:
    """The mean relative change of a state from the start of a block to its end."""
    blocks = [
        (m, m + length)
        for length in lengths
        for m in range(teacher.num_layers - length + 1)
        if {m, m + length} <= set(store.layers)
    ]
    count = min(DISPLACED, store.num_sequences("train"))
    reader = BatchReader(store, teacher, device)
    states = reader.read("train", range(count), BatchFields(store.layers)).states
    squares = {layer: state.square().sum(-1) + TINY for layer, state in states.items()}
    return {(m, n): ((states[n] - states[m]).square().sum(-1) / squares[n]).mean().item() for m, n in blocks}


def groups(teacher: Teacher, parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Candidates that fit into memory side by side, in order."""
    group: list[Part] = []
    size = 0
    for part in parts:
        weights = runs.build_flow(teacher, [part]).parameters()
        needed = BYTES_EACH * sum(weight.numel() for weight in weights)
        if group and (size + needed > GROUP_BYTES or len(group) == GROUP):
            yield group
            group, size = [], 0
        group.append(part)
        size += needed
    if group:
        yield group


def trained(
    parts: Sequence[Part], folder: Path, settings: PlanSettings, store: Store, teacher: Teacher
) -> list[runs.Run]:
    """The runs of candidates, each trained alone on its own states; what was trained before stays."""
    wanted: list[Wanted] = []
    for part in parts:
        given = resolved(_settings_of(part, settings, store), store, [part.block], teacher)
        run = folder / _name(part)
        wanted.append((run, _agreed(run, given, store, settings.force), [part.block]))
    train_runs(wanted, store, teacher)
    return [runs.open_run(run) for run, _, _ in wanted]


def _settings_of(part: Part, settings: PlanSettings, store: Store) -> TrainSettings:
    """How a candidate is trained: as a part of the whole student will be at first."""
    given = {
        "workspace": settings.workspace,
        "store": store.path,
        "seed": settings.seed,
        "device": settings.device,
        "threads": settings.threads,
        "compute_dtype": settings.compute_dtype,
        "hold_back": settings.hold_back,
        "block": f"{part.start}:{part.stop}",
        "tokens": settings.tokens,
        "batch_tokens": settings.batch_tokens,
        "resume": True,
    }
    if part.kind == "skip":
        return TrainSettings(**given, objective="skip")
    return TrainSettings(
        **given,
        objective="distil",
        loss="local" if part.width < 1 else "regression",
        width=(part.width,),
        depth=part.depth,
        evaluate_every=10**9,  # at the end alone: nothing is chosen by what is held back
    )


def _name(part: Part) -> str:
    if part.kind == "skip":
        return f"{part.start}-{part.stop}-skip"
    return f"{part.start}-{part.stop}-depth{part.depth}-width{part.width:g}"


def _agreed(run: Path, wanted: TrainSettings, store: Store, force: bool) -> TrainSettings:
    """The settings, if the candidate was not begun with others; with `force`, they then start it anew."""
    if not (run / runs.SETTINGS).exists():
        return wanted
    for key, before, now in changed_settings(run, wanted, store):
        if force:
            return replace(wanted, force=True)
        raise RunError(
            f"{key} = {now} for the candidates in {run.parent}",
            f"{key} = {before}, as the plan was begun",
            "use the same settings, or --force to train them again",
        )
    return wanted
