"""What `lftpipe generate` takes for the next token: nothing is decided by files that nobody asked about."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import text_of
from tiny_students import save_run
from tokenizers.processors import TemplateProcessing

from lftpipe import runs
from lftpipe.base.errors import SettingsError
from lftpipe.commands.generate import generate
from lftpipe.config.settings import GenerateSettings
from lftpipe.student.assemble import build_student, load_teacher
from lftpipe.student.decoding import Sampling, continue_prompt, end_tokens, speculate
from lftpipe.teacher.source import Teacher, load_tokenizer, open_teacher, prompt_tokens

PROMPT = "the state of a layer flows into"


@pytest.fixture
def folder(teachers: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the GPT-NeoX teacher, to change its files."""
    return Path(shutil.copytree(teachers["neox"], tmp_path / "changed"))


def with_choices(folder: Path, **choices: Any) -> Teacher:
    """The teacher with these settings in its generation_config.json."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | choices))
    return open_teacher(str(folder), Path("unused"))


@torch.inference_mode()
def most_likely(model: Any, tokenizer: Any, count: int) -> list[int]:
    """The most likely tokens after the prompt, one after the other, however long that goes on."""
    ids = tokenizer(PROMPT)["input_ids"]
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_temperature_0_takes_the_most_likely_token_whatever_the_generation_config_says(
    folder: Path, tokenizer: Any
) -> None:
    plain = most_likely(load_teacher(open_teacher(str(folder), Path("unused"))), tokenizer, 12)
    choices = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": plain[:2]}
    sampled = {"do_sample": True, "temperature": 3.0, "top_k": 2, "min_p": 0.1}
    teacher = with_choices(
        folder, eos_token_id=[], num_beams=3, bad_words_ids=[plain[3:4]], **choices, **sampled
    )
    model = load_teacher(teacher)
    before = model.generation_config
    assert continue_prompt(model, tokenizer, PROMPT, 12).tokens == plain
    assert model.generation_config is before
    assert model.generation_config.repetition_penalty == 9.0
    drafted = speculate(model, load_teacher(teacher), tokenizer, PROMPT, 12)
    assert drafted.continuation.tokens == plain


def test_tokens_are_drawn_from_the_whole_vocabulary_unless_top_k_or_top_p_is_passed(
    folder: Path, tokenizer: Any
) -> None:
    model = load_teacher(with_choices(folder, top_k=1, top_p=0.1, temperature=0.1, eos_token_id=[]))
    ids = tokenizer(PROMPT)["input_ids"]
    torch.manual_seed(3)
    with torch.inference_mode():
        for _ in range(12):
            logits = model(torch.tensor([ids])).logits[:, -1]
            ids.append(int(torch.multinomial(torch.softmax(logits / 2, -1), 1)))
    torch.manual_seed(3)
    drawn = continue_prompt(model, tokenizer, PROMPT, 12, sampling=Sampling(temperature=2.0))
    assert drawn.tokens == [*ids[-12:], 0][: len(drawn.tokens)]
    assert drawn.tokens[-1] == 0 or len(drawn.tokens) == 12
    assert len(drawn.tokens) > 5
    plain = most_likely(model, tokenizer, 12)
    assert drawn.tokens != plain
    for narrow in (Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_p=1e-6)):
        assert continue_prompt(model, tokenizer, PROMPT, 12, sampling=narrow).tokens == plain
    penalised = continue_prompt(model, tokenizer, PROMPT, 24, sampling=Sampling(repetition_penalty=50.0))
    assert len(set(penalised.tokens)) == len(penalised.tokens) > 12


@pytest.mark.parametrize("listed", ["first", "second"])
def test_a_text_stops_at_every_end_token_of_the_generation_config(
    folder: Path, tokenizer: Any, listed: str
) -> None:
    plain = most_likely(load_teacher(open_teacher(str(folder), Path("unused"))), tokenizer, 12)
    end = next(token for token in plain if token != plain[0])
    ends = [end, 0] if listed == "first" else [0, end]
    model = load_teacher(with_choices(folder, eos_token_id=ends))
    assert end_tokens(model, tokenizer) == [0, end]
    assert continue_prompt(model, tokenizer, PROMPT, 12).tokens == plain[: plain.index(end) + 1]


def test_a_student_stops_where_its_teacher_does(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    teacher = open_teacher(str(folder), Path("unused"))
    save_run(tmp_path / "tiny" / "runs" / "flow", teacher, (1, 3))
    settings = GenerateSettings(workspace=tmp_path, target="flow", prompt=PROMPT, max_new_tokens=12)
    count = generate(settings)["new_tokens"]
    student = build_student(teacher, [runs.open_run(tmp_path / "tiny" / "runs" / "flow")])
    written = most_likely(student, tokenizer, 12)
    end = next(token for token in written if token != written[0])
    with_choices(folder, eos_token_id=[0, end])
    assert generate(settings)["new_tokens"] == written.index(end) + 1 <= count


def test_a_prompt_is_opened_once_and_never_closed(folder: Path, tokenizer: Any) -> None:
    plain = tokenizer(PROMPT)["input_ids"]
    backend = tokenizer.__class__.from_pretrained(folder).backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    closing = load_tokenizer(open_teacher(str(folder), Path("unused")))
    assert closing(PROMPT)["input_ids"] == [0, *plain, 0]
    assert prompt_tokens(closing, PROMPT) == [0, *plain]
    assert prompt_tokens(closing, "the<|endoftext|>") == [0, *tokenizer("the")["input_ids"], 0]


def test_a_token_that_the_model_has_no_embedding_of_is_refused_in_the_prompt(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(open_teacher(str(folder), Path("unused")))
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(folder)
    save_run(tmp_path / "tiny" / "runs" / "flow", open_teacher(str(folder), Path("unused")), (1, 3))
    for named in ({"target": "flow"}, {"draft": "flow"}):
        with pytest.raises(SettingsError, match=r"token 320, '<added>' / expected: tokens below 320"):
            generate(GenerateSettings(workspace=tmp_path, prompt="the <added>", **named))
    assert generate(GenerateSettings(workspace=tmp_path, prompt="the", target="flow", max_new_tokens=2))


def test_a_tokenizer_that_drops_merges_at_random_is_made_to_give_equal_tokens(
    folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    dropping = load_tokenizer(open_teacher(str(folder), Path("unused")))
    assert "note: dropout of" in capsys.readouterr().err
    text = text_of(0, 100)
    assert dropping(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("option", [{"top_k": 5}, {"top_p": 0.9}])
def test_options_of_drawing_are_refused_where_nothing_is_drawn(option: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"given: --top-. with --temperature 0"):
        generate(GenerateSettings(target="flow", prompt=PROMPT, **option))
