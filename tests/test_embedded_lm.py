"""The embedded language model: it loads, is small, knows English, and has not seen the held-out code bases."""

import importlib.util
import json
import math
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.assets import embedded_lm
from fedlora.data.packages import HELD_OUT

ENGLISH = (
    "Return the mean of the values along the given axis. If the input is empty, an error is raised. The result has the "
    "same type as the input unless another type is given, in which case the values are converted before the sum is "
    "taken. Missing values are ignored by default. See the documentation of the other functions for more details."
)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads((embedded_lm() / "pretraining.json").read_text())


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(embedded_lm(), dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(embedded_lm())


def test_folder_is_small_and_in_float16() -> None:
    files = [file for file in embedded_lm().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12 * 2**20
    weights = load_file(embedded_lm() / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert 2e6 <= sum(tensor.numel() for tensor in weights.values()) <= 6e6
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_loading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(embedded_lm())
        AutoTokenizer.from_pretrained(embedded_lm())
    said = "".join(capfd.readouterr())
    assert not any(word in said.lower() for word in ("warn", "deprecat", "not initialized", "unexpected", "missing"))


def test_tokenizer_keeps_every_byte(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    text = "def f(x):\n\t    return x ** 2  # naïve, 数 \x00\r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert max(ids) < len(tokenizer) == loaded[0].config.vocab_size


def test_it_knows_english(loaded: tuple[Any, Any]) -> None:
    """Under half the bits of a unigram model that knows this very paragraph's letters, and of a uniform token model."""
    bits_per_byte = _bits(loaded, ENGLISH) / len(ENGLISH.encode())
    letters = Counter(ENGLISH)
    unigram = -sum(n * math.log2(n / len(ENGLISH)) for n in letters.values()) / len(ENGLISH)
    uniform = len(loaded[1](ENGLISH)["input_ids"][1:]) * math.log2(len(loaded[1])) / len(ENGLISH)
    assert bits_per_byte < unigram / 2
    assert bits_per_byte < uniform / 2


def test_word_order_matters_to_it(loaded: tuple[Any, Any]) -> None:
    backwards = " ".join(reversed(ENGLISH.split()))
    assert _bits(loaded, backwards) > 1.4 * _bits(loaded, ENGLISH)


def _bits(loaded: tuple[Any, Any], text: str) -> float:
    model, tokenizer = loaded
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double().log_softmax(-1)
    return -float(logits.gather(1, ids[0, 1:, None]).sum()) / math.log(2)


def test_held_out_code_bases_are_not_in_the_pretraining_text(facts: dict[str, Any]) -> None:
    trained_on = set(facts["packages"])
    assert {"torch", "argparse"} <= trained_on
    assert trained_on.isdisjoint(HELD_OUT)
    assert "multiprocess" not in trained_on  # a copy of multiprocessing
    assert set(facts["bits_per_byte"]["code"]) == set(facts["held_out"]) >= set(HELD_OUT[:20])


def test_card_states_what_was_measured(facts: dict[str, Any]) -> None:
    scores = facts["bits_per_byte"]
    assert scores["docstrings"] < scores["docstrings_5gram"]
    code = list(scores["code"].values())
    assert scores["docstrings"] < sum(code) / len(code) < 2.6  # it has code still to learn
    card = (embedded_lm() / "README.md").read_text()
    stated = [scores["docstrings"], scores["docstrings_5gram"], sum(code) / len(code), *code]
    assert all(f"{value:.3f}" in card for value in stated)
    assert facts["command"].strip() in card
    assert all(f"| {name} | {licence} |" in card for name, licence in facts["packages"].items() if name == "numpy")


@pytest.fixture(scope="module")
def ngram() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "pretrain" / "ngram.py"
    spec = importlib.util.spec_from_file_location("pretrain_ngram", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_baseline_is_a_distribution_and_reads_its_context(ngram: ModuleType) -> None:
    rng, vocabulary = np.random.default_rng(0), 7
    tokens = [0, 1]
    for _ in range(4000):  # a noisy second-order rule
        tokens.append((tokens[-1] * 2 + tokens[-2]) % vocabulary if rng.random() < 0.9 else int(rng.integers(6)))
    model = ngram.fit(np.array(tokens), order=3)
    for context in [tokens[100:102], tokens[500:502], [6, 6]]:
        each = [2.0 ** -ngram.bits(model, np.array([*context, word]), vocabulary)[0] for word in range(vocabulary)]
        assert sum(each) == pytest.approx(1.0, abs=1e-9)
        assert min(each) > 0
    context = tokens[100:102]
    most_likely = -math.log2(0.9 + 0.1 / 6)
    rule = (context[1] * 2 + context[0]) % vocabulary
    assert ngram.bits(model, np.array([*context, rule]), vocabulary)[0] == pytest.approx(most_likely, abs=0.15)
