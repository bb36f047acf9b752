"""Where a stage computes: the device it was given exists, and the processor is ready."""

import torch

from lftpipe.compute import prepare_processor
from lftpipe.errors import SettingsError


def prepare(device: str, threads: int | None) -> None:
    """Check that there is such a device, and make the processor ready.

    Raises
    ------
    SettingsError
        If torch does not know the device, or has none of its kind.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        kinds = ["cpu", *(kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available())]
        raise SettingsError(
            f"--device {device}", f"a device of this machine: {', '.join(kinds)}", "name one"
        ) from error
    prepare_processor(threads)
