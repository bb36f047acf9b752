"""From a name to a frozen teacher: its folder, family and tokenizer, and how a record finds it again."""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lftpipe.base import progress
from lftpipe.base.errors import LftpipeError, TeacherError, foreign
from lftpipe.families import attention
from lftpipe.families.family import Family
from lftpipe.families.structure import check_kind, structure_of
from lftpipe.teacher.checkpoint import Checkpoint, NamedCheckpoint, check_sizes
from lftpipe.teacher.gguf import convert
from lftpipe.teacher.registry import REGISTERED
from lftpipe.teacher.silence import quiet_rust, quiet_transformers

# --- From the name of a teacher to a local folder with its config, weights and tokenizer.

#: What makes a model usable: weights, configs, tokenizer, chat templates.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "tokenizer*"]

#: The same weights in other formats.
OTHER_FORMATS = ["*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt", "*/tokenizer*", "consolidated*"]

#: Names that configs have for the longest context.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "seq_length")


def max_positions_of(config: Any) -> int | None:
    """The longest context that a model knows positions for; None if it has no bound."""
    named = (getattr(config, name, None) for name in POSITIONS)
    return next((count for count in named if isinstance(count, int)), None)


@dataclass(frozen=True)
class Teacher:
    """A frozen model on the local disk; nothing of it is in memory yet."""

    name: str
    """Short name; the experiment's folder is called so."""
    model: str
    """What the user named, absolute if it is a path: enough to find the teacher again."""
    folder: Path
    revision: str | None
    """Commit on the Hub, if it came from there."""
    config: Any
    family: Family
    checkpoint: Checkpoint

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        """Features of a state."""
        return self.config.hidden_size

    @property
    def max_positions(self) -> int | None:
        """The longest context that the model knows positions for; None if it has no bound."""
        return max_positions_of(self.config)

    @property
    def corpus(self) -> str | None:
        """The corpus that goes with a registered teacher."""
        registered = REGISTERED.get(self.name)
        return registered.corpus if registered else None

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of tokenizer.json, or of whatever else the folder has of a tokenizer."""
        files = [self.folder / "tokenizer.json"]
        if not files[0].exists():
            files = sorted(self.folder.glob("tokenizer*")) + sorted(self.folder.glob("vocab*"))
        total = hashlib.sha256()
        for file in files:
            total.update(file.read_bytes())
        return total.hexdigest()

    @cached_property
    def config_digest(self) -> str:
        """SHA-256 of config.json: with other rotary settings the same weights are another model."""
        return hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What a store records of its teacher, JSON-plain."""
        return {
            "name": self.name,
            "model": self.model,
            "revision": self.revision,
            "weights_digest": self.checkpoint.digest,
            "config_digest": self.config_digest,
            "family": self.family.name,
            "parallel_residual": self.family.parallel_residual(self.config),
            "layers": self.num_layers,
            "width": self.width,
            "heads": getattr(self.config, "num_attention_heads", None),
            "vocabulary": self.config.vocab_size,
        }


def open_teacher(model: str, workspace: Path, *, revision: str | None = None) -> Teacher:
    """Find a teacher by registered name, Hub id, local folder or `.gguf` file.

    `workspace`: where folders of teachers are looked for, and GGUF files are converted to.
    Raises `TeacherError` if there is no such model, it cannot be fetched, or it is of no supported family.
    """
    registered = REGISTERED.get(model)
    path = Path(model).expanduser()
    commit = None
    if registered and registered.folder:
        name, folder = model, registered.folder
    elif registered and registered.gguf:
        name, gguf = model, workspace / model / registered.gguf
        if not gguf.is_file():
            raise TeacherError(f"teacher {model} without {gguf}", "the file in its place", registered.how)
        folder = convert(gguf, workspace / model / "teacher", check_config)
    elif not registered and path.suffix.lower() == ".gguf" and path.is_file():
        path = path.resolve()
        name, model = path.stem, str(path)
        folder = convert(path, workspace / name / "teacher", check_config)
    elif not registered and model and path.is_dir():
        folder = path.resolve()
        name, model = folder.name, str(folder)
    elif registered or _looks_like_hub_id(model):
        hub_id = registered.hub_id if registered and registered.hub_id else model
        name = model.replace("/", "--")
        folder, commit = _from_hub(hub_id, revision)
    else:
        raise TeacherError(
            f"model {model!r}",
            f"a registered name ({', '.join(REGISTERED)}), a Hub id, a local folder or a .gguf file",
            "check the spelling and the path",
        )
    config = config_of(folder, model)
    check_kind(config, model)
    check_sizes(config, Checkpoint(folder))
    checkpoint = NamedCheckpoint(folder, structure_of(config).model)
    if checkpoint.has_untied:  # transformers' own rule: then nothing is tied, whatever the config says
        config.tie_word_embeddings = False
        checkpoint = NamedCheckpoint(folder, structure_of(config).model)
    checkpoint.check()
    return Teacher(name, model, folder, commit, config, structure_of(config).family(), checkpoint)


