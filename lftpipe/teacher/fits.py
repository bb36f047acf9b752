"""Whether a checkpoint's tensors are those that its config speaks of, seen from their shapes alone.

A config that does not match its weights is refused here, before anything of its sizes is built or allocated.
"""

from typing import Any

import torch

from lftpipe.errors import TeacherError, foreign
from lftpipe.teacher.branches import Branches
from lftpipe.teacher.checkpoint import Checkpoint
from lftpipe.teacher.context import AttentionContext, attention_context
from lftpipe.teacher.family import Family
from lftpipe.teacher.skeleton import LARGEST_BUFFER


def check_sizes(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse a config whose width, vocabulary or number of layers no tensor knows.

    Parameters
    ----------
    checkpoint
        Its files; only their headers are read.
    """
    shapes = checkpoint.shapes
    lengths = {length for shape in shapes.values() for length in shape}
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) not in lengths:
            _refuse(checkpoint, f"{name} {getattr(config, name)}", "one that a tensor has")
    if config.num_hidden_layers > len(shapes):
        _refuse(checkpoint, f"num_hidden_layers {config.num_hidden_layers}", "no more layers than tensors")


def check_layer(config: Any, family: Family, checkpoint: Checkpoint) -> None:
    """Refuse a config that makes no layer, or one whose tensors have other shapes than the checkpoint's.

    Parameters
    ----------
    config, family
        Of the model; the family is one that is written out.

    Raises
    ------
    TeacherError
        Naming the tensor, or with the reason why there is no layer.
    """
    folder = checkpoint.folder
    with foreign(TeacherError, f"{folder}", "a config that a layer can be built from", "correct config.json"):
        with torch.device("meta"):
            layer = Branches(family, config, 0)
        for name, parameter in layer.layer.named_parameters():
            full = f"{family.layers_prefix}.0.{name}"
            found = checkpoint.shapes.get(full)
            if found is not None and found != tuple(parameter.shape):
                _refuse(
                    checkpoint, f"shape {found} of {full}", f"{tuple(parameter.shape)}, as config.json says"
                )
        _try(config, family, layer)


def _try(config: Any, family: Family, layer: Branches) -> None:
    """Run a layer without weights, so that what its forward pass cannot use is found too."""
    with torch.device("meta"):
        norm, sizes = family.norm(config), [each.numel() for each in family.frame(config).buffers()]
    if max(sizes, default=0) > LARGEST_BUFFER:
        raise ValueError(f"a table of {max(sizes):,} rotary frequencies")
    context = attention_context(family.frame(config), torch.arange(4)[None], one_segment=True)
    cos, sin = (each.to("meta") for each in context.rotary)
    states = torch.empty(1, 4, config.hidden_size, device="meta")
    norm(layer(states, AttentionContext((cos, sin), None, context.position_ids.to("meta"))))


def _refuse(checkpoint: Checkpoint, given: str, expected: str) -> None:
    raise TeacherError(
        f"{checkpoint.folder}: config.json and weights of other models ({given})",
        expected,
        "fetch or save the model again",
    )
