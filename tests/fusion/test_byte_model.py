"""Laws of the byte model (docs/fusion.md)."""

import math

import numpy as np
import pytest
import torch
from conftest import llama, make_tokenizer, neox, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lftpipe.base.errors import SettingsError
from lftpipe.fusion import ByteModel
from lftpipe.fusion.vocabulary import Vocabulary, is_whole, utf8_next

TEXTS = (b"the", b"def st", "å ø".encode(), "中".encode()[:2], b"the state\n    of", b"")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=[neox, llama], ids=["neox", "llama"])
def model(request):
    built = request.param()
    randomise(built)
    return built.eval()


def byte_tokenizer():
    """Every byte is a token of its own; there are no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {"<|endoftext|>": 0} | {char: number for number, char in enumerate(alphabet, start=1)}
    bpe = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@pytest.mark.parametrize("text", TEXTS)
def test_next_bytes_and_the_end_sum_to_one(model, tokenizer, text):
    log_p = ByteModel(model, tokenizer).next_bytes(text)
    assert log_p.shape == (257,)
    assert abs(np.exp(log_p).sum() - 1) < 1e-9


def test_all_spellings_obey_the_chain_rule(model, tokenizer):
    exact, text = ByteModel(model, tokenizer, spellings="all"), b"the s"
    log_p = exact.next_bytes(text)
    for byte in b"tao \n":
        assert exact.prefix(text) + log_p[byte] == pytest.approx(exact.prefix(text + bytes([byte])), abs=1e-9)
    assert exact.prefix(text) + log_p[256] == pytest.approx(exact.log_prob(text), abs=1e-9)
    assert exact.prefix(b"") == 0


def brute_force(model, tokenizer, text):
    """The sum over every token sequence that spells a text, written out by itself."""
    vocabulary = Vocabulary(tokenizer)

    def spelled(rest):
        if not rest:
            yield ()
        for token, id_ in zip(vocabulary.tokens, vocabulary.ids.tolist(), strict=True):
            if rest.startswith(token):
                for more in spelled(rest[len(token) :]):
                    yield (id_, *more)

    total = 0.0
    for ids in spelled(text):
        whole = torch.tensor([[*vocabulary.begin, *ids, *vocabulary.end]])
        with torch.inference_mode():
            log_p = model(whole).logits.double().log_softmax(-1)[0]
        total += math.exp(sum(float(log_p[at, whole[0, at + 1]]) for at in range(whole.shape[1] - 1)))
    return math.log(total)


def test_all_spellings_are_the_sum_over_every_token_sequence(model, tokenizer):
    assert ByteModel(model, tokenizer, spellings="all").log_prob(b"the o") == pytest.approx(
        brute_force(model, tokenizer, b"the o"), abs=1e-5
    )


@pytest.mark.parametrize("text", [text for text in TEXTS if 0 < len(text) < 8])
def test_canonical_spellings_are_a_lower_bound_and_longer_texts_less_probable(model, tokenizer, text):
    canonical, exact = ByteModel(model, tokenizer), ByteModel(model, tokenizer, spellings="all")
    assert canonical.prefix(text) <= exact.prefix(text) + 1e-6
    assert canonical.prefix(text + b"e") <= canonical.prefix(text)
    assert canonical.leak(text) > -1e-9


def test_with_single_bytes_the_byte_model_is_the_model(model):
    tokenizer = byte_tokenizer()
    ids = tokenizer("the état")["input_ids"]
    with torch.inference_mode():
        log_p = model(torch.tensor([[0, *ids]])).logits.double()[0, :, :257].log_softmax(-1)
    steps = sum(float(log_p[at, id_]) for at, id_ in enumerate(ids))
    byte_model = ByteModel(model, tokenizer)
    chained = sum(
        float(byte_model.next_bytes("the état".encode()[:at])[byte])
        for at, byte in enumerate("the état".encode())
    )
    assert chained == pytest.approx(steps, abs=1e-4)


def test_where_the_prompt_is_cut_changes_nothing(model, tokenizer):
    early, late = ByteModel(model, tokenizer, prompt="the"), ByteModel(model, tokenizer, prompt="the sta")
    assert late.prefix(b"te of") == pytest.approx(
        early.prefix(b" state of") - early.prefix(b" sta"), abs=1e-6
    )


def test_a_warm_cache_and_a_batch_change_nothing(model, tokenizer):
    warm = ByteModel(model, tokenizer)
    for stop in range(1, 12):
        warm.prefix(b"the state of"[:stop])
    texts = [b"the state of", b"def self", b"return"]
    together = ByteModel(model, tokenizer).prefixes(texts)
    alone = [ByteModel(model, tokenizer).prefix(text) for text in texts]
    assert together == pytest.approx(alone, abs=1e-4)
    assert warm.prefix(texts[0]) == pytest.approx(alone[0], abs=1e-4)


def test_the_certificate_holds_and_sleeping_trunks_save_evaluations(model, tokenizer):
    exact, sleepy = ByteModel(model, tokenizer), ByteModel(model, tokenizer, tolerance=0.05)
    for stop in range(1, 25):
        text = b"the state of a layer flows"[:stop]
        bounds = sleepy.bounds(text)
        assert bounds.lower - 1e-5 <= exact.prefix(text) <= bounds.upper + 1e-5
    assert sleepy.evaluations < exact.evaluations


def test_control_tokens_and_the_order_of_ids_change_nothing(tokenizer):
    model = neox(vocab_size=330)
    randomise(model)
    grown = make_tokenizer()
    grown.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    plain, other = ByteModel(model, tokenizer), ByteModel(model, grown)
    assert other.prefix(b"the state") == pytest.approx(plain.prefix(b"the state"), abs=1e-9)
    assert other.vocabulary.canonical(b"<a>") == plain.vocabulary.canonical(b"<a>")


@settings(max_examples=40)
@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_a_text_is_the_bytes_of_its_canonical_spelling(text):
    vocabulary = SHARED
    data = text.encode("utf-8", "surrogatepass")  # also what is no UTF-8
    for stop in range(len(data) + 1):
        assert vocabulary.text_of(vocabulary.canonical(data[:stop])) == data[:stop]


SHARED = Vocabulary(make_tokenizer())


@given(st.text(min_size=1, max_size=6))
def test_utf8_is_never_cut(text):
    data = text.encode("utf-8", "ignore")
    assert is_whole(data)
    for at, byte in enumerate(data):
        assert utf8_next(data[:at])(byte)
        assert not utf8_next(data[:at])(0xFF)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda bpe: setattr(bpe, "normalizer", normalizers.Lowercase()), "does not give back"),
        (lambda bpe: setattr(bpe, "normalizer", normalizers.NFKC()), "does not give back"),
        (lambda bpe: setattr(bpe.model, "dropout", 0.1), "drops merges at random"),
    ],
)
def test_a_tokenizer_that_loses_bytes_is_refused(change, match):
    lossy = make_tokenizer()
    change(lossy.backend_tokenizer)
    with pytest.raises(SettingsError, match=match):
        Vocabulary(lossy)


def test_a_text_longer_than_the_models_positions_is_refused(model, tokenizer):
    with pytest.raises(SettingsError, match="at most 128"):
        ByteModel(model, tokenizer, prompt="x q " * 200)