def check_config(config: Any, model: str) -> None:
    """Refuse the config of a model that lftpipe cannot take apart, with the reason."""
    check_kind(config, model)
    structure_of(config)


def _looks_like_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and not model.startswith((".", "~"))


def _from_hub(hub_id: str, revision: str | None) -> tuple[Path, str]:
    """The model's snapshot in the Hub's local cache, fetched if need be, and its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    unreachable = (
        f"model {hub_id}, which is not on this machine",
        "the Hugging Face Hub within reach",
        "connect to the network, check its proxies, or pass a local folder or .gguf file with --model",
    )
    with foreign(TeacherError, *unreachable):  # whatever the client's network library comes up with
        try:
            folder = Path(
                snapshot_download(
                    hub_id, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=OTHER_FORMATS
                )
            )
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise TeacherError(
                f"model {hub_id}", "a public model on the Hugging Face Hub", "check the name"
            ) from error
        except RevisionNotFoundError as error:
            raise TeacherError(
                f"revision {revision} of {hub_id}", "a branch, tag or commit of it", "check --revision"
            ) from error
    return folder, folder.name


def config_of(folder: Path, model: str) -> Any:
    """What config.json says, as transformers reads it."""
    from transformers import AutoConfig

    if (folder / "adapter_config.json").exists():
        raise TeacherError(
            f"folder {folder} with adapter_config.json, of which transformers adds an adapter to the weights",
            "a model's own weights alone",
            "remove that file if the adapter is merged already, else merge it (peft's merge_and_unload)",
        )
    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"folder {folder} without config.json",
            "a model in transformers' format (config.json, model.safetensors, tokenizer.json)",
            "check the path, or save the model there with save_pretrained",
        )
    wanted = "a config that transformers reads", "correct config.json"
    with foreign(TeacherError, f"model {model}", *wanted), quiet_transformers():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config._attn_implementation = attention.NAME  # single layers are built from it, with no model around
        return config


# --- A folder's tokenizer, by transformers, tried before it is used.

#: One of these holds a tokenizer's vocabulary.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.*")

#: What every tokenizer can take apart and put together.
_TRIAL = "The state h[3] of a layer, 12 %.\n"


def load_tokenizer(teacher: Teacher) -> Any:
    """The teacher's tokenizer.

    Raises `TeacherError` if the folder has none, or it has no end-of-text token.
    """
    save = "save the tokenizer into the same folder with save_pretrained"
    tokenizer = tokenizer_of(teacher.folder, TeacherError, save)
    if not isinstance(tokenizer.eos_token_id, int):
        raise TeacherError(
            f"the tokenizer of {teacher.model} without an end-of-text token",
            "an eos_token that closes documents",
            "set eos_token in tokenizer_config.json",
        )
    return tokenizer


def tokenizer_of(folder: Path, kind: type[LftpipeError], do: str) -> Any:
    """The tokenizer of a folder in transformers' format, which takes a text apart and puts it together.

    Raises `LftpipeError`: of the kind, if the folder has none, or it does not work.
    """
    from transformers import AutoTokenizer

    given, expected = f"{folder} without a usable tokenizer", "tokenizer.json beside the weights"
    with foreign(kind, given, expected, do), quiet_transformers(), quiet_rust():
        if not any(any(folder.glob(pattern)) for pattern in FILES):
            raise FileNotFoundError("no file of one")  # transformers would make one up that knows no words
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise TypeError("it has not the Rust library behind it")
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}")
        ids = tokenizer(_TRIAL)["input_ids"]
        if not tokenizer(["", _TRIAL])["input_ids"] or not all(isinstance(each, int) for each in ids):
            raise TypeError(f"it makes {ids!r} of a text")
        tokenizer.decode(ids)
        _always_the_same(tokenizer, folder)
    return tokenizer


def _always_the_same(tokenizer: Any, folder: Path) -> None:
    """Switch off what draws other tokens of a text each time, which is for training a model on it."""
    model = tokenizer.backend_tokenizer.model
    drawn = [name for name in ("dropout", "alpha", "nbest_size") if getattr(model, name, None)]
    for name in drawn:
        setattr(model, name, None)
    if drawn:
        progress.say(f"note: {', '.join(drawn)} of {folder}/tokenizer.json is off: equal texts, equal tokens")


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text, such as one that begins it."""
    encoding = tokenizer.backend_tokenizer.encode(_TRIAL)
    special = itertools.takewhile(bool, encoding.special_tokens_mask)
    return encoding.ids[: len(list(special))]


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as a model reads it: opened as the tokenizer opens a text, and never closed.

    A control token that the prompt spells is one, so that the turns of a chat can be written by hand.
    """
    return opening(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]


def text_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Encodes texts of documents, which are text alone.

    Nothing is put around a text, cut from it or filled up, and a control token that it spells, as sources
    of programs do, is taken apart like other words.
    """
    backend = tokenizer.backend_tokenizer

    def encode(texts: list[str]) -> list[list[int]]:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # transformers sets it to its own at each of its calls
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    return encode


