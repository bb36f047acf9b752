"""Runs on a rolling store: what they may ask of it, and how they tell its producer where they stand."""

from pathlib import Path

from lftpipe import runs
from lftpipe.base.errors import SettingsError
from lftpipe.config.loss import CLOSED_FORM
from lftpipe.config.settings import TrainSettings
from lftpipe.store import Reader, Store, register, unregister


def window_of(settings: TrainSettings, store: Store) -> int:
    """Sequences that a run shuffles among themselves; 0: all.

    `store`: what it is trained on; a rolling one has its own windows.
    """
    if not store.spec.rolling:
        return settings.window
    if settings.window not in (0, sequences := store.windows.sequences):
        raise SettingsError(
            f"--window {settings.window} on a rolling store",
            f"its own windows, of {sequences} sequences",
            "leave out --window",
        )
    return sequences


def check_rolling(settings: TrainSettings, store: Store) -> None:
    """Refuse what needs training states that a rolling store has dropped, or not made yet.

    Raises `LftpipeError` with the reason, if it is a rolling store.
    """
    if not store.spec.rolling or settings.from_teacher:
        return
    if settings.objective in CLOSED_FORM and settings.objective != "skip":
        store.need_whole(f"--objective {settings.objective}")
    if settings.hold_back:
        store.need_whole(f"--hold-back {settings.hold_back:g}")
    if settings.init == "readout":
        store.need_whole("--init readout")
    if settings.loss_scale == "channel":
        store.need_whole("--loss-scale channel")
    batch, windows = max(1, settings.batch_tokens // store.context), store.windows
    if windows.count > 1 and 2 * batch > windows.sequences:
        raise SettingsError(
            f"--batch-tokens {settings.batch_tokens} on a rolling store with windows of "
            f"{windows.sequences} sequences",
            f"at most {windows.sequences // 2 * store.context}: a window holds two batches",
            "lower it, or extract with a larger --rolling",
        )


class Standing:
    """What the producer of a rolling store knows of some runs that are trained jointly.

    `folder`: of the first run, whose checkpoint is that of all.
    `batch`, `steps`: sequences of a step, and how many steps there are.
    """

    def __init__(self, folder: Path, store: Store, batch: int, steps: int) -> None:
        self._store, self._folder, self._batch, self._steps = store, folder.resolve(), batch, steps

    def passed(self, step: int) -> None:
        """A checkpoint of this step is on the disk: windows before it are no longer needed."""
        register(self._store.path, self._at(step))

    def leave(self) -> None:
        """Nothing more is needed."""
        unregister(self._store.path, self._at(0))

    def enters_window(self, step: int) -> bool:
        """Whether a new window begins with this step: time for a checkpoint, to let the last one go."""
        number = self._store.windows.number
        return number(step * self._batch) > number((step - 1) * self._batch)

    def _at(self, step: int) -> Reader:
        return Reader(
            run=str(self._folder),
            begun=str(self._folder / runs.SETTINGS),
            finished=str(self._folder / runs.MANIFEST),
            position=step * self._batch,
            end=self._steps * self._batch,
            batch=self._batch,
        )
