"""Single parts of a teacher, read straight from its checkpoint: a layer, the tail, the head.

Nothing here loads a whole model: training from the cache needs one layer, evaluation the tail.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor, nn

from lftpipe.errors import TeacherError
from lftpipe.teacher.family import AttentionContext, Branches
from lftpipe.teacher.skeleton import materialise_buffers
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.structure import Logits, structure_of


def empty_layer(teacher: Teacher, index: int = 0) -> Branches:
    """A layer of the teacher's shape, on the meta device, to be filled with other weights.

    Parameters
    ----------
    teacher
        The teacher.
    index
        Which layer's shape.

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

    Parameters
    ----------
    teacher
        The teacher.
    index
        Which layer.

    Raises
    ------
    TeacherError
        If the family has no flow layers, or the branches that were found do not make the layer.
    """
    layer = empty_layer(teacher, index)
    _fill(layer.layer, teacher, f"{teacher.family.layers_prefix}.{index}.")
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

    Parameters
    ----------
    teacher
        The teacher.
    index
        Which state.

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
    _fill(norm, teacher, f"{teacher.family.final_norm_prefix}.")
    return norm


def load_rotary(teacher: Teacher) -> nn.Module:
    """What `attention_context` turns position ids into a context with.

    Parameters
    ----------
    teacher
        The teacher.
    """
    return teacher.family.frame(teacher.config)


def load_embedding(teacher: Teacher) -> nn.Module:
    """From token ids to `h[0]`.

    Parameters
    ----------
    teacher
        The teacher.

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


class Tail(nn.Module):
    """The frozen end of the teacher: layers `start .. L-1`, final norm and LM head."""

    def __init__(self, teacher: Teacher, start: int) -> None:
        super().__init__()
        self.start, self.vocabulary = start, teacher.config.vocab_size
        self.layers = nn.ModuleList(load_layer(teacher, l) for l in range(start, teacher.num_layers))  # noqa: E741
        self.norm = load_norm(teacher, teacher.num_layers)
        self.head = _load_head(teacher)
        self.eval().requires_grad_(False)

    @cached_property
    def linear_head(self) -> nn.Linear | None:
        """The head where it is one linear map: no soft-cap, no scale, as a look at random states shows."""
        if isinstance(self.head, nn.Linear):
            return self.head
        own = self.head.get_output_embeddings() if isinstance(self.head, Logits) else None
        if not isinstance(own, nn.Linear):
            return None
        x = torch.randn(4, own.in_features, generator=torch.Generator().manual_seed(0)).to(own.weight)
        with torch.no_grad():
            same = torch.allclose(own(x).float(), self.head(x).float(), rtol=1e-3, atol=1e-3)
        return own if same else None

    def states(
        self,
        h: Float[Tensor, "sequence position feature"],
        context: AttentionContext,
        *,
        start: int,
        stop: int,
    ) -> Float[Tensor, "sequence position feature"]:
        """From `h[start]` to `h[stop]` through the teacher's own layers.

        Parameters
        ----------
        h
            States that enter layer `start`.
        context
            Positions and mask.
        start, stop
            From where to where, within the tail.
        """
        for layer in self.layers[start - self.start : stop - self.start]:
            h = layer(h, context)
        return h

    def forward(
        self,
        h: Float[Tensor, "sequence position feature"],
        context: AttentionContext,
        *,
        start: int | None = None,
    ) -> Float[Tensor, "sequence position vocabulary"]:
        """Next-token logits from `h[start]`; `start` defaults to the tail's own.

        Parameters
        ----------
        h
            States that enter layer `start`.
        context
            Positions and mask.
        start
            Which layer is the first to run.
        """
        start = self.start if start is None else start
        h = self.states(h, context, start=start, stop=self.start + len(self.layers))
        return self.head(self.norm(h))


