"""What a stage returns, as a type: its fields are the keys that `--json` prints."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from lftpipe.artefacts.base import JsonObject


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(JsonObject, Mapping[str, Any]):
    """What a stage returns. As a mapping it has the keys and values that `--json` prints."""

    @functools.cached_property
    def _printed(self) -> dict[str, Any]:
        return self.to_json()

    def __getitem__(self, key: str) -> Any:
        return self._printed[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._printed)

    def __len__(self) -> int:
        return len(self._printed)
