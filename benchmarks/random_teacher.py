"""A GPT-NeoX with random weights and Pythia-410M's true size, as a folder to benchmark with.

    python benchmarks/random_teacher.py --out random-410m [--tokenizer FOLDER] [--layers 24] [--width 1024]

Speed, memory and bytes do not depend on the weights. The tokenizer's files are copied from another model's
folder, by default the embedded teacher's. Weights are drawn with `--seed`; 1.6 GB in float32.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lftpipe.teacher.registry import REGISTERED


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=REGISTERED["pythia-tiny"].folder)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = sorted(options.tokenizer.glob("*token*.json"))
    if not any(file.name == "tokenizer.json" for file in tokenizer):
        raise SystemExit(f"error: {options.tokenizer} has no tokenizer.json; name another --tokenizer folder")
    torch.manual_seed(options.seed)
    config = GPTNeoXConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(options.out)
    for file in tokenizer:
        shutil.copy(file, options.out)
    print(
        f"{options.out}: {sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} million parameters"
    )


if __name__ == "__main__":
    main()
