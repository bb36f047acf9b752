"""A student as a plain checkpoint of the teacher's architecture: branches folded, steps unrolled."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lftpipe.base.errors import RunError
from lftpipe.base.shape import Part
from lftpipe.families.branches import Branches
from lftpipe.families.family import Branch, Family
from lftpipe.families.forward_args import alike
from lftpipe.families.layer_probe import is_transposed, weight_of
from lftpipe.families.narrow import mlp_maps
from lftpipe.families.structure import Structure, structure_of
from lftpipe.flow.part import LayerStack
from lftpipe.student.assemble import fill
from lftpipe.student.flow_layer import FlowLayer

# --- What a velocity's modulation does to a branch, folded into the tensors of an ordinary layer.

Tensors = dict[str, Tensor]


def obstacle(layer: Branches) -> str | None:
    """Why a layer's modulation folds into no ordinary layer; None if it does."""
    form = layer.form
    if form is None:
        return "a layer that is modulated as a whole, not in its branches"
    if form.attention.norm is not None and form.attention.norm == form.mlp.norm:
        return "two branches behind one norm, each with a scale of its own"
    for name, branch in (("attention", form.attention), ("MLP", form.mlp)):
        if branch.post_norm is None and branch.output is None:
            return f"an {name} that ends in no linear map, which a gate would fold into"
        if not _has_weight(layer.layer, branch.norm) and not _inputs(layer.layer, branch):
            return f"an {name} that begins neither with a norm's weight nor with linear maps"
        if branch.post_norm is not None and not _has_weight(layer.layer, branch.post_norm):
            return f"an {name} whose output passes a norm without weight"
    return None


def fold_branch(
    step: Tensors, layer: nn.Module, branch: Branch, scale: Tensor, gate: Tensor, shift: Tensor | None
) -> None:
    """`gate * branch((1 + scale) * norm(x) + shift)` as tensors of an ordinary layer."""
    if _has_weight(layer, branch.norm):
        _scale_norm(step, layer, str(branch.norm), 1 + scale, shift)
    else:
        for name in _inputs(layer, branch):
            step[f"{name}.weight"] = (1 + scale)[None, :] * step[f"{name}.weight"]
    if branch.post_norm is not None:
        _scale_norm(step, layer, branch.post_norm, gate, None)
        return
    name = str(branch.output)
    rows = gate[None, :] if is_transposed(layer.get_submodule(name)) else gate[:, None]
    step[f"{name}.weight"] = rows * step[f"{name}.weight"]
    if (bias := step.get(f"{name}.bias")) is not None:
        step[f"{name}.bias"] = gate * bias


def _scale_norm(step: Tensors, layer: nn.Module, name: str, factor: Tensor, shift: Tensor | None) -> None:
    """`factor * norm(x) + shift`; some norms keep their weight less one."""
    offset = _offset(layer.get_submodule(name))
    weight = step[f"{name}.weight"]
    step[f"{name}.weight"] = factor * (weight + offset) - offset if offset else factor * weight
    if (bias := step.get(f"{name}.bias")) is not None:
        step[f"{name}.bias"] = factor * bias + (0 if shift is None else shift)


def _has_weight(layer: nn.Module, name: str | None) -> bool:
    return name is not None and getattr(layer.get_submodule(name), "weight", None) is not None


@torch.no_grad()
def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 1 for Gemma's, else 0."""
    bare: Any = copy.deepcopy(norm)
    for parameter in bare.parameters():
        parameter.zero_()
    rising = torch.arange(1.0, 1 + bare.weight.shape[-1], device=bare.weight.device)[None]
    return 0.0 if bool((bare(rising) == 0).all()) else 1.0


def _inputs(layer: nn.Module, branch: Branch) -> list[str]:
    """Linear maps of a branch's module that read its input."""
    if branch.output is None:
        return []
    module = layer.get_submodule(branch.module)
    width = len(weight_of(layer.get_submodule(branch.output)))
    names = [
        f"{branch.module}.{name}"
        for name, part in module.named_children()
        if isinstance(part, nn.Linear) and part.in_features == width
    ]
    return [name for name in names if name != branch.output]


# --- Unrolling a student into an ordinary checkpoint of its teacher's family (section 3.4, figure 2).
#
# A step of Euler's at a fixed time is `x + d * u(x, t)`. With a parallel residual, `u` is the sum of two
# branches that both read `x`, so the step is one ordinary layer: `(1 + scale) * norm(x) + shift` is a norm
# with other weight and bias, and `d * (1 + gate)` scales the rows of the branch's last map.


