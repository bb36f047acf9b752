"""JSON values and files: fingerprints, seals, files that appear whole or not at all. No NumPy, no torch."""

from lftpipe.files.atomic import file_digest, sync_folder, write_atomic
from lftpipe.files.json_text import canonical
from lftpipe.files.sealed import (
    differences,
    fingerprint,
    parse_json,
    plain,
    read_sealed,
    seal,
    sealed,
    unseal,
    unsealed,
    write_sealed,
)

__all__ = [
    "canonical",
    "differences",
    "file_digest",
    "fingerprint",
    "parse_json",
    "plain",
    "read_sealed",
    "seal",
    "sealed",
    "sync_folder",
    "unseal",
    "unsealed",
    "write_atomic",
    "write_sealed",
]
