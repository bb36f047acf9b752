"""The cache of a teacher's states: a Zarr store never wrong, and read at the speed of a memory map."""

from lftpipe.store.batches import Batch, Logits, batch_sequences
from lftpipe.store.layout import ShardKey, StoreSpec
from lftpipe.store.reader import Store
from lftpipe.store.sealed import Sealed
from lftpipe.store.shard_writer import ShardWriter, Slot, produce_shard
from lftpipe.store.verify import Damage, Report, verify_store
from lftpipe.store.writer import StoreWriter

__all__ = [
    "Batch",
    "Damage",
    "Logits",
    "Report",
    "Sealed",
    "ShardKey",
    "ShardWriter",
    "Slot",
    "Store",
    "StoreSpec",
    "StoreWriter",
    "batch_sequences",
    "produce_shard",
    "verify_store",
]
