"""Tasks for lm_eval that need no network: which of four lines comes next in a text that is held out.

    python benchmarks/next_line_tasks.py STORE --out tasks [--count 200] [--seed 0]
    lftpipe evaluate RUN --tasks tasks

The texts are the store's validation sequences. A question is the text up to a line's end; the choices are the
line that follows and three others of the same sequence, all of at least 12 characters.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from lftpipe.config.settings.base import default_workspace
from lftpipe.store import Store
from lftpipe.teacher.source import load_tokenizer, open_recorded, record_of

#: Fewest characters of a line that is asked for, and lines of text before it.
SHORTEST, BEFORE = 12, 8

TASK = """task: next_line
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def question(text: str, chance: random.Random) -> dict[str, Any] | None:
    """One question on a text; None if it has too few lines."""
    lines = text.splitlines(keepends=True)[:-1]  # the last one is cut
    able = [number for number, line in enumerate(lines) if len(line.strip()) >= SHORTEST]
    asked = [number for number in able if number >= BEFORE]
    if not asked:
        return None
    number = chance.choice(asked)
    others = sorted({lines[each] for each in able} - {lines[number]})
    if len(others) < 3:
        return None
    choices = [lines[number], *chance.sample(others, 3)]
    chance.shuffle(choices)
    return {"text": "".join(lines[:number]), "choices": choices, "answer": choices.index(lines[number])}


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workspace", type=Path, default=default_workspace(), help="with the teacher")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    store = Store.open(given.store)
    tokenizer = load_tokenizer(open_recorded(record_of(store.identity), given.workspace, store.path))
    chance, found = random.Random(given.seed), []
    count = store.num_sequences("validation")
    for turn in range(20 * given.count):
        row = turn % count
        document = store.document("validation", [row])[0]
        own = store.tokens("validation", [row])[0][document == document[0]]
        if (asked := question(tokenizer.decode(own.tolist(), skip_special_tokens=True), chance)) is not None:
            found.append(asked)
        if len(found) == given.count:
            break
    given.out.mkdir(parents=True, exist_ok=True)
    file = (given.out / "next_line.jsonl").resolve()
    file.write_text("".join(json.dumps(each) + "\n" for each in found))
    (given.out / "next_line.yaml").write_text(TASK.format(file=file))
    print(f"{len(found)} questions in {given.out}")


if __name__ == "__main__":
    main()
