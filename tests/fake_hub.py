"""The Hugging Face Hub as folders of this machine, behind the methods of its client that lftpipe calls."""

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError


class FakeHub:
    """Repositories are folders `KIND/ORG/NAME` below a root.

    Parameters
    ----------
    root
        Of all repositories.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, bool | None]] = []
        self.status: int | None = None

    def folder(self, name: str, kind: str) -> Path:
        return self.root / kind / name

    def _there(self, name: str, kind: str) -> Path:
        self._refuse()
        if not self.folder(name, kind).is_dir():
            raise _http(RepositoryNotFoundError, 404)
        return self.folder(name, kind)

    def _refuse(self) -> None:
        if self.status is not None:
            raise _http(HfHubHTTPError, self.status)

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool | None, exist_ok: bool) -> str:
        self._refuse()
        self.calls.append(("create_repo", private))
        self.folder(repo_id, repo_type).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"

    def upload_file(
        self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, repo_type: str, **_: Any
    ) -> None:
        (self._there(repo_id, repo_type) / path_in_repo).write_bytes(path_or_fileobj)

    def upload_folder(
        self,
        *,
        repo_id: str,
        repo_type: str,
        folder_path: str,
        path_in_repo: str | None,
        allow_patterns: list[str],
        **_: Any,
    ) -> None:
        target = self._there(repo_id, repo_type) / (path_in_repo or "")
        _copy(Path(folder_path), target, allow_patterns)

    def list_repo_files(self, repo_id: str, *, repo_type: str, revision: str | None) -> list[str]:
        return _names(self._there(repo_id, repo_type))

    def snapshot_download(
        self, repo_id: str, *, repo_type: str, local_dir: str, allow_patterns: list[str], **_: Any
    ) -> str:
        _copy(self._there(repo_id, repo_type), Path(local_dir), allow_patterns)
        return local_dir


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def _copy(folder: Path, target: Path, patterns: list[str]) -> None:
    """The client's patterns are fnmatch's on whole paths."""
    for name in _names(folder):
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)


def _http(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(
        status_code=status, headers={}, request=None, url="https://huggingface.co"
    )
    return kind("refused", response=response)


def install(monkeypatch: pytest.MonkeyPatch, root: Path) -> FakeHub:
    """Put it in the place of the client, with a token.

    Parameters
    ----------
    monkeypatch
        Of the test.
    root
        Of all repositories.
    """
    hub = FakeHub(root)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    return hub
