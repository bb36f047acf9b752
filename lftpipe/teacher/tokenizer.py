"""A folder's tokenizer, by transformers, tried before it is used."""

from pathlib import Path
from typing import Any

from lftpipe.errors import LftpipeError, TeacherError, foreign
from lftpipe.teacher.quiet import quiet_rust, quiet_transformers
from lftpipe.teacher.source import Teacher

#: One of these holds a tokenizer's vocabulary.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.*")

#: What every tokenizer can take apart and put together.
_TRIAL = "The state h[3] of a layer, 12 %.\n"


def load_tokenizer(teacher: Teacher) -> Any:
    """The teacher's tokenizer.

    Raises
    ------
    TeacherError
        If the folder has none, or it has no end-of-text token.
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

    Raises
    ------
    LftpipeError
        Of the kind, if the folder has none, or it does not work.
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
    return tokenizer
