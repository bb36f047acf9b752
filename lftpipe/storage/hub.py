"""Repositories on the Hugging Face Hub: read in place, sent and fetched as a whole."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from typing_extensions import override

from lftpipe.base.errors import LftpipeError, StoreError
from lftpipe.storage.interface import Opened, Reads

# --- A data set or model on the Hugging Face Hub behind the interface, to read.


class HubStorage(Reads):
    """Files of a repository, such as `hf://datasets/ORG/NAME/states.zarr`.

    `filesystem`: that file system; left out, it is made.
    """

    def __init__(self, url: str, filesystem: Any = None) -> None:
        self.where, self.remote, self.concurrency = url.rstrip("/"), True, 8
        self._root = self.where.removeprefix("hf://")
        self._filesystem = filesystem

    def __reduce__(self) -> tuple[type["HubStorage"], tuple[str]]:
        return HubStorage, (self.where,)

    @property
    def files(self) -> Any:
        """huggingface_hub's file system."""
        if self._filesystem is None:
            from huggingface_hub import HfFileSystem

            self._filesystem = HfFileSystem()
        return self._filesystem

    @override
    def open(self, name: str, end_bytes: int, size: int | None = None) -> Opened:
        return _HubFile(self, name, end_bytes)

    def read_range(self, name: str, start: int, stop: int | None) -> bytes:
        """Some bytes of a file.

        `stop`: behind the last byte; None for the end.
        """
        try:
            return self.files.cat_file(f"{self._root}/{name}", start=start, end=stop)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.where} has no {name}") from None
        except Exception as error:  # whatever the network and the Hub come up with
            raise self._unreachable(error) from None

    @override
    def read(self, name: str) -> bytes:
        return self.read_range(name, 0, None)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        try:
            return self.files.info(f"{self._root}/{name}")["size"]
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.where} has no {name}") from None
        except Exception as error:
            raise self._unreachable(error) from None

    @override
    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        found = {}
        for name in names:
            try:
                found[name] = self.size(name)
            except FileNotFoundError:
                continue
        return found

    @override
    def digest(self, name: str) -> str:
        return xxhash.xxh3_128_hexdigest(self.read(name))

    @override
    def names(self) -> set[str]:
        try:
            return {path.rpartition("/")[2] for path in self.files.ls(self._root, detail=False)}
        except FileNotFoundError:
            return set()
        except Exception as error:
            raise self._unreachable(error) from None

    @override
    def total_bytes(self) -> int:
        return sum(
            self.files.find(self._root, detail=True)[path]["size"] for path in self.files.find(self._root)
        )

    @override
    def read_log(self) -> bytes | None:
        return None  # what is uploaded is finished

    def _unreachable(self, error: Exception) -> StoreError:
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        return StoreError(
            f"{self.where} ({reason})",
            "a repository that the Hugging Face Hub serves to this machine",
            "check the name, the network and HF_TOKEN",
        )


class _HubFile(Opened):
    def __init__(self, storage: HubStorage, name: str, end_bytes: int) -> None:
        self._storage, self._name, self.size = storage, name, storage.size(name)
        start = self.size - end_bytes
        self.end = storage.read_range(name, start, self.size) if start >= 0 else b""

    def read_into(self, buffers: list[Any], start: int) -> int:
        wanted = sum(memoryview(buffer).nbytes for buffer in buffers)
        data = memoryview(self._storage.read_range(self._name, start, start + wanted))
        if len(data) == wanted:
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                view[:] = data[: len(view)]
                data = data[len(view) :]
        return wanted if not data else 0


# --- Repositories of models and data sets on the Hugging Face Hub: folders up and down, one-line errors.

Kind = Literal["model", "dataset"]

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_URL = re.compile(r"hf:/+(?:(datasets|models)/)?([\w.-]+/[\w.-]+)/?(states\.zarr/?)?")


