"""Tiny teachers with random weights, text, and stores made of them, each once for all workers of a run.

With `LFTPIPE_CHECK_TYPES=1` every annotated call of lftpipe is checked, shapes too (`make check-types`).
"""
# ruff: noqa: E402 (the import hook comes first)

import os
import shutil
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CHECK_TYPES = os.environ.get("LFTPIPE_CHECK_TYPES") == "1"
if CHECK_TYPES:
    from jaxtyping import install_import_hook

    install_import_hook("lftpipe", "beartype.beartype")

import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lftpipe import runs
from lftpipe.teacher.source import Teacher, open_teacher

torch.set_num_threads(1)

# A suite in the background inherits an ignored SIGINT, and so would the processes that it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _locks_of_beartype() -> list[Any]:
    from beartype._util.cache.pool.utilcachepool import KeyPool

    return [pool._thread_lock for pool in gc.get_objects() if type(pool) is KeyPool]


# A process that is forked while a thread checks a type would wait for ever for a lock that nobody holds.
if CHECK_TYPES:
    os.register_at_fork(
        before=lambda: [lock.acquire() for lock in _locks_of_beartype()],
        after_in_parent=lambda: [lock.release() for lock in _locks_of_beartype()],
        after_in_child=lambda: [lock.release() for lock in _locks_of_beartype()],
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests have longer. With types checked, the first case of each test: it calls what all call."""
    for item in items:
        for mark, seconds in (("long", 3600), ("slow", 900)):
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.timeout(seconds))
                break
    if not CHECK_TYPES:
        return
    first: dict[tuple[Path, str], pytest.Item] = {}
    for item in items:
        first.setdefault((item.path, getattr(item, "originalname", item.name)), item)
    config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
    items[:] = first.values()


# A busy machine is no reason to fail.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

WORDS = ("the", "state", "of", "a", "layer", "flows", "into", "next", "walk", "return", "self", "def", "not")
CONTEXT = 32
VOCABULARY = 320


class Shared:
    """Folders that the workers of a run share: the first one that asks makes a folder, the others wait."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, name: str, make: Callable[[Path], object], *, seconds: float = 120) -> Path:
        """The folder `name` as `make` filled it. A folder that was left half made is made again."""
        folder, done = self._root / name, self._root / f"{name}.done"
        # Timeout's message names the lock's file, and so what the test waited for.
        with FileLock(self._root / f"{name}.lock", timeout=seconds):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Folders made once for all workers, in the folder that holds the workers' own."""
    root = tmp_path_factory.getbasetemp()
    return Shared(root.parent if "PYTEST_XDIST_WORKER" in os.environ else root)


def text_of(seed: int, words: int) -> str:
    """Running text of `words` words, the same for a seed."""
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words)) + f" {seed}\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens, `<|endoftext|>` the first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text_of(seed, 200) for seed in range(20)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def neox(**changes: Any) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "rotary_pct": 0.25,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **changes,
        }
    )
    return GPTNeoXForCausalLM(config)


def llama(**changes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "neox": neox,
    "neox-sequential": lambda: neox(use_parallel_residual=False),
    "neox-tied": lambda: neox(tie_word_embeddings=True),
    "llama": llama,
    "llama-untied": lambda: llama(tie_word_embeddings=False),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough, and norms uneven enough, that a wrong norm, branch or position shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise)


def make_teachers(root: Path, names: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A folder in transformers' format for some of `MODELS`."""
    for name in names:
        model: Any = MODELS[name]()
        randomise(model)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in names}


def change_weights(folder: Path) -> None:
    """Other weights of the same shapes, in the folder of the teacher "neox"."""
    model = neox()
    randomise(model, seed=1)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def teachers(shared: Shared, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A folder in transformers' format for every one of `MODELS`."""
    root = shared.folder("teachers", lambda root: make_teachers(root, tuple(MODELS), tokenizer))
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="session", params=list(MODELS))
def teacher(request: pytest.FixtureRequest, teachers: dict[str, Path]) -> Teacher:
    """Each of the tiny teachers in turn."""
    return open_teacher(str(teachers[request.param]), Path("unused"))


@pytest.fixture(scope="session")
def neox_teacher(teachers: dict[str, Path]) -> Teacher:
    return open_teacher(str(teachers["neox"]), Path("unused"))


@pytest.fixture
def run(teacher: Teacher, tmp_path: Path) -> runs.Run:
    from tiny_students import save_run

    return save_run(tmp_path / "flow", teacher, (1, 3))


@pytest.fixture
def student(teacher: Teacher, run: runs.Run) -> Any:
    """The student of `run`, a random flow in place of layers 1 and 2."""
    from lftpipe.student.assemble import build_student

    return build_student(teacher, [run])


@pytest.fixture
def neox_run(neox_teacher: Teacher, tmp_path: Path) -> runs.Run:
    from tiny_students import save_run

    return save_run(tmp_path / "neox-flow", neox_teacher, (1, 3))


@pytest.fixture
def neox_student(neox_teacher: Teacher, neox_run: runs.Run) -> Any:
    from lftpipe.student.assemble import build_student

    return build_student(neox_teacher, [neox_run])


@pytest.fixture(scope="session")
def text_folder(shared: Shared) -> Path:
    """Sixty short documents: enough that the usual fraction of them is held out."""

    def write(folder: Path) -> None:
        for seed in range(60):
            (folder / f"{seed:02d}.md").write_text(text_of(seed, 20 + 3 * seed))

    return shared.folder("text", write)


def extracted(workspace: Path, teacher: Path, text: Path, **changes: Any) -> Path:
    """A store of 48 training and 7 validation sequences of 32 tokens in a workspace."""
    from lftpipe.commands.extract import extract
    from lftpipe.config.settings import ExtractSettings

    settings = ExtractSettings(
        **{
            "workspace": workspace,
            "model": str(teacher),
            "corpus": str(text),
            "context": CONTEXT,
            "tokens": 48 * CONTEXT,
            "validation_tokens": 7 * CONTEXT,
            "batch_tokens": 8 * CONTEXT,
            "compute_dtype": "float32",
            **changes,
        }
    )
    return Path(extract(settings)["store"])


@pytest.fixture(scope="session")
def stores(shared: Shared, teachers: dict[str, Path], text_folder: Path) -> dict[str, Path]:
    """A float16 store of all states of each family. Their folders are shared: write runs elsewhere."""

    def extract(name: str) -> Path:
        workspace = shared.folder(f"store-{name}", lambda here: extracted(here, teachers[name], text_folder))
        return next(workspace.glob("*/states.zarr"))

    return {name: extract(name) for name in ("neox", "llama")}


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from s3_server import s3_server

    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def server(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint of an S3 server with many buckets, and credentials for it in the environment."""
    from s3_server import credentials

    for name, value in credentials(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return s3_endpoint


@pytest.fixture(scope="session")
def store_with_logits(shared: Shared, teachers: dict[str, Path], text_folder: Path) -> Path:
    """A store of the GPT-NeoX teacher with eight logits at each position."""
    workspace = shared.folder("logits", lambda here: extracted(here, teachers["neox"], text_folder, logits=8))
    return next(workspace.glob("*/states.zarr"))
