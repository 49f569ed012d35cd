"""Tasks: from a user's table to tokens, batches and scores."""

from __future__ import annotations

import math

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch.nn import functional

from fedlora.errors import UserError
from fedlora.federation.orders import Features, Fit, Model, Score
from fedlora.learning import examples, tasks
from fedlora.learning.images import Pixels
from fedlora.learning.language import exact_match, rendered, rouge_l
from fedlora.learning.learner import Learner
from fedlora.learning.loading import load_backbone
from fedlora.learning.tasks import CausalLM, ImageClassification, TextClassification
from learning.worlds import adapter, run, seeded

TEXTS = [
    "Ein Straßencafé in 東京: naïve façade.\n\tdef f(x): return x ** 2",
    "",
    "short",
    "the quick brown fox jumps over the lazy dog " * 9,
]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE with a few merges, as GPT-2's."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=10_000
    )


def unit(store, i: int) -> list[int]:
    return store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist()


# -- text classification


def test_texts_and_labels(tokenizer):
    table = datasets.Dataset.from_dict({"body": TEXTS, "kind": ["b", "a", "b", "b"]})
    task = TextClassification(("a", "b"), text="body", label="kind", max_length=12)
    store = task.encode(table, tokenizer)
    for i, text in enumerate(TEXTS):
        assert unit(store, i) == (tokenizer(text)["input_ids"][:12] or [tokenizer.pad_token_id])
    assert store.labels.tolist() == [1, 0, 1, 1]
    inputs, labels = task.collate(store, np.array([2, 3]))
    assert inputs["input_ids"].shape == (2, 12)
    assert inputs["attention_mask"].sum(1).tolist() == [len(unit(store, 2)), 12]
    assert (inputs["input_ids"][0, len(unit(store, 2)) :] == tokenizer.pad_token_id).all()
    assert labels.tolist() == [1, 1]


@pytest.mark.parametrize("columns", ["p", ("p", "q")])
def test_a_text_without_tokens_is_one_of_padding(tokenizer, columns):
    """And has a result like any other."""
    table = datasets.Dataset.from_dict({"p": ["", "short", "", ""], "q": ["", "one", "", ""], "label": ["x"] * 4})
    task = TextClassification(("x",), text=columns)
    store = task.encode(table, tokenizer)
    assert [unit(store, i) for i in (0, 2, 3)] == [[tokenizer.pad_token_id]] * 3
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )
    module = seeded(lambda: transformers.LlamaModel(config))
    base = load_backbone(module, "text-classification", labels=("x",), processor=tokenizer)
    rows = {"empty": {"test": np.array([0, 2])}, "both": {"test": np.arange(3)}}
    executor = Learner({"base": base}, task, store, rows, base.spec(2), 0)
    scores = run(executor, {client: Score(Model({}), "test") for client in rows})
    assert [scores[client]["accuracy"] for client in rows] == [(2.0, 2.0), (3.0, 3.0)]


def test_a_thousand_and_one_rows_are_tokenised_in_slices(tokenizer):
    table = datasets.Dataset.from_dict({"text": [f"number {i}" for i in range(1001)], "label": ["x"] * 1001})
    store = TextClassification(("x",)).encode(table, tokenizer)
    assert unit(store, 1000) == tokenizer("number 1000")["input_ids"]
    assert len(store) == 1001


def test_texts_of_many_rows_are_tokenised_when_their_units_are_asked_for(tokenizer, monkeypatch):
    table = datasets.Dataset.from_dict({"text": TEXTS * 3, "label": ["x"] * (3 * len(TEXTS))})
    task = TextClassification(("x",), max_length=12)
    known = task.encode(table, tokenizer)
    monkeypatch.setattr(tasks, "MANY", len(table))
    monkeypatch.setattr(examples, "SLICE", 2)  # several slices
    store = task.encode(table, tokenizer)
    assert (len(store), store.known.sum(), store.count(np.array([4, 1]))) == (len(table), 0, 2)
    for rows in ([7, 0, 7, 3], [3, 2, 1, 0, 5]):
        units = store.units(np.array(rows))
        assert units.tolist() == rows
        for mine, its in zip(task.collate(store, units)[0].values(), task.collate(known, units)[0].values()):
            assert mine.tolist() == its.tolist()
    assert np.flatnonzero(store.known).tolist() == [0, 1, 2, 3, 5, 7]
    assert store.used[0] == known.lengths[[0, 1, 2, 3, 5, 7]].sum()  # each was read once
    store.units(np.arange(len(table)))
    assert store.lengths.max() == 12  # whoever was read, and if all texts were shorter