def count_parameters(teacher: Teacher) -> int:
    """Parameters of the whole teacher, from the checkpoint's headers; a tied head counts once.

    Parameters
    ----------
    teacher
        The teacher.
    """
    if teacher.family.derived:
        return sum(teacher.checkpoint.sizes.values())
    family, sizes = teacher.family, teacher.checkpoint.sizes
    layer = {name for name, _ in empty_layer(teacher).layer.named_parameters()}
    wanted = {f"{family.layers_prefix}.{l}.{name}" for l in range(teacher.num_layers) for name in layer}  # noqa: E741
    wanted |= {f"{family.embedding_prefix}.weight", *_head_names(teacher)}
    wanted |= {name for name in sizes if name.startswith(family.final_norm_prefix)}
    return sum(sizes[name] for name in wanted)


def count_layer_parameters(teacher: Teacher) -> int:
    """Parameters of one layer.

    Parameters
    ----------
    teacher
        The teacher.
    """
    return sum(parameter.numel() for parameter in empty_layer(teacher).parameters())


def keys_share(teacher: Teacher) -> float:
    """Share of a layer's parameters that make keys and values.

    It is what a position costs at least that others still attend to.

    Parameters
    ----------
    teacher
        The teacher.
    """
    config = teacher.config
    if teacher.family.form(config, 0) is None:
        return 0.0  # a layer without keys that others attend to, as far as anyone knows
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    features = getattr(config, "head_dim", None) or teacher.width // config.num_attention_heads
    return 2 * heads * features * teacher.width / count_layer_parameters(teacher)


def _head_names(teacher: Teacher) -> list[str]:
    """The head's weight in the checkpoint; empty where it is tied to the embedding."""
    return [name for name in teacher.family.head_names if teacher.checkpoint.has(name)][:1]


def _load_head(teacher: Teacher) -> nn.Module:
    family = teacher.family
    if family.head is not None:
        head = family.head(teacher.config)
        _fill(head, teacher, "", strip="model.")
        return head
    head = nn.Linear(teacher.width, teacher.config.vocab_size, bias=False, device="meta")
    head.load_state_dict({"weight": _head_weight(teacher)}, assign=True)
    return head


def _head_weight(teacher: Teacher) -> Tensor:
    name = (_head_names(teacher) or [f"{teacher.family.embedding_prefix}.weight"])[0]
    return teacher.checkpoint.read([name])[name]


def _fill(module: nn.Module, teacher: Teacher, prefix: str, *, strip: str = "") -> None:
    """Give a module on the meta device the teacher's tensors, and the buffers that no file holds.

    Parameters
    ----------
    prefix
        Of the tensors' names in the checkpoint.
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
    teacher
        Whose config gives the values.
    module
        Of the teacher's layers, on the meta device or with weights.
    """
    if teacher.family.derived:
        materialise_buffers(structure_of(teacher.config).model, module)


def _stored(module: nn.Module) -> list[str]:
    """Names of what a checkpoint holds of a module: parameters, and buffers that are saved."""
    return list(module.state_dict())


class TopLogits(NamedTuple):
    """The largest logits of every position, descending, their tokens, and all logits' log-sum-exp."""

    values: Float[Tensor, "sequence position rank"]
    ids: Int32[Tensor, "sequence position rank"]
    normaliser: Float32[Tensor, "sequence position"]


class Layers(nn.Module):
    """Some of the teacher's own layers, one after the other.

    Parameters
    ----------
    teacher
        Whose layers.
    start, stop
        From `h[start]` to `h[stop]`.
    """

    def __init__(self, teacher: Teacher, start: int, stop: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(load_layer(teacher, index) for index in range(start, stop))

    def forward(
        self, h: Float[Tensor, "sequence position feature"], context: AttentionContext
    ) -> Float[Tensor, "sequence position feature"]:
        """The states after the layers.

        Parameters
        ----------
        h
            The states before them.
        context
            Positions and mask of the sequences.
        """
        for layer in self.layers:
            h = layer(h, context)
        return h


def load_bridges(
    teacher: Teacher, blocks: Sequence[tuple[int, int]], device: str | torch.device
) -> list[Layers]:
    """The layers between each block and the next one, for students of several flow layers.

    Parameters
    ----------
    teacher
        Whose layers.
    blocks
        Half-open, in order.
    device
        Where they run.
    """
    return [Layers(teacher, n, m).to(device) for (_, n), (m, _) in pairwise(blocks)]
