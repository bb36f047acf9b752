"""A store whose states are a seeded walk, with ties and massive activations, and a small map over it."""

from pathlib import Path
from typing import Any

import numpy as np

from lftpipe.commands.recouple import recouple
from lftpipe.config.settings import RecoupleSettings
from lftpipe.results.outcomes import Recoupling
from lftpipe.store import Store, StoreSpec, StoreWriter

LAYERS, CONTEXT, WIDTH, VOCABULARY = 4, 16, 24, 30


def walk(tokens: np.ndarray) -> np.ndarray:
    """`(layer, sequence, position, feature)`: embeddings (with ties), then ever smaller random steps."""
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(VOCABULARY, WIDTH))[tokens]]
    for layer in range(LAYERS):
        states.append(states[-1] + rng.normal(size=states[0].shape) / (layer + 0.5))
    states[3][:, 0, 5] += 20_000
    states[4][:, 0, 5] += 20_500
    return np.stack(states).astype(np.float32)


def write_store(path: Path, sequences=24, layers=tuple(range(LAYERS + 1))) -> Store:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (sequences, CONTEXT)).astype(np.int32)
    document = np.repeat(np.arange(sequences * 2, dtype=np.int32), CONTEXT // 2).reshape(tokens.shape)
    spec = StoreSpec(
        identity={"teacher": {"name": "walk", "layers": LAYERS}},
        layers=layers,
        attention_layers=(),
        context=CONTEXT,
        width=WIDTH,
        dtype="float16",
        sequences_per_shard=8,
        sequences={"train": sequences},
    )
    states = walk(tokens)
    with StoreWriter.open(path, spec) as writer:
        writer.put_tokens("train", tokens, document)
        for key in writer.pending():
            with writer.shard(key) as shard:
                for layer in layers:
                    shard.put("hidden", layer, 0, states[layer, key.sequences.start : key.sequences.stop])
        writer.finish()
    return Store.open(path)


def short_map(store: Store, out: Path, /, **changes: Any) -> Recoupling:
    """`recouple` with few tokens."""
    given = {"store": store.path, "tokens": 24, "batches": 3, "sequences": 6, "out": out}
    return recouple(RecoupleSettings(**(given | changes)))
