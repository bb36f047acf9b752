"""`produce(plan, shard) -> records`: computing a shard, on whatever machine, without the store's lock."""

import functools
import json
import uuid
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch

from lftpipe.extraction.background import Commit
from lftpipe.extraction.bf16_error import bf16_error
from lftpipe.extraction.forward import Advance, Passes
from lftpipe.extraction.frozen import FrozenPlan
from lftpipe.store import Sealed, ShardKey
from lftpipe.teacher.lanes import Lanes
from lftpipe.teacher.logits import Head
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.streamed import StreamedTrunk
from lftpipe.teacher.trunk import Trunk


class Producer:
    """A teacher that computes shards of a plan; it is loaded when the first one is asked for.

    Parameters
    ----------
    teacher
        The plan's teacher, if it is open already; else it is found by name, and its files are compared.
    attempts
        How the names of the files begin; left out, with the plan's epoch.
    """

    def __init__(
        self, plan: FrozenPlan, device: str, teacher: Teacher | None = None, attempts: str | None = None
    ) -> None:
        plan.check_device(device)
        self.plan, self.device = plan, device
        # No other process, living or thought dead, may ever use the same names.
        self._attempt = f"{attempts or f'e{plan.epoch}'}-{uuid.uuid4().hex[:12]}"
        if teacher is None:
            teacher = plan.open_teacher()
            plan.check_teacher(teacher)
        self.teacher = teacher

    def run(self, keys: Iterable[ShardKey | None], commit: Commit, advance: Advance = lambda _: None) -> None:
        """Compute shards; see `Passes.run`.

        Parameters
        ----------
        keys
            Which shards; None if there is none for now.
        """
        self._passes.run(keys, commit, advance)

    def measure(self) -> dict[str, Any]:
        """What computing in bfloat16 costs; before the first shard it takes less memory."""
        with Lanes(1) if torch.device(self.device).type == "cpu" else nullcontext():
            return bf16_error(
                self.plan.path,
                self.plan.spec,
                lambda: self._load_trunk(torch.float32, "cpu"),
                lambda: self._trunk,
                self.device,
            )

    @cached_property
    def _trunk(self) -> Trunk:
        return self._load_trunk(getattr(torch, self.plan.spec.identity["compute_dtype"]), self.device)

    @cached_property
    def _passes(self) -> Passes:
        spec = self.plan.spec
        head = Head(self.teacher, spec.logits, self.device) if spec.logits else None
        # A whole shard where layers are streamed: each is read once for it.
        streamed = self.plan.stream_layers
        sequences = spec.sequences_per_shard if streamed else spec.identity["batch_sequences"]
        return Passes(self.plan.path, spec, self._trunk, head, self._attempt, sequences)

    def _load_trunk(self, compute_dtype: torch.dtype, device: str) -> Trunk:
        """The layers below the deepest state that is stored; logits need the last state."""
        spec = self.plan.spec
        deepest = self.teacher.num_layers if spec.logits else max(spec.layers)
        if self.plan.stream_layers:
            batch = spec.identity["batch_sequences"]
            return StreamedTrunk(self.teacher, deepest, compute_dtype, self.device, batch_sequences=batch)
        return Trunk(self.teacher, deepest, compute_dtype, device)


def needs_measure(plan: FrozenPlan) -> bool:
    """Whether the error of the compute dtype is still to be measured: once in a store's life."""
    spec = plan.spec
    exact = spec.identity["compute_dtype"] == "float32"
    return not exact and "compute_error" not in spec.details and bool(spec.sequences["train"])


def produce(plan: dict[str, Any], key: ShardKey, device: str = "cpu") -> Sealed:
    """Compute one shard, with a teacher that stays loaded for the next one.

    Returns
    -------
    Sealed
        The shard's files are on the disk, under names of this attempt; `StoreWriter.commit` takes them.
    """
    sealed: list[Sealed] = []
    producer_of(json.dumps(plan), device).run([key], sealed.append)
    return sealed[0]


@functools.lru_cache(maxsize=1)
def producer_of(plan: str, device: str) -> Producer:
    """The producer of a plan in JSON, kept for the next shard."""
    return Producer(FrozenPlan.from_json(json.loads(plan)), device)
