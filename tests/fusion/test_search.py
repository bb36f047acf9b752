"""Beam search over recognisers: exact on toys, UTF-8 always, and the recogniser's own search at weight 0."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, neox, randomise
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from lftpipe.base.errors import SettingsError
from lftpipe.fusion import ByteModel, FusionLogitsProcessor
from lftpipe.fusion.recogniser import CtcRecogniser, Seq2SeqRecogniser, check_posteriors
from lftpipe.fusion.search import Search, rescored

LABELS = ["", "a", "b", "å"]


def posteriors(frames: int, labels: int, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(frames, labels)) * 2
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def language():
    model = neox()
    randomise(model)
    return ByteModel(model.eval(), make_tokenizer())


@pytest.fixture(scope="module")
def whisper():
    config = WhisperConfig(
        vocab_size=320, num_mel_bins=8, encoder_layers=1, decoder_layers=2, d_model=16,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_source_positions=20, max_target_positions=40, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        decoder_start_token_id=0, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    randomise(model)
    return model


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(path) if label)


def brute_force(log_p: np.ndarray) -> dict[tuple[int, ...], float]:
    """The probability of every label sequence, summed over all alignments."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        weight = float(np.exp(sum(log_p[frame, label] for frame, label in enumerate(path))))
        found[collapsed(path)] = found.get(collapsed(path), 0.0) + weight
    return found


def test_ctc_prefixes_are_exact_and_sum_to_one():
    log_p = posteriors(5, 4)
    recogniser, every = CtcRecogniser(log_p, LABELS), brute_force(log_p)
    states = [((), recogniser.start())]
    for _ in range(3):
        states = [
            ((*labels, unit + 1), recogniser.extend(state, unit))
            for labels, state in states
            for unit in range(3)
        ]
        for labels, state in states:
            begins = sum(weight for text, weight in every.items() if text[: len(labels)] == labels)
            assert np.exp(state.log_psi) == pytest.approx(begins)
            if begins > 1e-12:
                row = recogniser.next([state])[0]
                assert np.exp(row).sum() == pytest.approx(1)
                assert np.exp(row[-1]) * begins == pytest.approx(every.get(labels, 0.0))


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_wide_beams_find_the_best_text(language, weight):
    log_p = posteriors(4, 4, seed=3)
    best = Search(weight=weight, beams=200, candidates=3).best(CtcRecogniser(log_p, LABELS), language)[0]
    texts = {"".join(LABELS[label] for label in text): p for text, p in brute_force(log_p).items()}
    scores = {
        text: (1 - weight) * np.log(p) + weight * language.prefix(text.encode()) for text, p in texts.items()
    }
    assert best.text == max(scores, key=scores.__getitem__)
    assert best.score == pytest.approx(max(scores.values()))


def test_weight_0_of_whisper_is_its_own_beam_search(whisper):
    states, tokenizer = torch.randn(20, 16, generator=torch.Generator().manual_seed(1)), make_tokenizer()
    recogniser = Seq2SeqRecogniser(whisper, tokenizer, states, [0])
    found = Search(weight=0.0, beams=3, longest=30).best(recogniser, None)[0]
    ids = whisper.generate(
        encoder_outputs=BaseModelOutput(states[None]), decoder_input_ids=torch.tensor([[0]]), num_beams=3,
        length_penalty=0.0, early_stopping="never", use_cache=True, max_new_tokens=30, do_sample=False,
    )  # fmt: skip
    assert found.text == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_model_fused_with_itself_is_itself(language):
    """As recogniser of single bytes, and as language model: at every weight the same best text."""

    class Itself:
        units = tuple(bytes([byte]) for byte in range(256))

        def start(self):
            return b""

        def next(self, states):
            return np.stack([language.next_bytes(state) for state in states])

        def extend(self, state, unit):
            return state + self.units[unit]

    found = [
        Search(weight=weight, beams=2, candidates=6, end="eos", longest=8).best(Itself(), language)[0].text
        for weight in (0.0, 0.5)
    ]
    assert found[0] == found[1]


def test_texts_are_utf8_whatever_the_recogniser_prefers(language):
    class Torn:
        units = (b"\xc3", b"\xa5", b"a")

        def start(self):
            return 0

        def next(self, states):
            rows = {0: [0.9, 0.05, 0.05, 1e-9], 1: [0.9, 0.04, 0.01, 0.05], 2: [0.1, 0.1, 0.1, 0.7]}
            return np.log([rows[min(state, 2)] for state in states])

        def extend(self, state, unit):
            return state + 1

    for heard in Search(weight=0.2, beams=4, candidates=3).best(Torn(), language):
        assert heard.text.encode().decode() == heard.text


