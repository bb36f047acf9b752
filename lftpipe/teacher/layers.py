"""Single parts of a teacher, read straight from its checkpoint: a layer, a norm, the embedding.

Nothing here loads a whole model: training from the cache needs one layer, evaluation the tail.
"""

import torch
from torch import nn

from lftpipe.base.errors import TeacherError
from lftpipe.families.branches import Branches
from lftpipe.families.meta_model import materialise_buffers
from lftpipe.families.structure import structure_of
from lftpipe.teacher.source import Teacher


def empty_layer(teacher: Teacher, index: int = 0) -> Branches:
    """A layer of the teacher's shape, on the meta device, to be filled with other weights.

    Raises
    ------
    TeacherError
        If the family has no flow layers, with the reason.
    """
    if teacher.family.without_flow:
        raise TeacherError(
            f"a single layer of {teacher.model}, a {teacher.config.model_type} model",
            f"layers that can be run alone, but {teacher.family.without_flow}",
            "extract and recouple work; flow layers and the frozen tail do not",
        )
    with torch.device("meta"):
        return Branches(teacher.family, teacher.config, index)


def load_layer(teacher: Teacher, index: int) -> Branches:
    """Layer `index` with the teacher's weights, in float32.

    Raises
    ------
    TeacherError
        If the family has no flow layers, or the branches that were found do not make the layer.
    """
    layer = empty_layer(teacher, index)
    fill(layer.layer, teacher, f"{teacher.family.layers_prefix}.{index}.")
    if teacher.family.derived and layer.form is not None:
        _check_branches(layer, teacher)
    return layer


@torch.no_grad()
def _check_branches(layer: Branches, teacher: Teacher) -> None:
    """Compare a layer's branches with its own forward pass, on four random states."""
    context = structure_of(teacher.config).four_positions
    x = torch.randn(1, 4, teacher.width, generator=torch.Generator().manual_seed(0))
    ours, theirs = layer(x, context), layer.own(x, context)
    if not bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()):
        raise TeacherError(
            f"layer {layer.index} of {teacher.model}, whose two branches do not make its output",
            "a layer that adds attention and MLP to the residual stream",
            "extract and recouple it; flow layers it has none",
        )


def load_norm(teacher: Teacher, index: int) -> nn.Module:
    """What `h[index]` is first read through: the norm before attention of that layer, or the final one.

    Raises
    ------
    TeacherError
        If that layer reads the states as they are.
    """
    if index < teacher.num_layers:
        layer = load_layer(teacher, index)
        if layer.form is None or layer.form.attention.norm is None:
            raise TeacherError(
                f"a norm before layer {index} of {teacher.model}",
                "a layer that norms what it reads",
                "choose another --loss-scale than norm",
            )
        return layer.attention_norm
    norm = teacher.family.norm(teacher.config)
    fill(norm, teacher, f"{teacher.family.final_norm_prefix}.")
    return norm


def load_rotary(teacher: Teacher) -> nn.Module:
    """What `attention_context` turns position ids into a context with."""
    return teacher.family.frame(teacher.config)


def load_embedding(teacher: Teacher) -> nn.Module:
    """From token ids to `h[0]`.

    Raises
    ------
    TeacherError
        If the family is not written out: nothing then says what else happens to an embedding.
    """
    if teacher.family.derived:
        raise TeacherError(
            f"the embedding of {teacher.model}, a {teacher.config.model_type} model",
            "a store with state 0, which is read in its place",
            "extract with layer 0 in --layers",
        )
    name = f"{teacher.family.embedding_prefix}.weight"
    weight = teacher.checkpoint.read([name])[name]
    return nn.Embedding.from_pretrained(weight, freeze=True)


def fill(module: nn.Module, teacher: Teacher, prefix: str, *, strip: str = "") -> None:
    """Give a module on the meta device the teacher's tensors, and the buffers that no file holds.

    Parameters
    ----------
    strip
        Of their names in the module, what the checkpoint's names don't have.
    """
    names = {name: prefix + name.removeprefix(strip) for name in _stored(module)}
    tensors = teacher.checkpoint.read(list(dict.fromkeys(names.values())))
    given = {name: tensors[source] for name, source in names.items()}
    module.load_state_dict(given, assign=True, strict=not strip)
    fill_buffers(teacher, module)
    module.eval().requires_grad_(False)


def fill_buffers(teacher: Teacher, module: nn.Module) -> None:
    """Give a module the buffers that no checkpoint holds; those of written-out families have none.

    Parameters
    ----------
    module
        Of the teacher's layers, on the meta device or with weights.
    """
    if teacher.family.derived:
        materialise_buffers(structure_of(teacher.config).model, module)


def _stored(module: nn.Module) -> list[str]:
    """Names of what a checkpoint holds of a module: parameters, and buffers that are saved."""
    return list(module.state_dict())