def test_pairs_keep_their_segments():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3, "[PAD]": 4}, "a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    fast.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    table = datasets.Dataset.from_dict({"p": ["a a", "b"], "q": ["b", "a b b"], "label": ["x", "x"]})
    task = TextClassification(("x",), text=("p", "q"))
    inputs, _ = task.collate(task.encode(table, fast), np.array([0, 1]))
    assert inputs["input_ids"].tolist() == [[0, 2, 2, 1, 3, 1, 4], [0, 3, 1, 2, 3, 3, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]


def test_class_label_columns_speak_names_and_unknown_labels_are_errors(tokenizer):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["u", "v"], "label": [1, 0]}, features=features)
    assert TextClassification(("yes", "no")).encode(table, tokenizer).labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="row 1, column 'label': label 'no'"):
        TextClassification(("yes",)).encode(table, tokenizer)
    with pytest.raises(UserError, match=r"column 'txt' does not exist\n.*text, label"):
        TextClassification(("yes",), text="txt").encode(table, tokenizer)


# -- language


def test_every_token_of_a_long_text_is_predicted_once_and_bytes_add_up(tokenizer):
    task = CausalLM(text="text", max_length=16)
    store = task.encode(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer)
    for row, text in enumerate(TEXTS):
        windows = store.units(np.array([row]))
        predicted: list[int] = []
        for i in windows:
            ids = unit(store, i)
            assert ids[0] == tokenizer.bos_token_id
            assert len(ids) <= 16
            _, labels = task.collate(store, np.array([i]))
            predicted += labels[0][labels[0] != -100].tolist()
        assert predicted == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert store.bytes[windows].sum() == len(text.encode())
    assert len(store.units(np.array([1]))) == 0
    assert len(store.units(np.array([3]))) > 3
    assert store.units(np.array([3, 0])).tolist() == [*store.units(np.array([3])), *store.units(np.array([0]))]