@dataclass(frozen=True)
class Repository:
    """One repository."""

    name: str
    kind: Kind

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise LftpipeError(f"repository {self.name!r}", "ORG/NAME", "use that format")

    @classmethod
    def of_url(cls, url: str) -> "Repository":
        """The repository that a URL names."""
        found = _URL.fullmatch(url)
        if not found:
            raise LftpipeError(
                url, "hf://ORG/NAME for a run, hf://datasets/ORG/NAME for a store", "use that format"
            )
        return cls(found[2], "dataset" if found[1] == "datasets" else "model")

    @property
    def url(self) -> str:
        """As `lftpipe pull` takes it."""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def upload(
        self,
        folder: Path,
        *,
        under: str = "",
        card: str | None = None,
        only: Sequence[str],
        private: bool = False,
    ) -> str:
        """Make the repository if it is not there, and put files of a folder into it, the card last.

        `card`: its README.md; None where the folder has one.
        Raises `LftpipeError` if there is no token, it has no right to write, or the Hub cannot be reached.
        """
        require_token()
        client = _client()
        with self._told():
            made = client.create_repo(self.name, repo_type=self.kind, private=private or None, exist_ok=True)
            client.upload_folder(
                repo_id=self.name,
                repo_type=self.kind,
                folder_path=str(folder),
                path_in_repo=under or None,
                allow_patterns=list(only),
                commit_message=f"Add {folder.name} by lftpipe",
            )
            if card is not None:
                client.upload_file(
                    path_or_fileobj=card.encode(),
                    path_in_repo="README.md",
                    repo_id=self.name,
                    repo_type=self.kind,
                    commit_message="Describe what is here",
                )
        return str(made)

    def files(self, revision: str | None = None) -> list[str]:
        """Names of all files.

        `revision`: branch, tag or commit; None is the default branch.
        Raises `LftpipeError` if the Hub does not show the repository.
        """
        with self._told():
            return list(_client().list_repo_files(self.name, repo_type=self.kind, revision=revision))

    def download(self, folder: Path, *, only: Sequence[str], revision: str | None = None) -> None:
        """Bring files here; what a former call brought whole is not brought again.

        `revision`: branch, tag or commit; None is the default branch.
        Raises `LftpipeError` if the Hub does not show the repository, or cannot be reached.
        """
        with self._told():
            _client().snapshot_download(
                self.name,
                repo_type=self.kind,
                revision=revision,
                local_dir=str(folder),
                allow_patterns=list(only),
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the client as one line."""
        from huggingface_hub import errors

        try:
            yield
        except errors.LocalTokenNotFoundError:
            raise _no_token() from None
        except errors.RevisionNotFoundError:
            raise LftpipeError(f"{self.url} without that revision", "one of it", "check --revision") from None
        except errors.RepositoryNotFoundError:
            raise LftpipeError(
                f"{self.url}, which the Hugging Face Hub does not show",
                "a repository, and a token that may see it",
                "check the name; set HF_TOKEN for a private one",
            ) from None
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise LftpipeError(
                    f"{self.url}, refused by the Hugging Face Hub ({status})",
                    "a token with the right to it",
                    "run `hf auth login` with another token, or name another repository",
                ) from None
            raise self._unreachable(error) from None
        except Exception as error:  # whatever the network and the Hub come up with
            if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError):
                raise
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> LftpipeError:
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        return LftpipeError(
            f"{self.url} ({reason})",
            "a Hugging Face Hub that answers",
            "check name and network, then run the same command again",
        )


def _client() -> Any:
    import huggingface_hub

    return huggingface_hub.HfApi()


def require_token() -> None:
    """Refuse to go on without a token, before anything is computed for an upload."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise _no_token()


def _no_token() -> LftpipeError:
    return LftpipeError(
        "no token for the Hugging Face Hub",
        "one with the right to write",
        "run `hf auth login`, or set HF_TOKEN",
    )
