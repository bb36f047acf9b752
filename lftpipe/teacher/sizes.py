"""How many parameters a teacher and its layers have, from the checkpoint's headers."""

from lftpipe.teacher.parts import empty_layer
from lftpipe.teacher.source import Teacher
from lftpipe.teacher.tail import head_names


def count_parameters(teacher: Teacher) -> int:
    """Parameters of the whole teacher, from the checkpoint's headers; a tied head counts once."""
    if teacher.family.derived:
        return sum(teacher.checkpoint.sizes.values())
    family, sizes = teacher.family, teacher.checkpoint.sizes
    layer = {name for name, _ in empty_layer(teacher).layer.named_parameters()}
    wanted = {f"{family.layers_prefix}.{l}.{name}" for l in range(teacher.num_layers) for name in layer}  # noqa: E741
    wanted |= {f"{family.embedding_prefix}.weight", *head_names(teacher)}
    wanted |= {name for name in sizes if name.startswith(family.final_norm_prefix)}
    return sum(sizes[name] for name in wanted)


def count_layer_parameters(teacher: Teacher, index: int = 0) -> int:
    """Parameters of one layer."""
    return sum(parameter.numel() for parameter in empty_layer(teacher, index).parameters())


def keys_fraction(teacher: Teacher) -> float:
    """Fraction of a layer's parameters that make keys and values.

    It is what a position costs at least that others still attend to.
    """
    config = teacher.config
    if teacher.family.form(config, 0) is None:
        return 0.0  # a layer without keys that others attend to, as far as anyone knows
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    features = getattr(config, "head_dim", None) or teacher.width // config.num_attention_heads
    return 2 * heads * features * teacher.width / count_layer_parameters(teacher)