def chat_encoder(tokenizer: Any, model: str) -> Callable[[list[dict[str, Any]]], list[int]]:
    """Encodes chats as the tokenizer's template writes them, without the end token and what follows it.

    A control token that a message spells is text here, too.
    """

    def encode(messages: list[dict[str, Any]]) -> list[int]:
        if tokenizer.chat_template is None:
            raise TeacherError(
                f"a corpus of chats, and {model} without a chat template",
                "a tokenizer that has one, or a text",
                "name a column of text with --text-field, or put chat_template.jinja into the model's folder",
            )
        wanted = "messages of the roles and the order that it knows", "correct the chat"
        with foreign(TeacherError, f"a chat that the template of {model} refuses", *wanted):
            ids = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
        last = len(ids) - 1 - ids[::-1].index(end) if (end := tokenizer.eos_token_id) in ids else len(ids)
        return ids[:last] if not tokenizer.decode(ids[last + 1 :]).strip() else ids

    return encode


# --- A teacher that a store, a run or an export has recorded, found again and proved to be the same.

#: Files of a teacher whose digests are recorded. With other rotary settings, or other token ids, the same
#: weights are another model.
PARTS = ("weights", "config", "tokenizer")


def record_of(identity: dict[str, Any]) -> dict[str, Any]:
    """What a store's identity records of its teacher, with the tokenizer's digest that stands beside it."""
    return identity["teacher"] | {"tokenizer_digest": identity["tokenizer_digest"]}


def open_recorded(recorded: dict[str, Any], workspace: Path, made: Path) -> Teacher:
    """The teacher that something was made with.

    `recorded`: `Teacher.identity()` as it was then, and the tokenizer's digest.
    `made`: what was made with it, for the error, and to find a folder that was moved together with it.
    Raises `TeacherError` if it is not found, or any part of it is no longer as it was.
    """
    teacher = open_teacher(_place(recorded["model"], made), workspace, revision=recorded["revision"])
    now = {
        "weights": lambda: teacher.checkpoint.digest,
        "config": lambda: teacher.config_digest,
        "tokenizer": lambda: teacher.tokenizer_digest,
    }
    for part in PARTS:
        before = recorded[f"{part}_digest"]
        if now[part]() != before:
            raise TeacherError(
                f"teacher {recorded['model']} whose {part} changed since {made} was made",
                f"{part} with digest {before[:12]}…",
                f"put the old {part} back, or make it again from the start (extract --force, train --force)",
            )
    return teacher


def _place(model: str, made: Path) -> str:
    """Where a local teacher is now: as recorded, or, if that moved, as it lay to what was made with it."""
    old = Path(model)
    if not old.is_absolute() or old.exists():
        return model
    for above in made.resolve().parents:
        for count in range(1, len(old.parts)):
            new = above.joinpath(*old.parts[-count:])
            if (new / "config.json").is_file() or (new.suffix.lower() == ".gguf" and new.is_file()):
                return str(new)
    raise TeacherError(
        f"teacher {model} of {made}, which is not there",
        "the folder or file that it was made with",
        f"put it back, or move it along, such as to {made.resolve().parent / old.name}",
    )
