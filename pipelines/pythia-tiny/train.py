"""Train the embedded teacher: a GPT-NeoX of Pythia's shape, small enough for a repository.

    python pipelines/pythia-tiny/train.py --out data/pythia-tiny

The recipe in full: a byte-level BPE of 4096 tokens and a 12-layer model of width 192, both from
the sources of Python's standard library (documents held out by `lftpipe.corpus.packing`'s rule are
seen by neither), trained by Muon on the layers' matrices and AdamW on the rest, with warm-up and
cosine decay, in bf16 autocast where the processor has it. It stops and resumes at any time;
`--minutes` bounds one sitting. The model card is written at the end from what was measured.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from lftpipe.corpus.packing import Packing, default_threshold, text_hash
from lftpipe.corpus.readers import open_corpus

VOCABULARY, CONTEXT, END_OF_TEXT = 4096, 512, "<|endoftext|>"
EVERYTHING = 10**9  # more sequences than the corpus holds


def train_tokenizer(out: Path) -> Tokenizer:
    """A byte-level BPE from the training documents only."""
    if (out / "tokenizer.json").exists():
        return Tokenizer.from_file(str(out / "tokenizer.json"))
    texts = (
        document.text
        for document in open_corpus("python-stdlib").documents()
        if text_hash(document) >= default_threshold()
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    ).save_pretrained(out)
    return tokenizer


def packed_corpus(tokenizer: Tokenizer, work: Path) -> dict[str, np.ndarray]:
    """Token ids of both splits, `(sequence, position)`, made once and kept in `work`."""
    path = work / "tokens.npz"
    if not path.exists():
        end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        assert end_of_text is not None
        packing = Packing(
            open_corpus("python-stdlib"),
            lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)],
            end_of_text,
            CONTEXT,
            {"train": EVERYTHING, "validation": EVERYTHING},
        )
        rows: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
        for sequence in packing:
            rows[sequence.split].append(sequence.tokens.astype(np.uint16))
        np.savez(path, train=np.stack(rows["train"]), validation=np.stack(rows["validation"]))
    return dict(np.load(path))


def build_model(seed: int) -> GPTNeoXForCausalLM:
    """A 12-layer GPT-NeoX with random weights."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def optimizers(model: GPTNeoXForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and biases."""
    matrices = [p for p in model.gpt_neox.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def loss_of(model: GPTNeoXForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats; `tokens[sequence, position]`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.mkldnn.is_available()):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: GPTNeoXForCausalLM, tokens: np.ndarray, tokenizer: Tokenizer) -> float:
    """Of held-out sequences: nats of all but each sequence's first token, over those tokens' bytes."""
    model.eval()
    nats = num_bytes = 0.0
    for start in range(0, len(tokens), 16):
        batch = torch.from_numpy(tokens[start : start + 16].astype(np.int64))
        nats += loss_of(model, batch).item() * batch[:, 1:].numel()
        texts = tokenizer.decode_batch(batch[:, 1:].tolist(), skip_special_tokens=True)
        num_bytes += sum(len(text.encode("utf-8", "replace")) for text in texts)
    model.train()
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def skip_costs(model: GPTNeoXForCausalLM, tokens: np.ndarray) -> list[float]:
    """Rise of the held-out loss, nats a token, when each layer alone is left out."""
    model.eval()
    batches = [torch.from_numpy(tokens[i : i + 16].astype(np.int64)) for i in range(0, len(tokens), 16)]
    layers = list(model.gpt_neox.layers)

    def loss() -> float:
        return sum(loss_of(model, batch).item() for batch in batches) / len(batches)

    whole, costs = loss(), []
    for skipped in range(len(layers)):
        model.gpt_neox.layers = torch.nn.ModuleList(layers[:skipped] + layers[skipped + 1 :])
        costs.append(loss() - whole)
    model.gpt_neox.layers = torch.nn.ModuleList(layers)
    return costs


