"""A student beside its teacher: size, parameters, prefill and decode tokens/s; with --draft, as its draft.

    python benchmarks/student_speed.py RUN [--workspace data] [--k 1,2,3] [--plain] [--draft] [--threads 2]

RUN is a run's path or name, or a folder that `lftpipe export` wrote. Every model continues the same few
passages greedily, by transformers' `generate`, in one process and in turn: each round takes every passage
through every model, beginning with another model each time. Prefill is up to the first new token, decode the
tokens after it. Medians over rounds and passages count, and medians of the ratios to the teacher on the
same passage in the same round. Size on disk is that of the safetensors which transformers saves in `--dtype`,
for teacher and student alike. `--plain` adds the unrolled plain form, where there is one. `--draft` lets the
teacher write with the student as its draft, and with itself without the block, by transformers' default rules
of when a draft stops.

The passages: the first documents of python-stdlib (that of the running interpreter) which extraction holds
out for validation and which are long enough, from their 128th token on.
"""

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from timed_students import Entry, bytes_on_disk, entries_of, label, open_student

from lftpipe.base.allocator import keep_freed_memory
from lftpipe.base.errors import LftpipeError
from lftpipe.config.settings.base import default_workspace
from lftpipe.corpus.packing import default_threshold, text_hash
from lftpipe.corpus.readers import PYTHON_STDLIB, open_corpus
from lftpipe.flow.solver import EVALUATIONS
from lftpipe.reporting.tables import markdown_lines
from lftpipe.student.assemble import load_teacher, without_layers
from lftpipe.student.decoding import continue_prompt, speculate, warm_up
from lftpipe.teacher.silence import quiet_transformers
from lftpipe.teacher.source import load_tokenizer

#: Tokens of a document before the passage: licences and imports are much alike.
PASSAGE_START = 128


def passages(tokenizer: Any, tokens: int, count: int) -> list[str]:
    """Held-out texts of about `tokens` tokens."""

    def found() -> Iterator[str]:
        for document in open_corpus(PYTHON_STDLIB).documents():
            if text_hash(document) < default_threshold():
                ids = tokenizer(document.text)["input_ids"][PASSAGE_START : PASSAGE_START + tokens]
                if len(ids) == tokens:
                    yield tokenizer.decode(ids)

    return list(itertools.islice(found(), count))


def interleaved(
    entries: list[Entry], texts: list[str], rounds: int, measure: Callable[[Entry, str], dict[str, float]]
) -> dict[str, dict[str, list[float]]]:
    """Every entry on every text in every round, in turning order; lists of equal length, in step."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn, (_, text) in enumerate(itertools.product(range(rounds), texts)):
        first = turn % len(entries)
        for entry in entries[first:] + entries[:first]:
            for key, value in measure(entry, text).items():
                found[label(entry)][key].append(value)
    return found


def speeds(
    entries: list[Entry], tokenizer: Any, texts: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Prefill and decode rates of every entry, in turn, with their ratios to the teacher's."""
    lengths = {text: len(tokenizer(text)["input_ids"]) for text in texts}

    def measure(entry: Entry, text: str) -> dict[str, float]:
        written = continue_prompt(entry.ready(), tokenizer, text, options.new_tokens)
        after = written.seconds - written.first_token_seconds
        return {
            "prefill": lengths[text] / written.first_token_seconds,
            "decode": (len(written.tokens) - 1) / after if len(written.tokens) > 1 else float("nan"),
        }

    for entry in entries:
        warm_up(entry.ready(), tokenizer, texts[0])
    found = interleaved(entries, texts, options.rounds, measure)
    rows = []
    for entry in entries:
        row = entry.to_json() | {"model": label(entry)}
        row["cache_places"] = entry.ready().config.num_hidden_layers
        row["parameters"], row["bytes"] = entry.model.num_parameters(), bytes_on_disk(entry.model)
        for key, values in found[label(entry)].items():
            pairs = zip(values, found["teacher"][key], strict=True)
            ratios = sorted(one / other for one, other in pairs)
            row[key], row[f"{key}_ratio"] = statistics.median(values), statistics.median(ratios)
            row[f"{key}_ratio_range"] = [ratios[0], ratios[-1]]
        rows.append(row)
    return rows


