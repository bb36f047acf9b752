"""A data set or model on the Hugging Face Hub behind the interface, to read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash
from typing_extensions import override

from lftpipe.errors import StoreError
from lftpipe.objects.storage import Opened, Storage


class HubStorage(Storage):
    """Files of a repository, such as `hf://datasets/ORG/NAME/states.zarr`.

    Parameters
    ----------
    filesystem
        That file system; left out, it is made.
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

        Parameters
        ----------
        stop
            Behind the last byte; None for the end.
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

    @override
    def close(self) -> None:
        pass

    @override
    def write(self, name: str, data: bytes) -> None:
        raise self._read_only()

    @override
    def delete(self, name: str) -> None:
        raise self._read_only()

    @override
    def take(self, folder: Path, names: Iterable[str]) -> None:
        raise self._read_only()

    @override
    def begin_log(self, data: bytes) -> None:
        raise self._read_only()

    @override
    def append_log(self, line: bytes) -> None:
        raise self._read_only()

    @override
    def remove_log(self) -> None:
        raise self._read_only()

    def _read_only(self) -> StoreError:
        return StoreError(self.where, "a place that can be written", "write to s3://, gs:// or az:// instead")

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
