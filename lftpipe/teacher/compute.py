"""In which format a device multiplies matrices fastest."""

import torch


def resolve_compute_dtype(name: str, device: str) -> torch.dtype:
    """`auto` to bfloat16 where the processor multiplies matrices in it, else to float32."""
    if name != "auto":
        return getattr(torch, name)
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported()
    elif kind == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = kind == "mps"
    return torch.bfloat16 if fast else torch.float32
