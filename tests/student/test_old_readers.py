"""Rotary settings of plain exports, which readers from before transformers 5 look for by other names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import DECODERS, make_decoders
from tiny_students import export_settings, save_run, tokens

from lftpipe.commands.export import export
from lftpipe.student.assemble import load_model
from lftpipe.teacher.source import open_teacher

#: A Python with transformers 4: `make runtimes` makes the second one.
OLD = Path(os.environ.get("LFTPIPE_TRANSFORMERS_4", Path(sys.prefix) / "transformers-4" / "bin" / "python"))

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 16,
}

#: A name for each, its model type, and what its config says.
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "llama3": ("llama", {"rope_parameters": LLAMA_3}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0}},
    ),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma2": (
        "gemma2",
        DECODERS["gemma2"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ),
    "gemma3": (
        "gemma3_text",
        DECODERS["gemma3_text"]
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ),
    "neox": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
    ),
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
}

#: What an older reader looks for.
NAMES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 1e5},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}},
    "linear": {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "qwen2": {"rope_theta": 1e6},
    "qwen3": {"rope_theta": 1e6},
    "mistral": {"rope_theta": 1e6},
    "gemma2": {"rope_theta": 5e4},
    "gemma3": {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": {"factor": 8.0}},
    "neox": {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
    "longrope": {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "longrope"},
        "original_max_position_embeddings": 16,
    },
}

#: Logits of each folder's model, by another version of transformers.
LOGITS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, __version__
assert __version__.startswith("4.57."), __version__
tokens, logits = json.loads(sys.argv[1]), []
for folder in sys.argv[2:]:
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.inference_mode():
        logits.append(model.eval()(torch.tensor(tokens)).logits.tolist())
print(json.dumps(logits))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: Any, tokenizer: Any) -> dict[str, Path]:
    """The folder of a plain export of each."""
    folders: dict[str, Path] = {}
    for name, (kind, fields) in TEACHERS.items():
        root = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(DECODERS, kind, fields)
            teacher = open_teacher(str(make_decoders(root, [kind], tokenizer)[kind]), root)
        run = save_run(root / "run", teacher, (1, 3), solver="euler", walk_steps=1)
        export(export_settings(run, root, form="plain"))
        folders[name] = root / "out"
    return folders


@pytest.mark.parametrize("name", TEACHERS)
def test_plain_exports_say_rotary_settings_by_both_spellings(exports: dict[str, Path], name: str) -> None:
    config = json.loads((exports[name] / "config.json").read_text())
    for key, value in NAMES[name].items():
        assert config[key] == (config[key] | value if isinstance(value, dict) else value), key
    assert ("rope_scaling" in NAMES[name]) == bool(config.get("rope_scaling"))
    read = load_model(exports[name]).config.rope_parameters
    given = TEACHERS[name][1]["rope_parameters"]
    for key, value in given.items():
        assert read[key] == (read[key] | value if isinstance(value, dict) else value), key


@pytest.mark.long
@pytest.mark.skipif(not OLD.is_file(), reason="no Python with transformers 4: `make runtimes`")
@pytest.mark.timeout(600, method="thread")
def test_transformers_4_computes_what_plain_exports_mean(exports: dict[str, Path]) -> None:
    ids = tokens(40, sequences=2)
    command = [str(OLD), "-c", LOGITS, json.dumps(ids.tolist()), *map(str, exports.values())]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, folder), theirs in zip(exports.items(), json.loads(done.stdout.splitlines()[-1]), strict=True):
        with torch.inference_mode():
            ours = load_model(folder)(ids).logits
        assert (torch.tensor(theirs) - ours).abs().max() < 1e-4, name
