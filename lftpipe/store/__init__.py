"""The cache of a teacher's states: a Zarr store never wrong, and read at the speed of a memory map."""

from lftpipe.store.batches import Batch, Logits, batch_sequences
from lftpipe.store.commit_log import PartJournal, Sealed, read_parts
from lftpipe.store.layout import ShardKey, StoreSpec, read_plan
from lftpipe.store.manifest import planned_spec
from lftpipe.store.reader import Store, read_in_turn
from lftpipe.store.records import stored_records
from lftpipe.store.resume import abandon
from lftpipe.store.rolling import Roll, Rolled, window_shards
from lftpipe.store.shard_writer import ShardWriter, Slot, produce_shard
from lftpipe.store.verify import Damage, Report, verify_store
from lftpipe.store.windows import Reader, most_bytes, producing, register, registered, unregister, was_left
from lftpipe.store.writer import StoreWriter

__all__ = [
    "Batch",
    "Damage",
    "Logits",
    "PartJournal",
    "Reader",
    "Report",
    "Roll",
    "Rolled",
    "Sealed",
    "ShardKey",
    "ShardWriter",
    "Slot",
    "Store",
    "StoreSpec",
    "StoreWriter",
    "abandon",
    "batch_sequences",
    "most_bytes",
    "planned_spec",
    "produce_shard",
    "producing",
    "read_in_turn",
    "read_parts",
    "read_plan",
    "register",
    "registered",
    "stored_records",
    "unregister",
    "verify_store",
    "was_left",
    "window_shards",
]