def drafts(
    entries: list[Entry], tokenizer: Any, texts: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The teacher alone (the first entry), and with each of the others as its draft."""
    teacher = entries[0].model
    alone: dict[str, list[int]] = {}

    def measure(entry: Entry, text: str) -> dict[str, float]:
        if entry is entries[0]:
            written = continue_prompt(teacher, tokenizer, text, options.new_tokens)
            alone[text] = written.tokens
            return {"seconds": written.seconds}
        speculation = speculate(teacher, entry.ready(), tokenizer, text, options.new_tokens)
        return {
            "seconds": speculation.continuation.seconds,
            "proposed": speculation.proposed,
            "accepted": speculation.accepted,
            "calls": speculation.teacher_calls,
            "new_tokens": len(speculation.continuation.tokens),
            "equal": speculation.continuation.tokens == alone[text],
        }

    for text in texts:
        measure(entries[0], text)  # before the turns: what the others are compared with
    found = interleaved(entries, texts, options.rounds, measure)
    rows = []
    for entry in entries[1:]:
        values = found[label(entry)]
        proposed = sum(values["proposed"])
        pairs = zip(found["teacher"]["seconds"], values["seconds"], strict=True)
        ratios = sorted(one / other for one, other in pairs)
        rows.append(
            entry.to_json()
            | {
                "model": label(entry),
                "acceptance_rate": sum(values["accepted"]) / proposed if proposed else None,
                "tokens_per_teacher_call": sum(values["new_tokens"]) / sum(values["calls"]),
                "speed_up": statistics.median(ratios),
                "speed_up_range": [ratios[0], ratios[-1]],
                "equals_teacher": f"{int(sum(values['equal']))} of {len(values['equal'])}",
            }
        )
    return rows


def table(headings: dict[str, Callable[[dict[str, Any]], str]], rows: list[dict[str, Any]]) -> None:
    """Print rows as a Markdown table."""
    cells = [[show(row) for show in headings.values()] for row in rows]
    print("\n".join(markdown_lines(list(headings), cells)) + "\n")


def of(key: str, form: str = "") -> Callable[[dict[str, Any]], str]:
    """How a table shows a key of a row."""
    return lambda row: "-" if row[key] is None else format(row[key], form)


def spread(key: str) -> Callable[[dict[str, Any]], str]:
    """A ratio with the lowest and the highest of the rounds."""
    return lambda row: "{:.2f} ({:.2f} to {:.2f})".format(row[key], *row[f"{key}_range"])


SPEED_TABLE = {
    "model": of("model"),
    "solver": of("solver"),
    "NFE": of("nfe"),
    "parameters": of("parameters", ","),
    "MB on disk": lambda row: f"{row['bytes'] / 1e6:.1f}",
    "places in the KV cache": of("cache_places"),
    "prefill, tokens/s": of("prefill", ",.0f"),
    "to the teacher's": spread("prefill_ratio"),
    "decode, tokens/s": of("decode", ",.1f"),
    "to the teacher's decode": spread("decode_ratio"),
}
DRAFT_TABLE = {
    "draft": of("model"),
    "solver": of("solver"),
    "NFE": of("nfe"),
    "acceptance": of("acceptance_rate", ".1%"),
    "tokens per teacher's pass": of("tokens_per_teacher_call", ".2f"),
    "speed-up on the teacher alone": spread("speed_up"),
    "the teacher's text": of("equals_teacher"),
}


def main() -> None:
    """Read the options, run, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--workspace", type=Path, default=default_workspace())
    parser.add_argument("--k", type=lambda text: tuple(map(int, text.split(","))), default=(1, 2, 3))
    parser.add_argument("--solver", choices=tuple(EVALUATIONS), default=None, help="default: the run's")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--draft", action="store_true")
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=None, help="of torch; left out, its own choice")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file too")
    options = parser.parse_args()
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, options.dtype)
    with quiet_transformers():
        try:
            student, teacher, blocks = open_student(options)
            model, tokenizer = load_teacher(teacher), load_tokenizer(teacher)
            entries = entries_of(student, model, options)
        except LftpipeError as error:
            raise SystemExit(f"error: {error}") from error
        for entry in entries:
            entry.model.to(dtype)
        texts = passages(tokenizer, options.prompt_tokens, options.passages)
        replaced = ", ".join(f"{m}:{n}" for m, n in blocks)
        print(
            f"{teacher.name}, block {replaced}, {options.dtype}, {torch.get_num_threads()} threads; "
            f"{len(texts)} passages of {options.prompt_tokens} tokens, {options.new_tokens} new ones, "
            f"{options.rounds} rounds\n"
        )
        found: dict[str, Any] = {"speed": speeds(entries, tokenizer, texts, options)}
        table(SPEED_TABLE, found["speed"])
        if options.draft:
            skipping = Entry("layers skipped", without_layers(model, teacher, blocks))
            compared = [entry for entry in entries if not entry.name.startswith("plain form")]
            found["drafts"] = drafts([*compared, skipping], tokenizer, texts, options)
            table(DRAFT_TABLE, found["drafts"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
