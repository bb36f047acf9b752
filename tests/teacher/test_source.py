"""A name to a frozen teacher: folders, checkpoints, tokenizers and GGUF files; what is refused."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODELS, neox, randomise
from teachers import WORKSPACE, whole
from transformers import BertConfig, BertLMHeadModel

from lftpipe.base.device import resolve_compute_dtype
from lftpipe.base.errors import TeacherError
from lftpipe.teacher import capture
from lftpipe.teacher.layers import load_layer
from lftpipe.teacher.registry import REGISTERED
from lftpipe.teacher.source import load_tokenizer, open_teacher
from lftpipe.teacher.tail import Tail, count_parameters
from lftpipe.teacher.trunk import Trunk


def test_a_checkpoint_in_several_files_is_the_same_teacher(neox_teacher, tmp_path):
    whole(neox_teacher).save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    sharded = open_teacher(str(tmp_path / "sharded"), WORKSPACE)
    assert len(sharded.checkpoint.files) > 1
    assert sharded.checkpoint.sizes == neox_teacher.checkpoint.sizes
    for layer in range(4):
        ours, theirs = (load_layer(each, layer).state_dict() for each in (sharded, neox_teacher))
        torch.testing.assert_close(ours, theirs)
    (sharded.folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(
        TeacherError, match=r"damaged .*index\.json \(.+\) / expected: .* / do: fetch it again"
    ):
        open_teacher(str(sharded.folder), WORKSPACE)


def test_the_head_is_known_by_its_old_name_and_its_new_one(neox_teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(neox_teacher.folder, tmp_path / "new")
    tensors = load_file(tmp_path / "new/model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, tmp_path / "new/model.safetensors", metadata={"format": "pt"})
    new = open_teacher(str(tmp_path / "new"), WORKSPACE)
    [ours], [theirs] = (Tail(each, 4).head.parameters() for each in (new, neox_teacher))
    assert torch.equal(ours, theirs)
    assert count_parameters(new) == count_parameters(neox_teacher)


# Finding a teacher, and refusing what is none


def test_the_identity_names_weights_and_shape(neox_teacher, teachers):
    identity = neox_teacher.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["family"], identity["layers"], identity["width"], identity["parallel_residual"]) == (
        "gpt_neox",
        4,
        32,
        True,
    )
    digests = {open_teacher(str(path), WORKSPACE).checkpoint.digest for path in teachers.values()}
    assert len(digests) == len(MODELS) - 1  # sequential and parallel NeoX have the same weights
    same = open_teacher(str(neox_teacher.folder), WORKSPACE, revision=None)
    assert same.identity() == identity


def test_a_changed_tokenizer_has_another_digest(neox_teacher, tmp_path):
    shutil.copytree(neox_teacher.folder, tmp_path / "copy")
    copy = open_teacher(str(tmp_path / "copy"), WORKSPACE)
    assert copy.tokenizer_digest == neox_teacher.tokenizer_digest
    path = tmp_path / "copy/tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|end|>"))
    assert open_teacher(str(tmp_path / "copy"), WORKSPACE).tokenizer_digest != copy.tokenizer_digest


@pytest.mark.parametrize("name", ["nonsense", "pythia-411m", "a/b/c", "./nowhere/model", "x.gguf", ""])
def test_an_unknown_model_is_refused_with_what_is_known(name):
    with pytest.raises(
        TeacherError, match=r"expected: a registered name .*pythia-410m.* / do: check the spelling"
    ):
        open_teacher(name, WORKSPACE)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(
        TeacherError, match=r"without config\.json / expected: a model in transformers' format"
    ):
        open_teacher(str(tmp_path), WORKSPACE)


@pytest.mark.parametrize("config", ["", "{", "{}", '{"model_type": "no such"}', "[]"])
def test_a_config_that_is_none_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(
        TeacherError, match=r"expected: a config that transformers reads / do: correct config\.json"
    ):
        open_teacher(str(tmp_path), WORKSPACE)


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"depend on tokens that come later / expected: a causal decoder"):
        Trunk(open_teacher(str(tmp_path), WORKSPACE), 1, torch.float32)


def saved(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


def test_what_is_no_decoder_of_text_is_refused_with_the_reason(tmp_path):
    from transformers import Gemma3Config, LlamaConfig, T5Config

    for config, reason in (
        (T5Config(), "of type t5, an encoder with a decoder / expected: a decoder alone"),
        (Gemma3Config(), "reads more than text / expected: its text part alone, a model of type gemma3_text"),
        (LlamaConfig(**{"quantization_config": {"quant_method": "gptq", "bits": 4}}), r"quantised \(gptq\)"),
    ):
        folder = saved(config, tmp_path / config.model_type)
        (tmp_path / config.model_type / "model.safetensors").touch()
        with pytest.raises(TeacherError, match=reason):
            open_teacher(folder, WORKSPACE)


def test_a_capture_that_is_not_the_hidden_state_is_refused(neox_teacher, monkeypatch):
    def shifted(index, sink):
        return lambda module, given, named: sink(index, given[0] + 1 if index == 1 else given[0])

    monkeypatch.setattr(capture, "_entering", shifted)
    with pytest.raises(TeacherError, match=r"states are not what enters its layers .* nothing was stored"):
        Trunk(neox_teacher, 4, torch.float32)


def test_pickles_are_never_loaded(neox_teacher, tmp_path, monkeypatch):
    shutil.copy(neox_teacher.folder / "config.json", tmp_path)
    torch.save(whole(neox_teacher).state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was loaded"))
    with pytest.raises(TeacherError, match=r"without model\.safetensors / expected: weights as safetensors"):
        open_teacher(str(tmp_path), WORKSPACE)


def test_damaged_weights_are_refused(neox_teacher, tmp_path):
    shutil.copytree(neox_teacher.folder, tmp_path / "cut")
    damaged = open_teacher(str(tmp_path / "cut"), WORKSPACE)
    path = tmp_path / "cut/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    damage = r"damaged file .*model\.safetensors .* / do: fetch it again"
    with pytest.raises(TeacherError, match=damage):
        open_teacher(str(tmp_path / "cut"), WORKSPACE)
    with pytest.raises(TeacherError, match=damage):
        load_layer(damaged, 0)
    with pytest.raises(TeacherError, match=damage):
        Trunk(damaged, 2, torch.float32)


def test_weights_without_a_layer_are_refused_not_made_up(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    model = neox()
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["gpt_neox.layers.1.attention.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"without gpt_neox\.layers\.1\.attention\.dense\.weight"):
        open_teacher(str(tmp_path), WORKSPACE)


def test_the_tokenizer_is_the_one_beside_the_weights(neox_teacher, tmp_path):
    assert load_tokenizer(neox_teacher).eos_token_id == 0
    shutil.copytree(neox_teacher.folder, tmp_path / "copy")
    copy = open_teacher(str(tmp_path / "copy"), WORKSPACE)
    settings = json.loads((copy.folder / "tokenizer_config.json").read_text())
    (copy.folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(TeacherError, match="without an end-of-text token / expected: an eos_token"):
        load_tokenizer(copy)
    (copy.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"without a usable tokenizer .* expected: tokenizer\.json"):
        load_tokenizer(copy)
    for file in copy.folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TeacherError, match=r"without a usable tokenizer .* expected: tokenizer\.json"):
        load_tokenizer(copy)


def test_a_teacher_that_must_be_fetched_first_says_how(tmp_path):
    with pytest.raises(
        TeacherError, match=r"teacher smollm2-135m without .*teacher\.gguf .* / do: run `make smollm2`"
    ):
        open_teacher("smollm2-135m", tmp_path)


def test_every_registered_teacher_has_a_corpus_and_a_place():
    for registered in REGISTERED.values():
        assert registered.corpus in ("pile", "python-stdlib")
        assert bool(registered.hub_id) + bool(registered.folder) + bool(registered.gguf) == 1


def test_remote_code_is_never_run_unasked(neox_teacher, tmp_path, monkeypatch):
    shutil.copytree(neox_teacher.folder, tmp_path / "code")
    config = json.loads((tmp_path / "code/config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoConfig": "mystery.Config"}}
    (tmp_path / "code/config.json").write_text(json.dumps(config))
    (tmp_path / "code/mystery.py").write_text("raise SystemExit('remote code was run')\n")
    with pytest.raises(TeacherError, match="expected: a config that transformers reads"):
        open_teacher(str(tmp_path / "code"), WORKSPACE)


# Whatever else is in a teacher's folder


def test_an_adapter_beside_the_weights_is_refused_not_injected(neox_teacher, tmp_path):
    folder = shutil.copytree(neox_teacher.folder, tmp_path / "merged")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    with pytest.raises(TeacherError, match=r"adapter_config\.json.* / do: remove that file if .* merged"):
        open_teacher(str(folder), WORKSPACE)


def test_other_formats_of_the_weights_change_nothing_that_is_read(neox_teacher, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(neox_teacher.folder, tmp_path / "copy")
    for name in ("consolidated.safetensors", "original/model.safetensors", "onnx/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({"other": torch.zeros(1)}, folder / name)
    (folder / "onnx/config.json").write_text("{}")
    assert open_teacher(str(folder), WORKSPACE).identity() == neox_teacher.identity() | {
        "name": "copy",
        "model": str(folder),
    }


# Compute formats


def test_the_compute_format_is_the_asked_one_or_the_fastest(monkeypatch):
    assert resolve_compute_dtype("float32", "cpu") == torch.float32
    assert resolve_compute_dtype("bfloat16", "cpu") == torch.bfloat16
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_compute_dtype("auto", "cpu") == expected


def test_a_gguf_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF no more")
    with pytest.raises(TeacherError, match=r"a\.gguf .*/ expected: a GGUF file that transformers reads"):
        open_teacher(str(tmp_path / "a.gguf"), tmp_path)


def write_gguf(path: Path, text: str, parts: int = 0) -> None:
    """A file of the format that holds a name and, if it is one of several, their number."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_name(text)
    if parts:
        writer.add_uint16("split.count", parts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["tiny-00001-of-00002.gguf", "renamed.GGUF"])
