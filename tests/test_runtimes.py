"""Plain exports in other people's runtimes. `make runtimes` installs those and runs this file."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_students import save_run, tokens

from lftpipe.settings import ExportSettings
from lftpipe.stages.export import export
from lftpipe.student.assemble import build_student
from lftpipe.teacher.source import Teacher, load_tokenizer

pytestmark = pytest.mark.slow

DOCUMENTS = [
    "the state of a layer flows into the next one step while we return",
    "self def for in is not value",
    "one walk into the next layer\nthe value of a state",
]

LM_EVAL = """
import json, sys
sys.modules["lftpipe"] = None  # importing it from now on is an error
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
folder, tasks = sys.argv[1:]
result = simple_evaluate(
    model="hf",
    model_args={"pretrained": folder, "dtype": "float32"},
    tasks=["documents"],
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    device="cpu",
    batch_size=1,
    bootstrap_iters=0,
)
print(json.dumps(result["results"]["documents"]))
"""

TASK = """
task: documents
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""

LLAMA_CPP = """
import json, sys
sys.modules["lftpipe"] = None
import xllamacpp
file, prompts, vocabulary = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = file
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 128, 1, 0, False
params.cpuparams.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
answers = []
for prompt in prompts:
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": vocabulary}
    [step] = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    likelihoods = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
    answers.append([likelihoods[token] for token in range(vocabulary)])
print(json.dumps(answers))
"""


@pytest.fixture
def exported(neox_teacher: Teacher, tmp_path: Path) -> tuple[Path, Any]:
    """A plain export of three Euler steps, and the student that it must equal."""
    run = save_run(tmp_path / "run", neox_teacher, (1, 3), solver="euler")
    export(ExportSettings(workspace=tmp_path, runs=(str(run.path),), form="plain", out=tmp_path / "plain"))
    return tmp_path / "plain", build_student(neox_teacher, [run])


def run_script(script: str, *arguments: str) -> Any:
    """The last line that a script prints, as JSON."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def log_likelihood(model: Any, tokenizer: Any, text: str) -> float:
    """Nats of all of a text's tokens, the first of them after the end of the text before."""
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    log_p = model(ids[:, :-1]).logits.log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None]).sum().item()


@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm_eval is not installed: `make runtimes`")
def test_lm_eval_finds_our_perplexity(
    exported: tuple[Path, Any], neox_teacher: Teacher, tmp_path: Path
) -> None:
    folder, student = exported
    data, tasks = tmp_path / "documents.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    tasks.mkdir()
    (tasks / "documents.yaml").write_text(TASK.format(data=data))
    theirs = run_script(LM_EVAL, str(folder), str(tasks))["byte_perplexity,none"]
    tokenizer = load_tokenizer(neox_teacher)
    nats = sum(log_likelihood(student, tokenizer, text) for text in DOCUMENTS)
    assert theirs == pytest.approx(math.exp(-nats / sum(map(len, DOCUMENTS))), rel=1e-4)


@pytest.mark.skipif(not find_spec("xllamacpp"), reason="xllamacpp is not installed: `make runtimes`")
@torch.inference_mode()
def test_llama_cpp_agrees(exported: tuple[Path, Any], neox_teacher: Teacher, tmp_path: Path) -> None:
    from gguf_neox import convert

    folder, student = exported
    convert(folder, tmp_path / "plain.gguf")
    tokenizer, vocabulary = load_tokenizer(neox_teacher), student.config.vocab_size
    prompts, expected = [], []
    # Token ids, and text, which the server's own tokenizer splits.
    for prompt in [tokens(24, seed=seed)[0].tolist() for seed in range(20)] + DOCUMENTS:
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        log_p = student(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        # The server holds back a byte that is no whole character yet, and its likelihoods with it.
        if tokenizer.decode(log_p.argmax()).isascii():
            prompts.append(prompt)
            expected.append(log_p)
    assert {type(prompt) for prompt in prompts} == {list, str}
    theirs = run_script(LLAMA_CPP, str(tmp_path / "plain.gguf"), json.dumps(prompts), str(vocabulary))
    # llama.cpp looks GELU up in a table of half precision.
    assert (torch.tensor(theirs) - torch.stack(expected)).abs().max() < 1e-2
