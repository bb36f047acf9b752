"""Terms on next-token distributions: the same number and gradient in pieces as at once, at a lower price."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import CONTEXT, extracted
from decoders import config_of
from torch import Tensor, nn
from training_runs import change, log_of, short_run, teacher_of, weights_of
from transformers import AutoModelForCausalLM

from lftpipe.base.errors import TeacherError
from lftpipe.commands.train import train
from lftpipe.config.recipe import from_recipe
from lftpipe.config.settings import TrainSettings
from lftpipe.data.batches import Batch, BatchFields, BatchReader
from lftpipe.families.structure import Logits
from lftpipe.flow.distillation import Drawn, draw, full_divergence, sampled_divergence, top_divergence
from lftpipe.store import Store
from lftpipe.teacher.tail import Tail
from lftpipe.training import terms
from lftpipe.training.terms import (
    FrozenTails,
    check_head,
    logit_divergence,
    sampled_logit_divergence,
    top_logit_divergence,
)

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


def measured(term: Callable[..., Tensor], tail: Tail, end: Tensor, batch: Batch) -> Tensor:
    return term(tail, tail.head_input(end, batch.context), batch)


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
    monkeypatch.setattr(terms, "PIECE_BYTES", {"cpu": positions * 4 * tail.vocabulary})
    end = wrong_end(batch)
    ours, theirs = measured(term, tail, end, batch), expected(tail, end, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    gradients = [torch.autograd.grad(loss, end)[0] for loss in (3 * ours, 3 * theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(measured(term, tail, end, batch), theirs, rtol=1e-4, atol=1e-6)


def test_without_its_last_states_the_teachers_tail_runs(tail, batch):
    end = wrong_end(batch)
    without = replace(batch, states={START: batch.states[START]})
    torch.testing.assert_close(
        measured(logit_divergence, tail, end, without),
        measured(logit_divergence, tail, end, batch),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_teachers_own_end_diverges_by_nothing(tail, batch):
    assert measured(logit_divergence, tail, batch.states[START], batch).item() < 1e-5


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
    alone = [measured(logit_divergence, tail, end, batch) for _ in range(3)]
    assert tail.head.calls == 3
    asked = replace(batch, num_consumers=3, kept={})
    together = [measured(logit_divergence, tail, end, asked) for _ in range(3)]
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


def test_with_every_token_drawn_equally_often_the_sampled_divergence_is_the_exact_one(tail, batch):
    """What is drawn stands for itself when its weight is 1."""
    assert batch.logits is not None
    assert tail.linear_head is not None
    values, ids, normaliser = (each.flatten(0, 1) for each in batch.logits)
    states = torch.randn(len(ids), tail.linear_head.in_features, generator=torch.Generator().manual_seed(1))
    everything = torch.arange(tail.vocabulary)
    drawn = Drawn(everything, torch.zeros(tail.vocabulary), everything)
    sampled = sampled_divergence(values, ids, normaliser, states, tail.linear_head.weight, None, drawn)
    exact = top_divergence(values, ids, normaliser, tail.head(states))
    torch.testing.assert_close(sampled, exact, rtol=1e-5, atol=1e-6)


def test_the_sampled_sum_over_the_vocabulary_has_no_bias_and_little_noise(tail, batch):
    """Over many draws its mean is the whole sum; what a token stands for is one over how often it comes."""
    assert batch.logits is not None
    ids = batch.logits.ids.flatten(0, 1)
    exponentials = torch.rand(tail.vocabulary, generator=torch.Generator().manual_seed(2)) + 0.5
    sums = []
    for seed in range(400):
        drawn = draw(ids, tail.vocabulary, seed, draws=64)
        sums.append((exponentials[drawn.ids] * drawn.log_weight.exp()).sum())
    estimates = torch.stack(sums)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - exponentials.sum()) < 4 * error
    assert error < 0.05 * exponentials.sum()


def test_the_sampled_divergence_and_its_gradient_are_near_the_exact_ones(tail, batch):
    end = wrong_end(batch)
    exact = measured(top_logit_divergence, tail, end, batch)
    sampled = measured(sampled_logit_divergence, tail, end, batch)
    torch.testing.assert_close(sampled, exact, rtol=0.1, atol=0)
    ours, theirs = (torch.autograd.grad(loss, end)[0].flatten() for loss in (sampled, exact))
    # A random teacher's distributions are nearly flat: what is estimated is nearly all of the mass.
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.9


def test_a_drawn_token_that_the_teacher_keeps_counts_once(tail):
    """A position's own tokens are summed as they are; the draw of one of them must not add to it."""
    vocabulary = tail.vocabulary
    ids = torch.arange(8)[None]
    drawn = draw(ids, vocabulary, seed=0)
    weight = torch.zeros(vocabulary, 4)
    weight[:8] = 1.0
    states = torch.full((1, 4), 4.0)  # e^16 for the kept ones, e^0 for the rest
    values, normaliser = torch.zeros(1, 8), torch.full((1,), 2.0794415)
    loss = sampled_divergence(values, ids, normaliser, states, weight, None, drawn)
    exact = top_divergence(values, ids, normaliser, states @ weight.T)
    torch.testing.assert_close(loss, exact, rtol=0, atol=1e-4)


def test_training_on_a_sample_of_the_logits_lowers_the_loss(store, tmp_path):
    settings = short_run(store.path, tmp_path, objective="regression", loss="sampled-logits")
    settings = change(settings, tokens=5 * settings.tokens)
    train(settings)
    losses = [line["loss"] for line in log_of(settings.run)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize(("cap", "linear"), [(None, True), (2.0, False)])
def test_only_a_head_without_a_soft_cap_is_a_linear_map(store, tail, cap, linear):
    config = config_of("gemma2")
    config.final_logit_softcapping = cap
    model = AutoModelForCausalLM.from_config(config)
    other = copy.copy(tail)
    other._modules = {**tail._modules, "head": Logits(model, "model")}
    other.__dict__.pop("linear_head", None)
    assert (other.linear_head is not None) is linear
    if not linear:
        with pytest.raises(TeacherError, match="more than a linear map"):
            check_head(other, teacher_of(store))


def test_near_the_teacher_the_sampled_divergence_errs_upwards():
    """It is convex in the sum that is estimated: no sign of its own, but that of the masses left."""
    vocabulary, ids = 64, torch.arange(4)[None]
    weight = torch.randn(vocabulary, 1, generator=torch.Generator().manual_seed(0))
    weight[:4] = weight[4:].logsumexp(0) - math.log(
        4
    )  # the student has half of its mass on these, as the teacher
    values, normaliser, states = torch.zeros(1, 4), torch.tensor([math.log(8)]), torch.ones(1, 1)
    exact = top_divergence(values, ids, normaliser, states @ weight.T)
    sampled = torch.stack(
        [
            sampled_divergence(
                values, ids, normaliser, states, weight, None, draw(ids, vocabulary, seed, draws=64)
            )
            for seed in range(400)
        ]
    )
    assert sampled.mean() - exact > 4 * sampled.std() / len(sampled) ** 0.5
