"""Where bytes lie: one small interface over a local folder, a bucket, or a data set on the Hub."""

from lftpipe.objects.places import local_path, storage_of, url_of
from lftpipe.objects.storage import LocalStorage, Opened, Storage

__all__ = ["LocalStorage", "Opened", "Storage", "local_path", "storage_of", "url_of"]
