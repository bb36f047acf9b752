"""Which storage a path means: a folder of this machine, or what a mirror of a URL stands for.

A path is a `Path` everywhere, as options and runs have it. A URL has a *mirror*: a folder of this machine
with `mirror.json` in it, where small files lie that are kept equal to those of the URL. Of a store only what
is being written lies there; its shards and its bookkeeping are at the URL.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import xxhash

from lftpipe.base.errors import StoreError
from lftpipe.base.files import parse_json, write_atomic
from lftpipe.storage.interface import LocalStorage, Reads, Writes

MARKER = "mirror.json"
SCHEMES = ("s3", "gs", "az", "hf")
#: Bytes that `--cache-bytes` keeps if it is left out.
CACHE_BYTES = 16 * 2**30
# A `Path` folds the slashes of a URL into one.
_URL = re.compile(rf"({'|'.join(SCHEMES)}):/+(.+)")


def url_of(path: Path | str) -> str | None:
    """The URL that a path was given as; None if it is a path of this machine."""
    match = _URL.fullmatch(str(path))
    return f"{match[1]}://{match[2].rstrip('/')}" if match else None


def cache_folder() -> Path:
    """Where mirrors lie: LFTPIPE_CACHE, or the user's folder for such things."""
    given = os.environ.get("LFTPIPE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given) if given else Path(home).expanduser() / "lftpipe"


def mirror_of(url: str, cache: Path | None = None, cache_bytes: int = CACHE_BYTES) -> Path:
    """The folder that stands for a URL on this machine; made if it is missing.

    `url`: of a workspace, or of a folder with a store.
    `cache`: where ranges that were read are kept; None keeps none.
    `cache_bytes`: at most so many bytes of them.
    """
    folder = (
        (cache or cache_folder()) / "mirrors" / xxhash.xxh3_64_hexdigest(url.encode()) / url.split("/")[-1]
    )
    folder.mkdir(parents=True, exist_ok=True)
    about = read_marker(folder) or {"files": {}}
    about |= {"url": url, "cache": str(cache) if cache else None, "cache_bytes": cache_bytes}
    write_marker(folder, about)
    return folder


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What is known of the URL that a folder mirrors; None if it is no mirror."""
    try:
        found = parse_json((folder / MARKER).read_bytes())
        return found if isinstance(found.get("url"), str) and isinstance(found.get("files"), dict) else None
    except (OSError, ValueError, AttributeError):
        return None


def write_marker(folder: Path, about: dict[str, Any]) -> None:
    """Record what is known of the URL."""
    write_atomic(folder / MARKER, json.dumps(about, indent=1).encode())


def local_path(path: Path) -> Path:
    """A path of this machine: a URL's is in the mirror of the folder that it lies in."""
    url = url_of(path)
    if url is None:
        return path
    above, _, name = url.rpartition("/")
    folder = mirror_of(above) / name
    folder.mkdir(exist_ok=True)
    return folder


def storage_of(path: Path) -> Reads:
    """The storage of a store."""
    path = local_path(path)
    for folder in path.absolute().parents:
        if (folder / MARKER).is_file() and (about := read_marker(folder)):
            from lftpipe.storage.bucket import RangeCache, connect

            kept = about.get("cache")
            cache = RangeCache(Path(kept) / "ranges", about.get("cache_bytes", CACHE_BYTES)) if kept else None
            inside = path.absolute().relative_to(folder).as_posix()
            return connect(f"{about['url']}/{inside}", cache, str(folder))
    return LocalStorage(path)


def writable_storage_of(path: Path) -> Writes:
    """The storage of a store that is to be written."""
    if isinstance(storage := storage_of(path), Writes):
        return storage
    raise StoreError(storage.where, "a place that can be written", "write to s3://, gs:// or az:// instead")
