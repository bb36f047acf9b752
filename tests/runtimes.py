"""Exports in other people's runtimes, each in a process that cannot import lftpipe.

Used by test_runtimes.py and runtime_matrix.py; `make runtimes` installs lm_eval and llama.cpp.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

DOCUMENTS = [
    "the state of a layer flows into the next one step while we return",
    "self def for in is not value",
    "one walk into the next layer\nthe value of a state",
]

#: Logits of one sequence of tokens by each folder's model, or why there are none.
TRANSFORMERS = """
import json, sys
sys.modules["lftpipe"] = None  # importing it from now on is an error
import torch
from transformers import AutoModelForCausalLM
tokens, answers = json.loads(sys.argv[1]), []
for folder in sys.argv[2:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
        model.eval()
        with torch.inference_mode():
            answers.append(model(torch.tensor([tokens])).logits[0].tolist())
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""

#: Byte perplexity by each folder's model over a local task, or why there is none.
LM_EVAL = """
import json, sys
how, tasks = sys.argv[1:3]
if how == "bare":
    sys.modules["lftpipe"] = None
else:
    import lftpipe.student
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
manager, answers = TaskManager(include_path=tasks, include_defaults=False), []
for folder in sys.argv[3:]:
    try:
        result = simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, "dtype": "float32", "trust_remote_code": True},
            tasks=["documents"],
            task_manager=manager,
            device="cpu",
            batch_size=1,
            bootstrap_iters=0,
        )
        answers.append(result["results"]["documents"]["byte_perplexity,none"])
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
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

#: Log-likelihoods of every token after each prompt (token ids, or text).
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
kind = xllamacpp.llama_flash_attn_type
on, off = kind.LLAMA_FLASH_ATTN_TYPE_ENABLED, kind.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.flash_attn_type = on if sys.argv[4] == "flash" else off
server = xllamacpp.Server(params)
answers = []
for prompt in prompts:
    request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": vocabulary}
    [step] = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    likelihoods = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
    answers.append([likelihoods[token] for token in range(vocabulary)])
print(json.dumps(answers))
"""


def run_script(script: str, *arguments: str) -> Any:
    """The last line that a script prints, as JSON."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def bare_logits(tokens: list[int], folders: list[Path]) -> list[Any]:
    """What transformers alone computes: logits of each folder's model, or a refusal."""
    return run_script(TRANSFORMERS, json.dumps(tokens), *map(str, folders))


def byte_perplexities(folders: list[Path], work: Path, *, how: str = "bare") -> list[Any]:
    """What lm_eval finds for `DOCUMENTS`; `how="registered"` imports lftpipe.student there."""
    data, tasks = work / "documents.jsonl", work / "tasks"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    tasks.mkdir(exist_ok=True)
    (tasks / "documents.yaml").write_text(TASK.format(data=data))
    return run_script(LM_EVAL, how, str(tasks), *map(str, folders))


def llama_cpp_likelihoods(
    file: Path, prompts: list[Any], vocabulary: int, *, flash: bool = False
) -> list[list[float]]:
    """Of every token after each prompt, by llama.cpp from a GGUF file.

    Its flash attention, which it uses by itself, computes in half precision.
    """
    attention = "flash" if flash else "plain"
    return run_script(LLAMA_CPP, str(file), json.dumps(prompts), str(vocabulary), attention)


@torch.inference_mode()
def log_likelihood(model: Any, tokenizer: Any, text: str) -> float:
    """Nats of all of a text's tokens, the first of them after the end of the text before."""
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    log_p = model(ids[:, :-1]).logits.log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None]).sum().item()


@torch.inference_mode()
def usable_prompts(model: Any, tokenizer: Any, candidates: list[Any]) -> tuple[list[Any], torch.Tensor]:
    """Prompts that llama.cpp's server answers, and the model's log-likelihoods after each.

    The server holds back a byte that is no whole character yet, and its likelihoods with it.
    """
    prompts, expected = [], []
    for prompt in candidates:
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        log_p = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        if tokenizer.decode(log_p.argmax()).isascii():
            prompts.append(prompt)
            expected.append(log_p)
    return prompts, torch.stack(expected)
