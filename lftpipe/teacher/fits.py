"""Whether a checkpoint's tensors are those that its config speaks of, seen from their shapes alone.

A config that does not match its weights is refused here, before anything of its sizes is built or allocated.
"""

from typing import Any

from lftpipe.errors import TeacherError
from lftpipe.teacher.checkpoint import Checkpoint
from lftpipe.teacher.family import Family


def check_sizes(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse a config whose width, vocabulary or number of layers no tensor knows.

    Parameters
    ----------
    config
        Of the model.
    checkpoint
        Its files; only their headers are read.

    Raises
    ------
    TeacherError
        Naming what does not fit.
    """
    shapes = checkpoint.shapes
    lengths = {length for shape in shapes.values() for length in shape}
    for name in ("hidden_size", "vocab_size"):
        if getattr(config, name) not in lengths:
            _refuse(checkpoint, f"{name} {getattr(config, name)}", "one that a tensor has")
    if config.num_hidden_layers > len(shapes):
        _refuse(checkpoint, f"num_hidden_layers {config.num_hidden_layers}", "no more layers than tensors")


def check_layer(config: Any, family: Family, checkpoint: Checkpoint) -> None:
    """Refuse a config whose first layer has tensors of other shapes than the checkpoint.

    Parameters
    ----------
    config, family
        Of the model; the family is one that is written out.
    checkpoint
        Its files.

    Raises
    ------
    TeacherError
        Naming the tensor.
    """
    import torch

    with torch.device("meta"):
        layer = family.layer(config, 0)
    for name, parameter in layer.named_parameters():
        full = f"{family.layers_prefix}.0.{name}"
        found = checkpoint.shapes.get(full)
        if found is not None and found != tuple(parameter.shape):
            _refuse(checkpoint, f"shape {found} of {full}", f"{tuple(parameter.shape)}, as config.json says")


def _refuse(checkpoint: Checkpoint, given: str, expected: str) -> None:
    raise TeacherError(
        f"{checkpoint.folder}: config.json and weights of other models ({given})",
        expected,
        "fetch or save the model again",
    )
