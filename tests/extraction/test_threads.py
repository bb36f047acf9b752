"""A store does not depend on how many threads compute it, nor on how they are spread."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama, make_tokenizer
from extractions import change, contents

from lftpipe.commands.extract import extract
from lftpipe.config.settings import ExtractSettings
from lftpipe.teacher.source import open_teacher
from lftpipe.teacher.trunk import Trunk


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's widths: with them, on AMX, products of two threads have other last bits than those of one."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    shape = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 256}
    model: Any = llama(hidden_size=576, intermediate_size=1536, num_hidden_layers=2, **shape)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_threads_workers_and_streamed_layers_give_the_same_bytes(wide, text_folder, tmp_path, dtype):
    settings = ExtractSettings(
        model=str(wide),
        corpus=str(text_folder),
        context=128,
        tokens=18 * 128,
        validation_tokens=2 * 128,
        batch_tokens=512,
        logits=4,
        shard_bytes=2_000_000,
        compute_dtype=dtype,
        threads=1,
    )
    ways: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"threads": 2},
        "five": {"threads": 5},
        "workers": {"threads": 2, "workers": 2},
        "streamed": {"threads": 2, "stream_layers": True},
    }
    stores = {}
    threads = torch.get_num_threads()
    for name, options in ways.items():
        found = extract(change(settings, workspace=tmp_path / name, **options))
        stores[name] = contents(Path(found["store"]))
        torch.set_num_threads(threads)
    for name, store in stores.items():
        assert store == stores["one"], name


def test_what_hooks_on_one_trunk_see_is_not_what_its_twin_computes(wide):
    teacher = open_teacher(str(wide), Path("unused"))
    trunk = Trunk(teacher, 2, torch.float32)
    twin = trunk.twin()
    tokens = torch.arange(8).reshape(2, 4)
    places = torch.arange(4).expand(2, 4)
    seen: list[int] = []

    def other_runs(layer: int, _: torch.Tensor) -> None:
        seen.append(layer)
        if layer == 0:
            twin.run(tokens + 8, places, hidden=lambda *_: None)

    trunk.run(tokens, places, hidden=other_runs)
    assert seen == [0, 1, 2]
    pairs = zip(trunk.model.parameters(), twin.model.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in pairs)