def test_a_part_of_a_split_gguf_is_not_taken_for_the_whole(read_as_gguf, tmp_path, name):
    write_gguf(tmp_path / name, "a", parts=2)
    with pytest.raises(TeacherError, match=r"one of 2 parts of a model .* / do: join them: llama-gguf-split"):
        open_teacher(str(tmp_path / name), tmp_path / "workspace")
    assert not read_as_gguf
    assert not (tmp_path / "workspace").exists()


def test_a_gguf_that_lacks_a_tensor_is_refused_by_its_name(read_as_gguf, teachers, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(teachers["llama"] / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    read_as_gguf.folder = shutil.copytree(teachers["llama"], tmp_path / "lacking")
    save_file(tensors, tmp_path / "lacking/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        TeacherError, match=r"tiny\.gguf without the tensor model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        open_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "workspace")
    assert not list(tmp_path.glob("workspace/*/teacher*"))


class Calls(list[str]):
    """Files that were read, and the folder that they are faked by."""

    folder: Path


@pytest.fixture
def read_as_gguf(teachers, tmp_path, monkeypatch):
    """Calls of transformers' reader of the format, for a file that is faked by the tiny Llama's folder."""
    write_gguf(tmp_path / "tiny.gguf", "weights")
    made = Calls()
    made.folder = teachers["llama"]
    import transformers

    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        real = getattr(transformers, name).from_pretrained

        def fake(pretrained_model_name_or_path, *, real=real, gguf_file=None, **options):
            if gguf_file is None:
                return real(pretrained_model_name_or_path, **options)
            made.append(gguf_file)
            return real(made.folder, **options)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fake)
    return made


def test_a_gguf_file_becomes_a_folder_once(read_as_gguf, teachers, tmp_path):
    made, folder = read_as_gguf, teachers["llama"]
    first = open_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "workspace")
    assert (first.name, first.model) == ("tiny", str(tmp_path / "tiny.gguf"))
    again = open_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "workspace")
    assert made == ["tiny.gguf"] * 3
    assert again.checkpoint.digest == first.checkpoint.digest
    torch.testing.assert_close(
        load_layer(first, 2).state_dict(), load_layer(open_teacher(str(folder), WORKSPACE), 2).state_dict()
    )
    assert load_tokenizer(first).eos_token_id == 0
    write_gguf(tmp_path / "tiny.gguf", "other weights")
    open_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "workspace")
    assert len(made) == 6


def test_commands_that_begin_at_once_convert_a_gguf_file_once(read_as_gguf, tmp_path):
    both = threading.Barrier(2)

    def opened(_):
        both.wait(30)
        return open_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "workspace").checkpoint.digest

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(opened, range(2)))) == 1
    assert len(read_as_gguf) == 3
