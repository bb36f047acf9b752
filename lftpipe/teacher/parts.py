"""Single parts of a teacher, read straight from its checkpoint: a layer, the tail, the head.

Nothing here loads a whole model: training from the cache needs one layer, evaluation the tail.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lftpipe.teacher.family import AttentionContext, Branches
from lftpipe.teacher.source import Teacher


def empty_layer(teacher: Teacher, index: int = 0) -> Branches:
    """A layer of the teacher's shape, on the meta device, to be filled with other weights."""
    with torch.device("meta"):
        return Branches(teacher.family, teacher.config, index)


def load_layer(teacher: Teacher, index: int) -> Branches:
    """Layer `index` with the teacher's weights, in float32."""
    layer = empty_layer(teacher, index)
    _fill(layer.layer, teacher, f"{teacher.family.layers_prefix}.{index}.")
    return layer


def load_norm(teacher: Teacher, index: int) -> nn.Module:
    """What `h[index]` is first read through: the norm before attention of that layer, or the final one."""
    if index < teacher.num_layers:
        return load_layer(teacher, index).attention_norm
    norm = teacher.family.norm(teacher.config)
    _fill(norm, teacher, f"{teacher.family.final_norm_prefix}.")
    return norm


def load_rotary(teacher: Teacher) -> nn.Module:
    """The module that turns position ids into the rotary `(cos, sin)`."""
    return teacher.family.rotary(teacher.config)


class Tail(nn.Module):
    """The frozen end of the teacher: layers `start .. L-1`, final norm and LM head."""

    def __init__(self, teacher: Teacher, start: int) -> None:
        super().__init__()
        self.start = start
        self.layers = nn.ModuleList(load_layer(teacher, l) for l in range(start, teacher.num_layers))  # noqa: E741
        self.norm = load_norm(teacher, teacher.num_layers)
        self.head = nn.Linear(teacher.width, teacher.config.vocab_size, bias=False, device="meta")
        self.head.load_state_dict({"weight": _head_weight(teacher)}, assign=True)
        self.eval().requires_grad_(False)

    def states(
        self,
        h: Float[Tensor, "sequence position feature"],
        context: AttentionContext,
        *,
        start: int,
        stop: int,
    ) -> Float[Tensor, "sequence position feature"]:
        """From `h[start]` to `h[stop]` through the teacher's own layers."""
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
        """Next-token logits from `h[start]`; `start` defaults to the tail's own."""
        start = self.start if start is None else start
        h = self.states(h, context, start=start, stop=self.start + len(self.layers))
        return self.head(self.norm(h))


def count_parameters(teacher: Teacher) -> int:
    """Parameters of the whole teacher, from the checkpoint's headers; a tied head counts once."""
    family, sizes = teacher.family, teacher.checkpoint.sizes
    layer = {name for name, _ in empty_layer(teacher).layer.named_parameters()}
    wanted = {f"{family.layers_prefix}.{l}.{name}" for l in range(teacher.num_layers) for name in layer}  # noqa: E741
    wanted |= {f"{family.embedding_prefix}.weight", *_head_names(teacher)}
    wanted |= {name for name in sizes if name.startswith(family.final_norm_prefix)}
    return sum(sizes[name] for name in wanted)


def count_layer_parameters(teacher: Teacher) -> int:
    """Parameters of one layer."""
    return sum(parameter.numel() for parameter in empty_layer(teacher).parameters())


def keys_share(teacher: Teacher) -> float:
    """Share of a layer's parameters that make keys and values.

    It is what a position costs at least that others still attend to.
    """
    config = teacher.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    features = getattr(config, "head_dim", None) or teacher.width // config.num_attention_heads
    return 2 * heads * features * teacher.width / count_layer_parameters(teacher)


def _head_names(teacher: Teacher) -> list[str]:
    """The head's weight in the checkpoint; empty where it is tied to the embedding."""
    return [name for name in teacher.family.head_names if teacher.checkpoint.has(name)][:1]


def _head_weight(teacher: Teacher) -> Tensor:
    name = (_head_names(teacher) or [f"{teacher.family.embedding_prefix}.weight"])[0]
    return teacher.checkpoint.read([name])[name]


def _fill(module: nn.Module, teacher: Teacher, prefix: str) -> None:
    names = [name for name, _ in module.named_parameters()]
    tensors = teacher.checkpoint.read([prefix + name for name in names])
    module.load_state_dict({name: tensors[prefix + name] for name in names}, assign=True)
    module.eval().requires_grad_(False)