def schedule(step: int, steps: int, warmup: int) -> float:
    """Fraction of the peak learning rate: a linear warm-up, then a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(arguments: argparse.Namespace) -> GPTNeoXForCausalLM:
    """Train from the last checkpoint, if there is one, to `--stop-after`."""
    work: Path = arguments.work
    tokenizer = train_tokenizer(arguments.out)
    data = packed_corpus(tokenizer, work)
    model = build_model(arguments.seed)
    opts = optimizers(model, arguments.learning_rate)
    steps = arguments.tokens // (arguments.batch * CONTEXT)
    print(f"{len(data['train']) * CONTEXT:,} training tokens, {steps} steps", flush=True)

    checkpoint = work / "checkpoint.pt"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)

    def save() -> None:
        state = {"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in opts]}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    compiled_loss = torch.compile(loss_of) if arguments.compile else loss_of
    model.train()
    started, first = time.time(), step
    while step < min(steps, arguments.stop_after):
        epoch, index = divmod(step * arguments.batch, len(data["train"]) - arguments.batch)
        order = np.random.default_rng([arguments.seed, epoch]).permutation(len(data["train"]))
        batch = data["train"][order[index : index + arguments.batch]].astype(np.int64)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = arguments.learning_rate * schedule(step, steps, arguments.warmup)
        # Attention is a third of a step's time at this width: most of training sees half sequences.
        if step < arguments.short * steps:
            batch = batch.reshape(-1, CONTEXT // 2)
        loss = compiled_loss(model, torch.from_numpy(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0:
            rate = (step - first) * arguments.batch * CONTEXT / (time.time() - started)
            print(f"step {step} loss {loss.item():.4f} {rate:.0f} tokens/s", flush=True)
        if step % 100 == 0:
            save()
            print(
                f"held-out bits per byte {bits_per_byte(model, data['validation'][:64], tokenizer):.4f}",
                flush=True,
            )
        if time.time() - started > arguments.minutes * 60:
            save()
            raise SystemExit(f"stopped at step {step} of {steps}; the same command goes on")
    return model


def main() -> None:
    """Train the teacher, measure it, and write it with its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/pythia-tiny"))
    parser.add_argument("--work", type=Path, default=Path("data/pythia-tiny-training"))
    parser.add_argument("--tokens", type=int, default=9_000_000)
    parser.add_argument(
        "--stop-after", type=int, default=1000, help="steps; the cosine's last tenth adds little"
    )
    parser.add_argument("--batch", type=int, default=16, help=f"sequences of {CONTEXT} tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--short", type=float, default=0.75, help="fraction of steps on half sequences")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=1e9, help="stop, resumable, after this long")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for folder in (arguments.out, arguments.work):
        folder.mkdir(parents=True, exist_ok=True)

    model = train(arguments)
    tokenizer = train_tokenizer(arguments.out)
    held_out = packed_corpus(tokenizer, arguments.work)["validation"][:256]
    # What is published is measured: the float16 weights, not the float32 ones they come from.
    model = model.half().float()
    reached = {
        "bits_per_byte": bits_per_byte(model, held_out, tokenizer),
        "held_out_tokens": int(held_out.size),
        "training_tokens": min(arguments.tokens, arguments.stop_after * arguments.batch * CONTEXT),
        "seed": arguments.seed,
        "skip_cost_nats": [round(cost, 4) for cost in skip_costs(model, held_out[:64])],
    }
    model.half().save_pretrained(arguments.out)
    (arguments.out / "reached.json").write_text(json.dumps(reached, indent=2) + "\n")
    template = (Path(__file__).parent / "card.md").read_text()
    rows = "\n".join(f"| {i} | {cost:+.3f} |" for i, cost in enumerate(reached["skip_cost_nats"]))
    (arguments.out / "README.md").write_text(template.format(**reached, skip_rows=rows))
    print(json.dumps(reached, indent=2))


if __name__ == "__main__":
    main()
