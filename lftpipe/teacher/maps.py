"""The linear maps inside a layer, whichever way round their weights are stored: GPT-2's are transposed."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear_map(part: nn.Module) -> bool:
    """Whether a module is a linear map with a weight, and no more."""
    return isinstance(part, nn.Linear | Conv1D)


def is_transposed(part: nn.Module) -> bool:
    """Whether a linear map's weight is stored as `(input, output)`."""
    return isinstance(part, Conv1D)


def weight_of(part: Any) -> Float[Tensor, "output input"]:
    """A linear map's weight, of which changes in place are changes of the map."""
    return part.weight.T if is_transposed(part) else part.weight
