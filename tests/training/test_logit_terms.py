"""Terms on next-token distributions: the same number and gradient in pieces as at once, at a lower price."""

from dataclasses import replace

import pytest
import torch
from conftest import CONTEXT, extracted
from torch import Tensor, nn
from training_runs import change, short_run, teacher_of, weights_of

from lftpipe.batch import Batch, BatchFields, BatchReader
from lftpipe.config.recipe import from_recipe
from lftpipe.config.settings import TrainSettings
from lftpipe.flow.distillation import full_divergence, top_divergence
from lftpipe.stages.train import train
from lftpipe.store import Store
from lftpipe.teacher.parts import Tail
from lftpipe.training import logit_terms
from lftpipe.training.logit_terms import FrozenTails, logit_divergence, top_logit_divergence

START = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory, teachers, text_folder) -> Store:
    folder = tmp_path_factory.mktemp("logits")
    return Store.open(extracted(folder, teachers["neox"], text_folder, dtype="float32", logits=8))


@pytest.fixture(scope="module")
def tail(store) -> Tail:
    return Tail(teacher_of(store), START)


@pytest.fixture(scope="module")
def batch(store) -> Batch:
    return BatchReader(store, teacher_of(store), "cpu").read(
        "train", range(3), BatchFields((START, 4), (), True)
    )


def wrong_end(batch: Batch) -> Tensor:
    """Where a student might end."""
    noise = torch.randn(batch.states[START].shape, generator=torch.Generator().manual_seed(0))
    return (batch.states[START] + 0.3 * noise).requires_grad_()


def at_once(tail: Tail, end: Tensor, batch: Batch) -> Tensor:
    with torch.no_grad():
        teacher = tail(batch.states[START], batch.context)
    return full_divergence(teacher, tail(end, batch.context))


def top_at_once(tail: Tail, end: Tensor, batch: Batch) -> Tensor:
    assert batch.logits is not None
    return top_divergence(*batch.logits, tail(end, batch.context))


@pytest.mark.parametrize("positions", [1, 7, CONTEXT, 1000])
@pytest.mark.parametrize(
    ("term", "expected"), [(logit_divergence, at_once), (top_logit_divergence, top_at_once)]
)
def test_a_divergence_in_pieces_is_that_of_the_whole_batch(
    tail, batch, monkeypatch, positions, term, expected
):
    monkeypatch.setattr(logit_terms, "PIECE_BYTES", {"cpu": positions * 4 * tail.vocabulary})
    end = wrong_end(batch)
    ours, theirs = term(tail, end, batch, START), expected(tail, end, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(loss, end)[0] for loss in (3 * ours, 3 * theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(term(tail, end, batch, START), theirs, rtol=1e-4, atol=1e-6)


def test_without_its_last_states_the_teachers_tail_runs(tail, batch):
    end = wrong_end(batch)
    without = replace(batch, states={START: batch.states[START]})
    torch.testing.assert_close(
        logit_divergence(tail, end, without, START),
        logit_divergence(tail, end, batch, START),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_teachers_own_end_diverges_by_nothing(tail, batch):
    assert logit_divergence(tail, batch.states[START], batch, START).item() < 1e-5


class Counted(nn.Module):
    """A head that counts how often it is used without a gradient."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.calls = head, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += not torch.is_grad_enabled()
        return self.head(x)


def test_the_teachers_logits_are_computed_once_for_all_that_ask(store, batch):
    tail = Tail(teacher_of(store), START)
    tail.head = Counted(tail.head)  # pyright: ignore[reportAttributeAccessIssue]
    end = wrong_end(batch)
    alone = [logit_divergence(tail, end, batch, START) for _ in range(3)]
    assert tail.head.calls == 3
    asked = replace(batch, askers=3, kept={})
    together = [logit_divergence(tail, end, asked, START) for _ in range(3)]
    assert tail.head.calls == 4
    assert [loss.item() for loss in together] == [loss.item() for loss in alone]


def test_runs_of_one_command_share_a_tail(store):
    tails, teacher = FrozenTails(), teacher_of(store)
    given = (torch.float32, torch.device("cpu"))
    assert tails.get(teacher, 2, *given) is tails.get(teacher, 2, *given)
    assert tails.get(teacher, 3, *given) is not tails.get(teacher, 2, *given)


def test_variants_that_share_the_teachers_logits_equal_runs_on_their_own(store, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[train]\nobjective = 'regression'\nloss = 'logits'\n"
        "[train.variants.a]\nlearning_rate = 0.01\n[train.variants.b]\nlearning_rate = 0.001\n"
    )
    settings = short_run(store.path, tmp_path, block="0:2", objective="regression", loss="logits")
    settings = change(settings, tokens=4 * settings.batch_tokens)
    given = {
        key: getattr(settings, key) for key in ("store", "block", "tokens", "batch_tokens", "compute_dtype")
    }
    results = train(from_recipe(TrainSettings, recipe, "train", given))["runs"]
    for result, rate in zip(results, (0.01, 0.001), strict=True):
        alone = change(settings, learning_rate=rate, run=str(tmp_path / str(rate)))
        train(alone)
        torch.testing.assert_close(weights_of(result["run"]), weights_of(alone.run), rtol=0, atol=0)
