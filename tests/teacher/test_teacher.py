import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, MODELS, VOCABULARY, neox, randomise
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from lftpipe.device import resolve_compute_dtype
from lftpipe.errors import TeacherError
from lftpipe.teacher import capture, source
from lftpipe.teacher.family import attention_context
from lftpipe.teacher.parts import (
    Tail,
    count_layer_parameters,
    count_parameters,
    load_layer,
    load_rotary,
)
from lftpipe.teacher.registry import REGISTERED
from lftpipe.teacher.source import Teacher, load_tokenizer, open_teacher
from lftpipe.teacher.trunk import Trunk

EXACT = {"rtol": 1e-4, "atol": 1e-5}
WORKSPACE = Path("unused")


def tokens_of(sequences: int, positions: int = CONTEXT) -> Tensor:
    generator = torch.Generator().manual_seed(sequences)
    return torch.randint(VOCABULARY, (sequences, positions), generator=generator)


def places(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def captured(
    trunk: Trunk, tokens: Tensor, position_ids: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Every `h[l]` and `a[l]` that the trunk hands out."""
    h: dict[int, Tensor] = {}
    a: dict[int, Tensor] = {}

    def keep(found: dict[int, Tensor]):
        def sink(layer: int, state: Tensor) -> None:
            assert layer not in found, "handed out twice"
            found[layer] = state.clone()

        return sink

    trunk.run(tokens, position_ids, hidden=keep(h), attention=keep(a))
    return h, a


def whole(teacher: Teacher) -> Any:
    return AutoModelForCausalLM.from_pretrained(teacher.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def run(teacher):
    """A teacher, two sequences, all their states by hooks, and transformers' own output."""
    tokens = tokens_of(2)
    position_ids = torch.arange(CONTEXT).expand(2, -1)
    h, a = captured(Trunk(teacher, teacher.num_layers, torch.float32), tokens, position_ids)
    with torch.no_grad():
        output = whole(teacher)(tokens, output_hidden_states=True)
    return teacher, h, a, output, attention_context(load_rotary(teacher), position_ids)


def test_the_hooks_capture_what_transformers_outputs_but_for_the_last_state(run):
    teacher, h, _, output, _ = run
    assert sorted(h) == list(range(teacher.num_layers + 1))
    for layer in range(teacher.num_layers):
        torch.testing.assert_close(h[layer], output.hidden_states[layer], **EXACT)
    last = output.hidden_states[-1]
    assert (h[teacher.num_layers] - last).abs().max() > 0.1  # transformers gives it after the final norm
    norm = Tail(teacher, teacher.num_layers).norm
    torch.testing.assert_close(norm(h[teacher.num_layers]), last, **EXACT)


def test_the_attention_contexts_are_what_each_layer_adds(run):
    teacher, h, a, _, _ = run
    assert sorted(a) == list(range(teacher.num_layers))
    for layer in a:
        parts = load_layer(teacher, layer)
        with torch.no_grad():
            y = h[layer] if parts.parallel else h[layer] + a[layer]
            rest = h[layer + 1] - h[layer] - parts.mlp(parts.mlp_norm(y))
        torch.testing.assert_close(a[layer], rest, rtol=1e-3, atol=1e-4)


def test_branches_are_the_teachers_layer(run):
    teacher, h, a, _, context = run
    for layer in range(teacher.num_layers):
        parts = load_layer(teacher, layer)
        with torch.no_grad():
            torch.testing.assert_close(parts(h[layer], context), h[layer + 1], **EXACT)
            attention = parts.attention(parts.attention_norm(h[layer]), context)
        torch.testing.assert_close(attention, a[layer], **EXACT)


def test_the_tail_gives_the_teachers_own_logits_from_any_state(run):
    teacher, h, _, output, context = run
    for start in range(teacher.num_layers + 1):
        tail = Tail(teacher, start)
        for begin in range(start, teacher.num_layers + 1):
            logits = tail(h[begin], context, start=begin)
            torch.testing.assert_close(logits, output.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(Tail(teacher, 1).states(h[1], context, start=1, stop=3), h[3], **EXACT)


@pytest.mark.parametrize("lengths", [(10, 22), (1, 30, 1), (CONTEXT,), (5,) * 6 + (2,)])
def test_a_packed_piece_is_what_the_teacher_computes_on_it_alone(teacher, lengths):
    tokens = tokens_of(1)
    trunk = Trunk(teacher, teacher.num_layers, torch.float32)
    h, a = captured(trunk, tokens, places(*lengths))
    start = 0
    for length in lengths:
        piece = slice(start, start + length)
        h_alone, a_alone = captured(trunk, tokens[:, piece], places(length))
        for layer, state in h_alone.items():
            torch.testing.assert_close(h[layer][:, piece], state, **EXACT)
        for layer, state in a_alone.items():
            torch.testing.assert_close(a[layer][:, piece], state, **EXACT)
        start += length


def test_packed_pieces_are_kept_apart_in_every_sequence_of_a_batch(teacher):
    tokens = tokens_of(3)
    position_ids = torch.cat([places(CONTEXT), places(10, 22), places(1, 30, 1)])
    trunk = Trunk(teacher, teacher.num_layers, torch.float32)
    together, _ = captured(trunk, tokens, position_ids)
    context = attention_context(load_rotary(teacher), position_ids)
    for row in range(3):
        alone, _ = captured(trunk, tokens[row : row + 1], position_ids[row : row + 1])
        for layer, state in alone.items():
            torch.testing.assert_close(together[layer][row : row + 1], state, **EXACT)
    with torch.no_grad():  # and a single layer, as training and evaluation run it, does the same
        torch.testing.assert_close(load_layer(teacher, 0)(together[0], context), together[1], **EXACT)


def calls_of(model: torch.nn.Module) -> list[str]:
    """Names of the modules that run, as they run."""
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("deepest", [1, 2, 4])
def test_the_trunk_stops_after_the_deepest_state_and_has_no_head(teacher, deepest):
    trunk = Trunk(teacher, deepest, torch.float32)
    calls = calls_of(trunk.model)
    h, a = captured(trunk, tokens_of(1), places(CONTEXT))
    assert sorted(h) == list(range(deepest + 1))
    assert sorted(a) == list(range(deepest))
    layers = [name for name in calls if name.startswith("layers.") and name.count(".") == 1]
    assert layers == [f"layers.{index}" for index in range(deepest)]
    names = [name for name, _ in trunk.model.named_parameters()]
    assert not any("head" in name or "embed_out" in name for name in names)
    assert trunk.num_parameters == VOCABULARY * 32 + deepest * count_layer_parameters(teacher)
    deeper, _ = captured(Trunk(teacher, 4, torch.float32), tokens_of(1), places(CONTEXT))
    torch.testing.assert_close(h[deepest], deeper[deepest], **EXACT)


def test_the_first_state_alone_is_the_embedding(neox_teacher):
    h, a = captured(Trunk(neox_teacher, 0, torch.float32), tokens_of(1), places(CONTEXT))
    assert sorted(h) == [0]
    assert a.keys() <= {0}
    weight = neox_teacher.checkpoint.read(["gpt_neox.embed_in.weight"])["gpt_neox.embed_in.weight"]
    torch.testing.assert_close(h[0], weight[tokens_of(1)])


def test_in_bfloat16_the_residual_stays_in_float32_and_near(teacher):
    exact, _ = captured(Trunk(teacher, 4, torch.float32), tokens_of(1), places(CONTEXT))
    rough, _ = captured(Trunk(teacher, 4, torch.bfloat16), tokens_of(1), places(CONTEXT))
    for layer, state in exact.items():
        assert rough[layer].dtype == torch.float32
        assert (rough[layer] - state).square().sum() < 1e-3 * state.square().sum()
    assert not torch.equal(rough[4], exact[4])


def test_parameters_are_counted_as_the_model_has_them(teacher):
    model = whole(teacher)
    assert count_parameters(teacher) == sum(parameter.numel() for parameter in model.parameters())
    layer = sum(parameter.numel() for parameter in model.base_model.layers[0].parameters())
    assert count_layer_parameters(teacher) == layer


def test_a_checkpoint_in_several_files_is_the_same_teacher(neox_teacher, tmp_path):
    whole(neox_teacher).save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    sharded = open_teacher(str(tmp_path / "sharded"), WORKSPACE)
    assert len(sharded.checkpoint.files) > 1
    assert sharded.checkpoint.sizes == neox_teacher.checkpoint.sizes
    for layer in range(4):
        ours, theirs = (load_layer(each, layer).state_dict() for each in (sharded, neox_teacher))
        torch.testing.assert_close(ours, theirs)
    (sharded.folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(TeacherError, match=r"damaged .*index\.json / expected: .* / do: fetch it again"):
        open_teacher(str(sharded.folder), WORKSPACE)


def test_the_head_is_known_by_its_old_name_and_its_new_one(neox_teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(neox_teacher.folder, tmp_path / "new")
    tensors = load_file(tmp_path / "new/model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, tmp_path / "new/model.safetensors", metadata={"format": "pt"})
    new = open_teacher(str(tmp_path / "new"), WORKSPACE)
    torch.testing.assert_close(Tail(new, 4).head.weight, Tail(neox_teacher, 4).head.weight)
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
        TeacherError, match=r"expected: a config that transformers reads / do: mend config\.json"
    ):
        open_teacher(str(tmp_path), WORKSPACE)


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
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
        (LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
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
    path = tmp_path / "cut/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    damaged = open_teacher(str(tmp_path / "cut"), WORKSPACE)
    with pytest.raises(TeacherError, match=r"damaged file .*model\.safetensors .* / do: fetch it again"):
        load_layer(damaged, 0)
    with pytest.raises(TeacherError, match="expected: weights that load / do: fetch it again"):
        Trunk(damaged, 2, torch.float32)


def test_weights_without_a_layer_are_refused_not_made_up(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    model = neox()
    randomise(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["gpt_neox.layers.1.attention.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lacking = open_teacher(str(tmp_path), WORKSPACE)
    with pytest.raises(TeacherError, match=r"without gpt_neox\.layers\.1\.attention\.dense\.weight"):
        load_layer(lacking, 1)
    with pytest.raises(TeacherError, match=r"without .*layers\.1\.attention\.dense\.weight"):
        Trunk(lacking, 2, torch.float32)


def test_the_tokenizer_is_the_one_beside_the_weights(neox_teacher, tmp_path):
    assert load_tokenizer(neox_teacher).eos_token_id == 0
    shutil.copytree(neox_teacher.folder, tmp_path / "copy")
    copy = open_teacher(str(tmp_path / "copy"), WORKSPACE)
    settings = json.loads((copy.folder / "tokenizer_config.json").read_text())
    (copy.folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(TeacherError, match="without an end-of-text token / expected: an eos_token"):
        load_tokenizer(copy)
    (copy.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"without a usable tokenizer / expected: tokenizer\.json"):
        load_tokenizer(copy)
    for file in copy.folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TeacherError, match=r"without a usable tokenizer / expected: tokenizer\.json"):
        load_tokenizer(copy)


# The Hub, with its client faked


@pytest.fixture
def hub(monkeypatch):
    """Put an answer in the place of the Hub's."""
    import huggingface_hub

    def install(answer):
        calls = []

        def snapshot_download(hub_id, *, revision, allow_patterns):
            calls.append((hub_id, revision))
            assert not any("bin" in pattern for pattern in allow_patterns)
            if isinstance(answer, BaseException):
                raise answer
            return str(answer)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return install


@pytest.mark.parametrize("model", ["pythia-410m", "EleutherAI/pythia-410m"])
def test_a_hub_model_is_known_by_its_commit(hub, neox_teacher, tmp_path, model):
    shutil.copytree(neox_teacher.folder, tmp_path / "0123abcd")
    calls = hub(tmp_path / "0123abcd")
    teacher = open_teacher(model, WORKSPACE, revision="step1000")
    assert calls == [("EleutherAI/pythia-410m", "step1000")]
    assert (teacher.revision, teacher.model) == ("0123abcd", model)
    assert teacher.name == model.replace("/", "--")
    assert teacher.corpus == ("pile" if model == "pythia-410m" else None)


class NetworkError(Exception):
    """Of a client library that derives its errors from nothing in particular."""


def hub_errors() -> dict[str, tuple[Exception, str]]:
    errors: Any = importlib.import_module("huggingface_hub.errors")
    response = errors.Response(
        404, request=errors.Response.__init__.__globals__["Request"]("GET", "https://hub")
    )
    return {
        "offline": (
            errors.LocalEntryNotFoundError("no network"),
            "expected: the Hugging Face Hub within reach",
        ),
        "timeout": (NetworkError("late"), "expected: the Hugging Face Hub within reach"),
        "refused": (ConnectionError("refused"), "expected: the Hugging Face Hub within reach"),
        "missing": (
            errors.RepositoryNotFoundError("?", response=response),
            "expected: a public model on the Hugging",
        ),
        "revision": (
            errors.RevisionNotFoundError("?", response=response),
            "revision step7 .* / do: check --revision",
        ),
        "name": (errors.HFValidationError("?"), "expected: a public model on the Hugging Face Hub"),
    }


def test_a_full_disk_is_not_blamed_on_the_hub(hub):
    hub(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left on device"):
        open_teacher("org/model", WORKSPACE)


@pytest.mark.parametrize("case", hub_errors())
def test_a_hub_that_cannot_answer_is_one_line_with_the_cure(hub, case):
    error, message = hub_errors()[case]
    hub(error)
    with pytest.raises(TeacherError, match=message):
        open_teacher("org/model", WORKSPACE, revision="step7")


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


def test_a_gguf_file_becomes_a_folder_once(teachers, tmp_path, monkeypatch):
    """With transformers' reader of the format faked by the tiny Llama's folder."""
    (tmp_path / "tiny.gguf").write_bytes(b"weights")
    folder, made = teachers["llama"], []
    import transformers

    for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
        real = getattr(transformers, name).from_pretrained

        def fake(pretrained_model_name_or_path, *, real=real, gguf_file=None, **options):
            if gguf_file is None:
                return real(pretrained_model_name_or_path, **options)
            made.append(gguf_file)
            return real(folder, **options)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fake)
    first = open_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "workspace")
    assert (first.name, first.model) == ("tiny", str(tmp_path / "tiny.gguf"))
    again = open_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "workspace")
    assert made == ["tiny.gguf"] * 3
    assert again.checkpoint.digest == first.checkpoint.digest
    torch.testing.assert_close(
        load_layer(first, 2).state_dict(), load_layer(open_teacher(str(folder), WORKSPACE), 2).state_dict()
    )
    assert load_tokenizer(first).eos_token_id == 0
    (tmp_path / "tiny.gguf").write_bytes(b"other weights")
    open_teacher(str(tmp_path / "tiny.gguf"), tmp_path / "workspace")
    assert len(made) == 6


def test_families_differ_in_name():
    names = [kind for family in source.FAMILIES for kind in family.model_types]
    assert len(names) == len(set(names))
