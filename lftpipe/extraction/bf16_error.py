"""What computing in bfloat16 costs: every stored state against float32, on the first batch of `train`."""

import math
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lftpipe.extraction.forward import Tokens, batch_of
from lftpipe.extraction.plan import Plan
from lftpipe.teacher.logits import compute_batch
from lftpipe.teacher.trunk import Trunk


def measured_trunk(plan: Plan, tokens: Tokens) -> tuple[Trunk, dict[str, Any]]:
    """The plan's trunk, and the error of its states against those computed in float32.

    The float32 trunk is gone before the other is loaded, and its states wait in a file without a name:
    measuring takes no more memory than extracting does.

    Parameters
    ----------
    plan
        What is extracted.
    tokens
        Of each split, token ids and document numbers.

    Returns
    -------
    Trunk
        Ready to extract with.
    dict
        `sequences`, `tokens`; of `hidden` and `attention` the lists `nmse` and `nmse_without_first`
        (position 0 left out), in the order of the stored layers. JSON-plain.
    """
    rows = range(min(plan.batch_sequences, len(tokens["train"][0])))
    batch = batch_of(tokens, "train", rows, torch.device(plan.device))
    kept = {"hidden": plan.layers, "attention": plan.attention_layers}
    errors: dict[str, dict[str, list[float | None]]] = {
        array: {"nmse": [], "nmse_without_first": []} for array, layers in kept.items() if layers
    }
    with tempfile.TemporaryFile(dir=plan.path.parent) as scratch:

        def write(array: str, layer: int | None, state: Tensor) -> None:
            if layer in kept[array]:
                scratch.write(state.float().cpu().contiguous().numpy().data)

        def compare(array: str, layer: int | None, state: Tensor) -> None:
            if layer in kept[array]:
                ours = state.float().cpu().numpy()
                theirs = np.frombuffer(scratch.read(ours.nbytes), np.float32).reshape(ours.shape)
                for name, first in (("nmse", 0), ("nmse_without_first", 1)):
                    errors[array][name].append(_nmse(ours[:, first:], theirs[:, first:]))

        exact = replace(plan, compute_dtype=torch.float32).load_trunk()
        compute_batch(exact, None, batch.tokens, batch.position_ids, write)
        del exact
        scratch.seek(0)
        trunk = plan.load_trunk()
        compute_batch(trunk, None, batch.tokens, batch.position_ids, compare)
    return trunk, {"sequences": len(batch), "tokens": batch.tokens.numel(), **errors}


def _nmse(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """Squared error over squared norm, to three digits: it is an estimate from one batch.

    None if it is not finite: extraction will say which state is not.
    """
    energy = float(np.square(theirs, dtype=np.float64).sum())
    error = float(np.square(ours - theirs, dtype=np.float64).sum())
    share = error / energy if energy else error
    return float(f"{share:.3g}") if math.isfinite(share) else None