#: Fields of configs with the number of channels of every MLP.
CHANNEL_FIELDS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def check_foldable(student: Any) -> None:
    """Refuse what no ordinary layers compute exactly."""
    config, family = student.config, student.family
    for block in config.flow_blocks:
        name = f"block {block.start}:{block.stop}"
        if block.kind == "linear":
            raise RunError(
                f"{name}, a linear map",
                "a layer: a linear map is none of the family",
                "use --form latent-flow",
            )
        if block.kind in ("layer", "layers", "skip"):
            continue
        if config.solver != "euler":
            raise RunError(
                f"{name} with the {config.solver} solver",
                "euler: the midpoint connects two evaluations across layers, which no ordinary layer does",
                "use --form latent-flow, or train with --solver euler (--solver here makes another student)",
            )
        if config.steps > 1 and not family.parallel_residual(config):
            raise RunError(
                f"{name} in {config.steps} steps of sequential-residual layers",
                "k = 1: the MLP would have to see the whole attention branch, the residual a part of it",
                "use --k 1, or --form latent-flow",
            )
        if block.source:
            raise RunError(
                f"{name} whose velocity sees x_0",
                "one that sees x_t alone: no ordinary layer sees an earlier state",
                "use --form latent-flow, or train with --condition none",
            )
        if (reason := obstacle(_flow_layers(student)[block].velocity.layer)) is not None:
            raise RunError(
                f"{name} of {reason}",
                "two branches, each with a weight before and after it that takes scale and gate",
                "use --form latent-flow",
            )
        if block.shift and not _flow_layers(student)[block].velocity.layer.has_norm_bias:
            raise RunError(
                f"{name} with a shift of the normed states",
                "no shift: this norm has no bias to fold one into",
                "use --form latent-flow, or train a flow without shift",
            )


def unroll(student: Any) -> Any:
    """The same function as an ordinary model of the teacher's family, with `m + k + (L - n)` layers.

    Returns of the teacher's own class; kept layers share the student's tensors.
    """
    check_foldable(student)
    family: Family = student.family
    prefix = family.layers_prefix
    tensors = {
        name: value for name, value in student.state_dict().items() if not name.startswith(f"{prefix}.")
    }
    origins: list[int] = []
    for place, layer in zip(student.config.places(), student.student_layers, strict=True):
        for content in _steps(layer) if isinstance(layer, FlowLayer) else [layer.state_dict()]:
            tensors |= {f"{prefix}.{len(origins)}.{name}": value for name, value in content.items()}
            origins.append(place if isinstance(place, int) else place.start)
    kind = _causal_class(student)
    plain = student.config.to_dict()
    for key in ("model_type", "architectures", "teacher_layers", "blocks", "solver", "steps", "dtype"):
        plain.pop(key, None)
    lists = plain.pop("teacher_lists", None) or {}
    plain |= {name: [values[origin] for origin in origins] for name, values in lists.items()}
    plain |= _renumbered(plain, lists, origins)
    channels, expected = _channels_of(student, tensors), student.config.teacher_config()
    for name, count in channels.items():
        setattr(expected, name, count)
    plain |= channels
    config = kind.config_class(**(plain | {"num_hidden_layers": len(origins)}))
    _check_layers(structure_of(config), structure_of(expected), origins)
    config._attn_implementation = student.config._attn_implementation
    with torch.device("meta"):
        model = kind(config)
    return fill(model, tensors, student.generation_config)


def _renumbered(plain: dict[str, Any], lists: dict[str, Any], origins: list[int]) -> dict[str, list[int]]:
    """What a config says of some layers by their numbers, such as `mlp_only_layers`, by the new ones."""
    return {
        name: [index for index, origin in enumerate(origins) if origin in values]
        for name, values in plain.items()
        if name.endswith("_layers") and isinstance(values, list) and name not in lists
    }


def _check_layers(plain: Structure, teacher: Structure, origins: list[int]) -> None:
    """Refuse a plain form whose layers are not those of the teacher that they came from.

    A family may make of a layer's number what no tensor holds: a scale of its scores, a window, experts.
    """
    for index, origin in enumerate(origins):
        ours, theirs = _traits(teacher.layers[origin]), _traits(plain.layers[index])
        names = sorted(
            name
            for name in ours.keys() | theirs.keys()
            if ours.get(name) != theirs.get(name)
            # the number itself, such as RWKV's `layer_id`, is where a state is kept
            and (ours.get(name), theirs.get(name)) != (origin, index)
        )
        if not names and alike(plain.four_positions.layers[index], teacher.four_positions.layers[origin]):
            continue
        other = f"{names[0]} {theirs.get(names[0])}, not {ours.get(names[0])}" if names else "other positions"
        raise RunError(
            f"a plain form in which the teacher's layer {origin} would be layer {index}, with {other}",
            f"layers of {teacher.config.model_type} that do not depend on their number",
            "use --form latent-flow",
        )


