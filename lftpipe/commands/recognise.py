"""`lftpipe recognise`: run a recogniser's encoder once, and keep what it heard."""

import time
from pathlib import Path

from lftpipe.base import progress
from lftpipe.base.device import on_device
from lftpipe.base.errors import SettingsError
from lftpipe.base.files import file_digest
from lftpipe.base.outputs import one_writer
from lftpipe.config.settings import RecogniseSettings
from lftpipe.fusion.encoders import open_encoder, read_npz
from lftpipe.results.fusion import Recognition
from lftpipe.store.heard import HeardStore


@on_device
def recognise(settings: RecogniseSettings) -> Recognition:
    """Recognise files, those that were not recognised before.

    Raises `LftpipeError` if a file is missing or of another kind, or the store is another recogniser's.
    """
    paths = _files(settings)
    if settings.recogniser is None:
        raise SettingsError("recognise without --recogniser", "pp-ocrv4, a Whisper, or npz", "name one")
    encoder = open_encoder(settings.recogniser, settings.workspace, settings.device)
    labels = encoder.labels or (read_npz(paths[0])[1] if settings.recogniser == "npz" else [])
    path = settings.store or settings.workspace / "heard.zarr"
    path.parent.mkdir(parents=True, exist_ok=True)
    started, added, frames = time.monotonic(), 0, 0
    with one_writer(path), progress.task("recognise", len(paths), "inputs") as task:
        store = HeardStore.begin(path, encoder.facts, labels, force=settings.force)
        for each in paths:
            digest = file_digest(each)
            found = store.find(str(each), digest)
            if found is None or settings.force:
                if settings.recogniser == "npz" and read_npz(each)[1] != labels:
                    raise SettingsError(f"other labels in {each}", "those of the first file", "keep it apart")
                found, added = store.add(str(each), digest, encoder.encode(each)), added + 1
            frames += found.shape[0]
            task.advance(1)
    return Recognition(
        store=str(path),
        recogniser=settings.recogniser,
        kind=encoder.facts["kind"],
        inputs=len(store.inputs),
        added=added,
        frames=frames,
        seconds=round(time.monotonic() - started, 2),
    )


def _files(settings: RecogniseSettings) -> list[Path]:
    paths = [Path(each) for each in settings.files]
    if not paths:
        raise SettingsError("recognise without files", "recordings, images or .npz files", "name some")
    for path in paths:
        if not path.is_file():
            raise SettingsError(f"{path}, which is not there", "a file", "name files that are there")
    return paths


def summary(result: Recognition) -> str:
    """What is there now, and what comes next."""
    old = result.inputs - result.added
    return (
        f"{result.store}: {result.inputs} inputs by {result.recogniser}"
        + (f", {old} of them from before" if old else "")
        + f", {result.frames} frames, {result.seconds:.1f} s\nnext: lftpipe fuse MODEL --from {result.store}"
    )