def test_delayed_fusion_of_main_spellings_is_gfds_own_formula(language):
    """Log of p(t1..tn) + sum over i of p(t1..ti-1) times the strictly longer tokens, written out again."""
    model, vocabulary, text = language.model, language.vocabulary, b"the state"
    ids = vocabulary.canonical(text)
    with torch.inference_mode():
        p = model(torch.tensor([[*vocabulary.begin, *ids]])).logits.double().softmax(-1)[0].numpy()
    so_far, total = 1.0, 0.0
    for at, id_ in enumerate(ids):
        rest = vocabulary.text_of(ids[at:])
        longer = [
            i
            for i, t in zip(vocabulary.ids, vocabulary.tokens, strict=True)
            if t.startswith(rest) and t != rest
        ]
        total += so_far * p[at][longer].sum()
        so_far *= p[at][id_]
    main = ByteModel(model, vocabulary, spellings="main")
    assert main.prefix(text) == pytest.approx(np.log(total + so_far), abs=1e-5)
    log_p = posteriors(4, 4, seed=5)
    delayed = Search(weight=0.4, beams=300, candidates=3, timing="delayed").best(
        CtcRecogniser(log_p, LABELS), main
    )
    assert delayed[0].language == pytest.approx(main.prefix(delayed[0].text.encode()))


def test_rescoring_sorts_what_the_recogniser_found(language):
    log_p = posteriors(4, 4, seed=4)
    found = Search(weight=0.0, beams=6).best(CtcRecogniser(log_p, LABELS), None)
    again = rescored(found, language, 0.6)
    assert {heard.text for heard in again} == {heard.text for heard in found}
    assert [heard.score for heard in again] == sorted((heard.score for heard in again), reverse=True)


def test_the_processor_adds_what_the_language_model_gives(language):
    tokenizer = make_tokenizer()
    processor = FusionLogitsProcessor(
        language.model, tokenizer, tokenizer, weight=0.25, candidates=320, tolerance=0.0
    )
    ids = torch.tensor([tokenizer("the state")["input_ids"]])
    scores = torch.randn(1, 320, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    fused = processor(ids, scores)
    token = tokenizer(" of")["input_ids"][0]
    more = processor.spoken.text_of([token])
    gain = language.prefix(b"the state" + more) - language.prefix(b"the state")
    assert float(fused[0, token]) == pytest.approx(0.75 * float(scores[0, token]) + 0.25 * gain, abs=1e-4)
    none = FusionLogitsProcessor(language.model, tokenizer, tokenizer, weight=0.0)
    assert torch.equal(none(ids, scores), scores)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p, labels: (p * 0, labels), "sum to 4"),
        (lambda p, labels: (np.full_like(p, np.nan), labels), "NaN"),
        (lambda p, labels: (p[:, :3], labels), "posteriors for 4 labels"),
        (lambda p, labels: (p, ["", "a", "a", "b"]), "'a' twice"),
        (lambda p, labels: (p, ["x", "a", "c", "b"]), "0 blanks"),
    ],
)
def test_posteriors_that_no_recogniser_has_said_are_refused(change, match):
    with pytest.raises(SettingsError, match=match):
        check_posteriors(*change(posteriors(3, 4), LABELS))


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_a_weight_out_of_range_is_refused(language, weight):
    with pytest.raises(SettingsError, match="weight"):
        Search(weight=weight)
    with pytest.raises(SettingsError, match="weight"):
        FusionLogitsProcessor(language.model, make_tokenizer(), make_tokenizer(), weight=weight)


def test_a_step_asks_the_language_model_once_or_twice(language, monkeypatch):
    """Whatever many hypotheses wait for is one batch."""
    sleepy = ByteModel(language.model, make_tokenizer(), tolerance=1e-2)
    recogniser, steps = CtcRecogniser(posteriors(12, 4, seed=6), LABELS), []
    real = recogniser.next
    monkeypatch.setattr(recogniser, "next", lambda states: steps.append(1) or real(states))
    before = sleepy.calls
    Search(weight=0.4, beams=5).best(recogniser, sleepy)
    assert len(steps) > 3
    assert sleepy.calls - before <= 2 * len(steps)


def test_a_label_too_unlikely_for_a_product_of_probabilities_keeps_its_probability():
    """Far below the smallest number of float64."""
    log_p = posteriors(5, 4)
    log_p[:, 3] = -900.0
    log_p[:, 2] = -np.inf
    log_p -= np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    recogniser = CtcRecogniser(log_p, LABELS)
    row = recogniser.next([recogniser.start()])[0]
    assert row[2] == pytest.approx(np.logaddexp.reduce(np.cumsum([0, *log_p[:-1, 0]]) + log_p[:, 3]))
    assert row[1] == -np.inf
