"""Where bytes lie: one small interface over a local folder, a bucket, or a data set on the Hub."""

from lftpipe.storage.interface import LocalStorage, Opened, Reads, Writes
from lftpipe.storage.places import local_path, storage_of, url_of, writable_storage_of

__all__ = [
    "LocalStorage",
    "Opened",
    "Reads",
    "Writes",
    "local_path",
    "storage_of",
    "url_of",
    "writable_storage_of",
]
