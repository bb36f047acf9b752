"""The bytes of a tokenizer's tokens, sorted, and the canonical spelling of a byte string.

Two kinds of vocabulary are read: byte-level BPE (GPT-2's way) and SentencePiece BPE with byte fallback
(Llama's way). In both, a text is the bytes of its tokens in order. Tokenizers that lose bytes (normalisation,
lower-casing, `unk`) are refused.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
from tokenizers import Tokenizer

from lftpipe.base.errors import SettingsError

#: What SentencePiece writes in place of a space.
_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

#: Texts that a tokenizer must give back to the byte.
_TRIALS = ("The state h[3]\n    of a  layer.", "ABC abc ﬁ Å", "中文，测试 …", "\ttab\r\n")


class Vocabulary:
    """The tokens of a tokenizer as byte strings.

    `tokenizer`: a fast tokenizer of transformers.

    Attributes
    ----------
    ids
        Token ids in the order of their bytes; control tokens have no bytes and are not among them.
    end
        Ids that end a text.
    begin
        Ids with which every text begins.
    before
        Bytes that the tokenizer puts before every text: a space in Llama's way.

    Raises `SettingsError` for a tokenizer that is not lossless, has no end token, or is of another kind.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            _refuse(tokenizer, "is not a fast one", "a tokenizer with a tokenizer.json")
        description = json.loads(backend.to_str())
        model = description["model"]
        if model.get("type", "BPE") != "BPE":
            _refuse(tokenizer, f"is of the kind {model['type']}", "BPE, whose tokens are byte strings")
        if model.get("dropout"):
            _refuse(
                tokenizer, f"drops merges at random ({model['dropout']:g})", "no dropout in tokenizer.json"
            )
        steps = [step["type"] for part in ("pre_tokenizer", "decoder") for step in _steps(description[part])]
        self._byte_level = "ByteLevel" in steps
        if not self._byte_level and not model.get("byte_fallback"):
            _refuse(tokenizer, "loses unknown characters", "byte-level BPE, or byte fallback")
        self.before = b"" if self._byte_level else _bytes_before(description)
        self._own = Tokenizer.from_str(backend.to_str())
        self._own.encode_special_tokens = True  # `<|endoftext|>` in a text is text
        if self._byte_level:
            self._own.normalizer = None  # bytes are spelled as they are; `_check_lossless` sees the others
        self._chars = {byte: char for char, byte in _alphabet().items()}
        self.end = _end_ids(tokenizer)
        self.begin = _begin_ids(tokenizer, self.end)
        self._id_of: dict[str, int] = model["vocab"]
        bytes_of = _byte_level if self._byte_level else _sentencepiece
        spelled = {id_: bytes_of(token) for token, id_ in self._id_of.items()}
        control = set(self.end)
        for added in description["added_tokens"]:
            spelled[added["id"]] = added["content"].encode()
            control |= {added["id"]} if added["special"] else set()
        pairs = sorted((data, id_) for id_, data in spelled.items() if data and id_ not in control)
        self.tokens = [data for data, _ in pairs]
        self.ids = np.array([id_ for _, id_ in pairs], dtype=np.int64)
        self.longest = max(map(len, self.tokens))
        self._bytes_of = dict(zip(self.ids.tolist(), self.tokens, strict=True))
        self.split = lru_cache(4096)(self._split)
        self.range_of = lru_cache(65536)(self._range_of)
        self.canonical = lru_cache(65536)(self._canonical)
        self._check_lossless(tokenizer)

    def _check_lossless(self, tokenizer: Any) -> None:
        for text in _TRIALS:
            for ids in (
                tokenizer(text, add_special_tokens=False)["input_ids"],
                self.canonical(self.before + text.encode()),
            ):
                if self.text_of(ids) != self.before + text.encode():
                    _refuse(tokenizer, f"does not give back {text!r}", "one that loses no byte")

    def text_of(self, ids: Any) -> bytes:
        """The bytes of tokens; control tokens have none."""
        return b"".join(self._bytes_of.get(int(each), b"") for each in ids)

    def _range_of(self, rest: bytes) -> tuple[int, int]:
        """Where the tokens that begin with `rest` are among the sorted ones."""
        return bisect_left(self.tokens, rest), self._after(rest)

    def _after(self, rest: bytes) -> int:
        """The index behind the last token that begins with `rest`."""
        following = rest.rstrip(b"\xff")
        if not following:
            return len(self.tokens)
        return bisect_left(self.tokens, following[:-1] + bytes([following[-1] + 1]))

    def _split(self, rest: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Next bytes of the longer tokens that begin with `rest`, and where the tokens of each byte begin."""
        low, high = self.range_of(rest)
        low += sum(1 for _ in self._equal(rest, low, high))
        following = np.frombuffer(bytes(token[len(rest)] for token in self.tokens[low:high]), dtype=np.uint8)
        values, starts = np.unique(following, return_index=True)
        return values, low + starts

    def _equal(self, rest: bytes, low: int, high: int) -> Iterator[int]:
        """Tokens that are `rest` itself, of which there may be several."""
        while low < high and self.tokens[low] == rest:
            yield low
            low += 1

    def equal(self, rest: bytes) -> list[int]:
        """Ids of the tokens whose bytes are `rest`."""
        low, high = self.range_of(rest)
        return [int(self.ids[at]) for at in self._equal(rest, low, high)]

    def _canonical(self, text: bytes) -> tuple[int, ...]:
        """The tokens that the tokenizer makes of bytes, also where they end within a character.

        A character that is cut is no text yet, so that no tokenizer spells it: its bytes are merged with the
        piece before them, if that ends in a letter, else by themselves.
        """
        try:
            text[: len(text) - _cut(text)].decode()
        except UnicodeDecodeError as error:  # bytes that are no UTF-8 are spelled by themselves
            before, wrong, after = text[: error.start], text[error.start : error.end], text[error.end :]
            rest = self.canonical(self.before + after)[len(self.canonical(self.before)) :] if after else ()
            return (*self.canonical(before), *self._spell(wrong), *rest)
        whole = len(text) - _cut(text)
        head, tail = text[:whole], text[whole:]
        chars = head.removeprefix(self.before).decode()
        if not self._byte_level:
            ids = self._own.encode(chars, add_special_tokens=False).ids if chars else []
            if not chars and head:  # only what the tokenizer puts before a text
                ids = [self._id_of[_SPACE]]
            return (*ids, *self._spell(tail))
        ids = self._own.encode(chars, add_special_tokens=False).ids
        if tail:
            pieces = self._own.pre_tokenizer.pre_tokenize_str(chars) if chars[-1:].isalpha() else []
            last = pieces[-1][0] if pieces else ""
            kept = len(ids) - len(self._own.model.tokenize(last)) if last else len(ids)
            ids = ids[:kept] + list(self._spell(tail, last))
        return tuple(ids)

    def _spell(self, data: bytes, last: str = "") -> tuple[int, ...]:
        """Bytes that are no whole characters, merged with a piece before them where bytes are merged."""
        if not self._byte_level:
            return tuple(self._id_of[f"<0x{byte:02X}>"] for byte in data)
        merged = self._own.model.tokenize(last + "".join(self._chars[byte] for byte in data))
        return tuple(token.id for token in merged)


def _refuse(tokenizer: Any, given: str, expected: str) -> NoReturn:
    raise SettingsError(
        f"a tokenizer ({type(tokenizer).__name__}) that {given}", expected, "use another model"
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or decoder, in a flat list."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("decoders") or part.get("normalizers")
    return [step for each in inner for step in _steps(each)] if inner else [part]


@lru_cache(1)
def _alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    alphabet = _alphabet()
    return bytes(alphabet[char] for char in token) if all(char in alphabet for char in token) else b""


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _bytes_before(description: dict[str, Any]) -> bytes:
    prepends = any(step["type"] == "Prepend" for step in _steps(description["normalizer"])) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in _steps(description["pre_tokenizer"])
    )
    return b" " if prepends else b""


def _end_ids(tokenizer: Any) -> tuple[int, ...]:
    if not isinstance(tokenizer.eos_token_id, int):
        _refuse(tokenizer, "has no end-of-text token", "an eos_token")
    return (tokenizer.eos_token_id,)


def _begin_ids(tokenizer: Any, end: tuple[int, ...]) -> tuple[int, ...]:
    """As the tokenizer begins a text; else by its start token, else as the text behind an end would begin."""
    ids = tuple(
        each for each in tokenizer("")["input_ids"] if each not in end or each == tokenizer.bos_token_id
    )
    if ids:
        return ids[:1]
    return (tokenizer.bos_token_id,) if isinstance(tokenizer.bos_token_id, int) else end


def _cut(text: bytes) -> int:
    """How many bytes at the end begin a character that is not whole."""
    for count in range(1, min(4, len(text) + 1)):
        byte = text[-count]
        if byte >= 0xC0:
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return count if count < size else 0
        if byte < 0x80:
            return 0
    return 0


def utf8_next(text: bytes) -> Callable[[int], bool]:
    """Which byte may follow so that a text stays UTF-8."""
    cut = _cut(text)
    if not cut:
        return lambda byte: byte < 0x80 or 0xC2 <= byte <= 0xF4
    lead, second = text[-cut], cut == 1
    low = {0xE0: 0xA0, 0xF0: 0x90}.get(lead, 0x80) if second else 0x80
    high = {0xED: 0x9F, 0xF4: 0x8F}.get(lead, 0xBF) if second else 0xBF
    return lambda byte: low <= byte <= high


def is_whole(text: bytes) -> bool:
    """Whether a text ends at a character's end."""
    return _cut(text) == 0
