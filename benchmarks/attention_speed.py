"""Attention in blocks of queries against torch's kernel, forward and backward, in bfloat16 on a processor.

    python benchmarks/attention_speed.py

Heads as in `pythia-tiny`, SmolLM2-135M (its keys repeated for torch's kernel, as transformers does) and
Pythia-410M, sequences that hold one segment or two. Rounds take turns, and medians count. Errors
are relative, against float32.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lftpipe.base.allocator import keep_freed_memory
from lftpipe.families.attention import causal_attention

#: Sequences, heads, heads of keys, positions, features of a head.
SHAPES = {
    "pythia-tiny": (4, 3, 3, 256, 64),
    "SmolLM2-135M": (2, 9, 3, 512, 64),
    "Pythia-410M": (2, 16, 16, 512, 64),
}


def by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by torch's own kernel, which wants as many key heads as query heads."""
    repeated = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, *repeated, attn_mask=mask, is_causal=mask is None)


def in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by lftpipe's blocks of queries, in the kernel's order of axes."""
    return causal_attention(query, key, value, mask).transpose(1, 2)


def time_of(attend: Callable[..., Tensor], inputs: list[Tensor], mask: Tensor | None) -> tuple[float, float]:
    """Seconds of the forward pass, and of both passes."""
    start = time.perf_counter()
    out = attend(*inputs, mask)
    middle = time.perf_counter()
    out.sum().backward()
    return middle - start, time.perf_counter() - start


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(
        "| heads of | segments | torch, ms | in blocks, ms | ratio | forward alone | errors: torch, blocks |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (sequences, heads, key_heads, positions, features) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        exact = [
            torch.randn(sequences, count, positions, features, generator=generator)
            for count in (heads, key_heads, key_heads)
        ]
        inputs = [x.bfloat16().requires_grad_() for x in exact]
        for count in (1, 2):
            segment = torch.arange(positions) * count // positions
            causal = torch.ones(positions, positions, dtype=torch.bool).tril()
            mask = (
                None if count == 1 else ((segment[:, None] == segment) & causal).expand(sequences, 1, -1, -1)
            )
            methods: tuple[Callable[..., Tensor], ...] = (by_torch, in_blocks)
            for method in methods:
                time_of(method, inputs, mask)
            rounds = [[time_of(method, inputs, mask) for method in methods] for _ in range(options.rounds)]
            forward, both = (
                [statistics.median(each[method][part] for each in rounds) for method in (0, 1)]
                for part in (0, 1)
            )
            expected = by_torch(exact[0], exact[1], exact[2], mask)
            found = [method(inputs[0], inputs[1], inputs[2], mask).float() for method in methods]
            errors = [((each - expected).norm() / expected.norm()).item() for each in found]
            print(
                f"| {name} | {count} | {1e3 * both[0]:.1f} | {1e3 * both[1]:.1f} | {both[0] / both[1]:.2f} "
                f"| {forward[0] / forward[1]:.2f} | {errors[0]:.4f}, {errors[1]:.4f} |"
            )


if __name__ == "__main__":
    main()