def _traits(layer: nn.Module) -> dict[str, Any]:
    """What a layer is, but for its weights and its number: classes, shapes and every plain attribute."""
    traits: dict[str, Any] = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    for path, part in layer.named_modules():
        traits[path] = type(part).__name__
        for name, value in vars(part).items():
            if isinstance(value, bool | int | float | str | None) and name not in ("layer_idx", "training"):
                traits[f"{path}.{name}"] = value
    return traits


def old_rotary_names(config: Any) -> dict[str, Any]:
    """What a config's `rope_parameters` holds by the names from before transformers 5.

    Readers that know these alone would else take their defaults and compute something else.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    whole = rope.get("full_attention") or rope
    if "rope_theta" not in whole:
        return {}
    names: dict[str, Any] = {"rope_theta": whole["rope_theta"]}
    if (part := whole.get("partial_rotary_factor")) is not None:
        names["partial_rotary_factor"] = part
    if config.model_type.startswith("gpt_neox"):
        names |= {"rotary_emb_base": whole["rope_theta"], "rotary_pct": part}
    if local := rope.get("sliding_attention"):
        names["rope_local_base_freq"] = local["rope_theta"]
    kind = whole.get("rope_type", "default")
    if kind != "default":
        apart = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
        scaling = {name: value for name, value in whole.items() if name not in apart and value is not None}
        if kind == "longrope":  # three fields, and the shorter context outside
            names["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
            scaling = {name: scaling[name] for name in ("short_factor", "long_factor")} | {"type": kind}
        else:
            scaling |= {"rope_type": kind, "type": kind}
        names["rope_scaling"] = scaling
    return names


def _channels_of(student: Any, tensors: dict[str, Tensor]) -> dict[str, int]:
    """What the config says of the channels of every MLP, where they are fewer than the teacher's.

    Raises `RunError` if layers differ, or the family's config has no such number.
    """
    config = student.config
    if all(part.width == 1 for part in config.flow_blocks):
        return {}
    flow: Any = next(layer.velocity for part, layer in _flow_layers(student).items() if part.width < 1)
    layer: Any = flow.layers[0] if isinstance(flow, LayerStack) else flow.layer
    output = mlp_maps(layer).output
    side = 0 if is_transposed(layer.layer.get_submodule(output)) else 1
    counts = {value.shape[side] for name, value in tensors.items() if name.endswith(f".{output}.weight")}
    field = next((name for name in CHANNEL_FIELDS if hasattr(config, name)), None)
    if len(counts) > 1 or field is None:
        raise RunError(
            "a student with MLPs of several widths",
            "one width: configs of its family have one number for all layers",
            "use --form latent-flow, or train with --block each and one --width",
        )
    return {field: counts.pop()}


def _causal_class(student: Any) -> Any:
    """The family's own class, below the student's."""
    return next(kind for kind in type(student).__mro__[1:] if kind.__module__.startswith("transformers."))


def _flow_layers(student: Any) -> dict[Part, Any]:
    return {layer.block: layer for layer in student.student_layers if isinstance(layer, FlowLayer)}


@torch.no_grad()
def _steps(flow: FlowLayer) -> list[dict[str, Tensor]]:
    """A flow layer's steps as the tensors of one ordinary layer each."""
    velocity: Any = flow.velocity
    if isinstance(velocity, LayerStack):
        layers: Any = velocity.layers
        contents = [layer.layer.state_dict() for layer in layers]
        # Files hold no shared tensors, and a layer that is run again comes again.
        return contents + [
            {name: value.clone() for name, value in content.items()}
            for _ in range(velocity.loops - 1)
            for content in contents
        ]
    content = velocity.layer.layer.state_dict()
    if velocity.modulation is None:
        return [content]
    folded = []
    times = flow.times.to(velocity.modulation.head.weight.device)
    for t in times:
        d = torch.full_like(t, 1 / flow.steps)
        values = [value.flatten() for value in velocity.modulation(t[None], d[None])]
        scale_a, gate_a, scale_m, gate_m, *shifts = values
        shift_a, shift_m = shifts or (None, None)
        step = {name: value.clone() for name, value in content.items()}  # files hold no shared tensors
        form, layer = velocity.layer.form, velocity.layer.layer
        fold_branch(step, layer, form.attention, scale_a, (1 + gate_a) / flow.steps, shift_a)
        fold_branch(step, layer, form.mlp, scale_m, (1 + gate_m) / flow.steps, shift_m)
        folded.append(step)
    return folded
