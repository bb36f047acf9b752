"""A store of many shards, in a process that may open few files."""

import subprocess
import sys
from pathlib import Path

import fake_states

#: Makes, reads, grows and verifies a store of 60 training shards of four arrays.
PROGRAM = """
import resource, sys
from pathlib import Path
from fake_states import make_spec, write
from lftpipe.store import Store, verify_store

resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
path = Path(sys.argv[1])
for count in (60, 64):
    write(path, make_spec(sequences_per_shard=1, sequences={"train": count, "validation": 2}))
    store = Store.open(path)
    for layer in store.layers:
        store.read("train", layer, range(count))
    for layer in store.attention_layers:
        store.read("train", layer, range(count), array="attention")
print(verify_store(path).damaged)
"""


def test_a_store_of_more_shards_than_a_process_may_open_files_is_written_read_grown_and_verified(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "states.zarr")],
        env=fake_states.environment(Path(__file__).parents[1]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "()\n"
