"""Random positions of a store's sequences, and their states: each state is read once."""

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
from jaxtyping import Float, Int64

from lftpipe.corpus.packing import positions
from lftpipe.errors import SettingsError, StoreError
from lftpipe.store import Store

#: Bytes read at a time by each thread.
READ_BYTES = 32 * 2**20


def draw_samples(
    store: Store, *, tokens: int, batches: int, sequences: int, seed: int, skip_first: bool
) -> Int64[np.ndarray, "batch token 2"]:
    """Draw batches of `[sequence, position]` from `train`, uniformly and without replacement.

    Each batch has sequences of its own, so that batches are independent; it draws from all their positions
    alike. A store with too few sequences for that is drawn from as a whole, still without replacement.

    Parameters
    ----------
    sequences
        How many sequences a batch draws from; more if it would otherwise take over half of their positions.
    skip_first
        Leave out the first position of each segment, where massive activations sit.
    """
    rng = np.random.default_rng(seed)
    available = store.num_sequences("train")
    each = min(max(sequences, -(-2 * tokens // store.context)), available)
    order = rng.permutation(available)
    if each and batches * each <= available:
        pools = [
            _candidates(store, rows, skip_first) for rows in order[: batches * each].reshape(batches, -1)
        ]
        short = min(len(pool) for pool in pools) < tokens
        drawn = [] if short else [pool[rng.choice(len(pool), tokens, replace=False)] for pool in pools]
    else:
        pool = _candidates(store, order, skip_first)
        short = len(pool) < batches * tokens
        drawn = [] if short else np.split(pool[rng.permutation(len(pool))[: batches * tokens]], batches)
    if short:
        have = store.num_sequences("train") * store.context
        raise SettingsError(
            f"--batches {batches} of --tokens {tokens}, {batches * tokens:,} samples",
            f"no more than {store.path} has in train: {have:,} positions"
            + (", fewer without first ones" if skip_first else ""),
            "lower --tokens or --batches, or extract with more --tokens",
        )
    return np.stack([batch[np.lexsort(batch.T[::-1])] for batch in drawn])


def _candidates(
    store: Store, rows: Int64[np.ndarray, " row"], skip_first: bool
) -> Int64[np.ndarray, "place 2"]:
    rows = np.sort(rows)
    if skip_first:
        row, position = np.nonzero(positions(store.document("train", rows.tolist())) > 0)
    else:
        row, position = np.indices((len(rows), store.context)).reshape(2, -1)
    return np.stack([rows[row], position], 1)


def gather(
    store: Store,
    layers: Sequence[int],
    samples: Int64[np.ndarray, "batch token 2"],
    pool: Executor,
) -> list[Float[np.ndarray, "batch token feature"]]:
    """States of the samples, a layer at a time, in the store's dtype; every sequence is read once a layer.

    Raises
    ------
    StoreError
        If a value is not finite, naming layer, sequence, position and channel.
    """
    wanted, inverse = np.unique(samples[..., 0], return_inverse=True)
    inverse = inverse.reshape(samples.shape[:2])
    step = max(1, READ_BYTES // (store.context * store.width * 4))

    def one(layer: int) -> np.ndarray:
        states = None
        for first in range(0, len(wanted), step):
            block = store.read("train", layer, wanted[first : first + step].tolist())
            if states is None:
                states = np.empty((*samples.shape[:2], block.shape[-1]), block.dtype)
            here = (first <= inverse) & (inverse < first + step)
            states[here] = block[inverse[here] - first, samples[..., 1][here]]
        assert states is not None
        if not np.isfinite(states).all():
            batch, token, channel = (int(index[0]) for index in np.nonzero(~np.isfinite(states)))
            sequence, position = samples[batch, token].tolist()
            raise StoreError(
                f"state {layer} that is not finite at sequence {sequence}, position {position}, "
                f"channel {channel}",
                "finite states",
                "run `lftpipe verify`, then extract again",
            )
        return states

    return list(pool.map(one, layers))
