"""Single parts of a teacher, read straight from its checkpoint: a layer, a norm, the embedding.

Nothing here loads a whole model: training from the cache needs one layer, evaluation the tail.
"""

import inspect

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lftpipe.base.errors import TeacherError
from lftpipe.families import meta_model
from lftpipe.families.branches import Branches
from lftpipe.families.forward_args import Recorder
from lftpipe.families.meta_model import materialise_buffers
from lftpipe.families.structure import structure_of
from lftpipe.teacher.source import Teacher


def empty_layer(teacher: Teacher, index: int = 0) -> Branches:
    """A layer of the teacher's shape, on the meta device, to be filled with other weights.

    Raises `TeacherError` if the family has no flow layers, with the reason.
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

    Raises `TeacherError` if the family has no flow layers, or the branches that were found do not make the
    layer.
    """
    layer = empty_layer(teacher, index)
    fill(layer.layer, teacher, f"{teacher.family.layers_prefix}.{index}.")
    if layer.form is not None:
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

    Raises `TeacherError` if that layer reads the states as they are.
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


class Embedding(nn.Module):
    """From token ids to `h[0]`: the model's own forward pass up to its first layer."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        structure = structure_of(teacher.config)
        model = meta_model.build(teacher.config, structure.implementation)
        first = Recorder(model.get_submodule(structure.path)[0])
        first.arity = structure.arity
        model.set_submodule(structure.path, nn.ModuleList([first]))
        self.base, self._first = model.base_model, [first]
        fill(self.base, teacher, structure.base_prefix)
        self._takes_places = "position_ids" in inspect.signature(self.base.forward).parameters

    def forward(
        self, tokens: Int[Tensor, "sequence position"], position_ids: Int[Tensor, "sequence position"]
    ) -> Float[Tensor, "sequence position feature"]:
        """The states that enter the first layer."""
        places = {"position_ids": position_ids} if self._takes_places else {}
        self.base(input_ids=tokens, use_cache=False, **places)
        states = self._first[0].states
        assert states is not None
        return states


def load_embedding(teacher: Teacher) -> Embedding:
    """From token ids to `h[0]`."""
    return Embedding(teacher)


def fill(module: nn.Module, teacher: Teacher, prefix: str, *, strip: str = "") -> None:
    """Give a module on the meta device the teacher's tensors, and the buffers that no file holds.

    `strip`: of their names in the module, what the checkpoint's names don't have.
    """
    names = {name: prefix + name.removeprefix(strip) for name in _stored(module)}
    tensors = teacher.checkpoint.read(list(dict.fromkeys(names.values())))
    given = {name: tensors[source] for name, source in names.items()}
    module.load_state_dict(given, assign=True, strict=not strip)
    fill_buffers(teacher, module)
    module.eval().requires_grad_(False)


def fill_buffers(teacher: Teacher, module: nn.Module) -> None:
    """Give a module the buffers that no checkpoint holds.

    `module`: of the teacher's layers, on the meta device or with weights.
    """
    materialise_buffers(structure_of(teacher.config).model, module)


def _stored(module: nn.Module) -> list[str]:
    """Names of what a checkpoint holds of a module: parameters, and buffers that are saved."""
    return list(module.state_dict())