def test_only_the_answer_is_predicted(tokenizer):
    task = CausalLM(max_length=64)
    table = datasets.Dataset.from_dict({"prompt": ["What is é?"], "response": ["A letter: é."]})
    store = task.encode(table, tokenizer)
    answer = tokenizer("A letter: é.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    head = [tokenizer.bos_token_id, *tokenizer("What is é?\n", add_special_tokens=False)["input_ids"]]
    assert unit(store, 0) == head + answer
    _, labels = task.collate(store, np.array([0]))
    assert labels[0].tolist() == [-100] * (len(head) - 1) + answer + [-100]
    assert store.bytes.tolist() == [len("A letter: é.".encode())]
    whole = CausalLM(max_length=64, whole=True)
    _, labels = whole.collate(whole.encode(table, tokenizer), np.array([0]))
    assert labels[0].tolist() == [*(head + answer)[1:], -100]


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(tokenizer):
    task = CausalLM(max_length=20)
    table = datasets.Dataset.from_dict({"prompt": [TEXTS[3], "p"], "response": ["an answer", "0123456789" * 9]})
    store = task.encode(table, tokenizer)
    ends = [tokenizer(f"{p}\n", add_special_tokens=False)["input_ids"] for p in (TEXTS[3], "p")]
    answers = [tokenizer(r, add_special_tokens=False)["input_ids"] for r in ("an answer", "0123456789" * 9)]
    kept = 19 - len(answers[0]) - 1
    assert unit(store, 0) == [tokenizer.bos_token_id, *ends[0][-kept:], *answers[0], tokenizer.eos_token_id]
    assert unit(store, 1) == [tokenizer.bos_token_id, *ends[1], *answers[1][: 19 - len(ends[1])]]
    assert store.bytes.tolist() == [9, len(tokenizer.decode(answers[1][: 19 - len(ends[1])]))]


def test_bytes_are_those_of_the_tokens_that_are_predicted(tokenizer):
    prompts = [TEXTS[3] * 3, "p", "un mot " * 20]
    table = datasets.Dataset.from_dict({"prompt": prompts, "response": ["an answer"] * 3})
    store = CausalLM(max_length=20, whole=True).encode(table, tokenizer)
    for i in range(3):
        ids = unit(store, i)
        assert ids[0] == tokenizer.bos_token_id
        text = tokenizer.decode([t for t in ids[1:] if t != tokenizer.eos_token_id])
        assert f"{prompts[i]}\nan answer".endswith(text)
        assert store.bytes[i] == len(text.encode())
    short = CausalLM(max_length=512, whole=True).encode(table, tokenizer)
    assert short.bytes.tolist() == [len(f"{prompt}\nan answer".encode()) for prompt in prompts]


def test_the_chat_template_is_used_where_there_is_one(tokenizer):
    plain = rendered(tokenizer, "ask", "tell")
    assert plain == ("ask\n", "tell", "</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    try:
        assert rendered(tokenizer, "ask", "tell") == ("<user>ask<end><assistant>", "tell", "<end>")
        store = CausalLM().encode(datasets.Dataset.from_dict({"prompt": ["ask"], "response": ["tell"]}), tokenizer)
        assert tokenizer.decode(unit(store, 0)) == "<user>ask<end><assistant>tell<end>"
        assert tokenizer.decode(unit(store, 0)[: store.first[0]]) == "<user>ask<end><assistant>"
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize("length", range(2, 8))
def test_answers_may_take_the_whole_length(tokenizer, length: int):
    """With a template no token is put in front: nothing of the prompt may be left."""
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    table = datasets.Dataset.from_dict({"prompt": ["p"], "response": ["0123456789"]})
    store = CausalLM(max_length=length, whole=True).encode(table, tokenizer)
    assert len(unit(store, 0)) == length
    assert store.first.tolist() == [1]
    assert 0 < store.bytes[0] <= len("p 0123456789")


def tiny_lm(tokenizer):
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    module = seeded(lambda: transformers.LlamaForCausalLM(config))
    return load_backbone(module, "causal-lm", dtype=torch.float64, processor=tokenizer)


def test_bits_per_byte_are_those_of_the_bare_model(tokenizer):
    base = tiny_lm(tokenizer)
    task = CausalLM(text="text", max_length=16)
    store = task.encode(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer)
    spec = base.spec(2, dtype=torch.float64)
    splits = {"a": {"fit": np.array([2]), "test": np.array([0, 1, 3])}, "b": {"test": np.array([2])}}
    found = run(Learner({"base": base}, task, store, splits, spec, 0, 2), {c: Score(Model({}), "test") for c in splits})
    module = base.plain()
    for client, rows in (("a", [0, 1, 3]), ("b", [2])):
        nats, tokens = 0.0, 0
        for i in store.units(np.array(rows)):
            ids = torch.tensor([unit(store, i)])
            with torch.no_grad():
                logits = module(input_ids=ids).logits[0, :-1]
            nats += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
        size = sum(len(TEXTS[row].encode()) for row in rows)
        assert found[client]["loss"] == (pytest.approx(nats), tokens)
        assert found[client]["bits_per_byte"] == (pytest.approx(nats / math.log(2)), size)
    assert task.metric == ("bits_per_byte", False)


@pytest.mark.parametrize("lanes", [1, 2])
def test_answers_are_generated_with_each_client_s_adapter(tokenizer, lanes):
    base = tiny_lm(tokenizer)
    task = CausalLM(generate=5)
    table = datasets.Dataset.from_dict(
        {"prompt": ["one", "two words here", "three"], "response": ["a b", "c", "d e f"]}
    )
    store = task.encode(table, tokenizer)
    spec = base.spec(2, alpha=8.0, dtype=torch.float64)
    rows = {"test": np.arange(3)}
    executor = Learner({"base": base}, task, store, {"a": rows, "b": rows}, spec, 0, lanes)
    models = {c: Model(adapter(spec, 2, seed=k)) for k, c in enumerate(("a", "b"))}
    found = run(executor, {c: Score(model, "test") for c, model in models.items()})
    for client, model in models.items():
        module = base.plain()
        for site in base.sites:
            tree = model.params
            module.get_submodule(site).weight.data += tree[f"{site}/scale"] * tree[f"{site}/B"] @ tree[f"{site}/A"]
        total = 0.0
        for i, reference in enumerate(table["response"]):
            ids = unit(store, i)[: store.first[i]]
            begin = len(ids)
            for _ in range(5):  # greedily, one at a time, without a cache
                with torch.no_grad():
                    ids.append(int(module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            total += rouge_l(tokenizer.decode(ids[begin:], skip_special_tokens=True), reference)
        assert found[client]["rougeL"] == (pytest.approx(total), 3.0)
        assert found[client]["exact_match"][1] == 3.0
        assert "bits_per_byte" in found[client]
    assert task.metric == ("rougeL", True)


def test_text_scores():
    assert exact_match(" The  Answer\n", "the answer") == 1.0
    assert exact_match("the answer is", "the answer") == 0.0
    assert rouge_l("a b c d", "a x c y z w") == pytest.approx(2 * (2 / 4) * (2 / 6) / (2 / 4 + 2 / 6))
    assert rouge_l("", "word") == 0.0
    assert rouge_l("d c b a", "a b c d") == pytest.approx(2 * 1 / 8)


# -- images


def pictures(count: int, size: tuple[int, int] = (8, 8), channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, channels)).astype(np.uint8)


def image_table(pixels, labels):
    return datasets.Dataset.from_dict({"image": [p.tolist() for p in pixels], "label": labels})


def test_images_are_normalised_in_the_batch():
    pixels = pictures(3)
    task = ImageClassification(("cat", "dog"))
    wanted = Pixels((8, 8), 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    store = task.encode(image_table(pixels, ["dog", "cat", "dog"]), wanted)
    assert store.pixels.dtype == np.uint8
    inputs, labels = task.collate(store, np.array([2, 0]))
    expected = (pixels[[2, 0]].transpose(0, 3, 1, 2) / 255 - np.array([0.5, 0.4, 0.3])[:, None, None]) / np.array(
        [0.2, 0.3, 0.4]
    )[:, None, None]
    torch.testing.assert_close(inputs["pixel_values"], torch.from_numpy(expected).float())
    assert labels.tolist() == [1, 1]


def test_images_of_other_sizes_are_resized_like_the_library_does():
    from PIL import Image

    big = pictures(1, (17, 13))[0]
    small = Pixels((8, 8), 1.0, (0.0,), (1.0,))(torch.from_numpy(big)[None])
    reference = np.asarray(Image.fromarray(big).resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(small[0].numpy() - reference).max() < 2  # PIL rounds on the way
    task = ImageClassification(("x",))
    store = task.encode(image_table([big, pictures(1)[0]], ["x", "x"]), Pixels((8, 8)))
    assert store.pixels.shape == (2, 8, 8, 3)
    with pytest.raises(UserError, match="different sizes"):
        task.encode(image_table([big, pictures(1)[0]], ["x", "x"]), None)


def test_a_vision_model_trains_in_lanes():
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    module = seeded(lambda: transformers.ViTModel(config, add_pooling_layer=False))
    base = load_backbone(module, "image-classification", labels=("a", "b"), dtype=torch.float64)
    task = ImageClassification(("a", "b"), pixels=Pixels((8, 8), 1 / 255, (0.5,), (0.5,)))
    draws = np.random.default_rng(1).integers(0, 2, 30)
    store = task.encode(image_table(pictures(30), ["ab"[k] for k in draws]), None)
    splits = {
        c: {"fit": np.arange(10 * k, 10 * k + 8), "test": np.arange(10 * k + 8, 10 * k + 10)}
        for k, c in enumerate("uvw")
    }
    spec = base.spec(2, dtype=torch.float64)
    results = []
    for lanes in (1, 3):
        executor = Learner({"base": base}, task, store, splits, spec, 0, lanes)
        fits = {
            c: Fit(Model(adapter(spec, 1 + k % 2, seed=k)), ("A", "B", "head"), 3, batch_size=3)
            for k, c in enumerate("uvw")
        }
        tuned = run(executor, fits)
        results.append((tuned, run(executor, {c: Features(Model(tuned[c].params), "test") for c in "uvw"})))
    for client in "uvw":
        for key, value in results[0][0][client].params.items():
            torch.testing.assert_close(value, results[1][0][client].params[key], rtol=0, atol=1e-10)
        torch.testing.assert_close(results[0][1][client][0], results[1][1][client][0], rtol=0, atol=1e-10)
        plain = base.plain().encoder
        pixels = task.collate(store, splits[client]["test"])[0]["pixel_values"].double()
        for site in base.sites:
            t, name = results[0][0][client].params, site.removeprefix("encoder.")
            plain.get_submodule(name).weight.data += t[f"{site}/scale"] * t[f"{site}/B"] @ t[f"{site}/A"]
        with torch.no_grad():
            torch.testing.assert_close(plain(pixel_values=pixels).last_hidden_state[:, 0], results[0][1][client][0])


def test_images_of_sixteen_bits_keep_their_upper_eight():
    image = pytest.importorskip("PIL.Image")
    values = np.array([[0, 300], [20000, 65535]], dtype=np.uint16)
    rows = {"image": [image.fromarray(values)], "label": ["x"]}
    table = datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), label=datasets.Value("string")))
    store = ImageClassification(("x",)).encode(table, None)
    assert store.pixels[0].tolist() == [[[0] * 3, [1] * 3], [[78] * 3, [255] * 3]]


@pytest.mark.parametrize("value", [0.5, 256, -1, float("nan")])
def test_arrays_that_are_no_pixels_are_refused(value):
    table = [{"image": [[0, value], [1, 2]], "label": "x"}]
    with pytest.raises(UserError, match="whole numbers from 0 to 255"):
        ImageClassification(("x",)).encode(datasets.Dataset.from_list(table), None)
