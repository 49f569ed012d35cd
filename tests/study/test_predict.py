"""A deployed model predicts as it did in training: from its folder, by PEFT and transformers, and merged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from fedlora.adapters.algebra import sites
from fedlora.adapters.peft import not_plain
from fedlora.algorithms import ALGORITHMS
from fedlora.errors import UserError
from fedlora.federation import checkpoint as checkpoints
from fedlora.federation.orders import Model
from fedlora.learning.language import prompt_of
from fedlora.learning.loading import load_backbone
from fedlora.study.config import load as load_config
from fedlora.study.config import parse
from fedlora.study.deploy import deployed as of_client
from fedlora.study.experiment import assemble
from fedlora.study.export import (
    About,
    base_of,
    config_of,
    deployed,
    export,
    heads,
    load,
    rebuilt,
    recipe,
    save,
)
from fedlora.study.export import settings as run_settings
from fedlora.study.predict import Prediction, _prompts, predict, scores, stacked
from fedlora.study.run import run
from study.own_code import Temperature

WIDTH = 16
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "log",
    "far",
    "away",
    "and",
    "home",
    "is",
    "it",
    "good",
    "bad",
]
LABELS = ("no", "yes", "maybe")


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(initializer_range=0.3, vocab_size=len(WORDS) + 3, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = GPT2Config(
        initializer_range=0.3,
        vocab_size=len(WORDS) + 3,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=2,
        eos_token_id=2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def about_of(name: Path, task: str, labels: tuple[str, ...], backbone) -> About:
    text = {"train": "x.jsonl", "text": "text"} | ({"label": "label"} if labels else {})
    config = parse(
        {"model": {"name": str(name), "task": task}, "data": text, "algorithm": {"name": "fedit"}}, "the test"
    )
    return About(run_settings(config), labels, "fedit", None, {}, recipe(backbone))


def tuned(backbone, spread: float = 0.3) -> dict[str, Tensor]:
    """An adapter and a head that have been trained: nothing is zero."""
    spec = backbone.spec(3, 6.0)
    tree = spec.adapter(spec.ranks, 1) | heads(spec, 1)
    return {n: v + spread * torch.randn(v.shape) if n.endswith("/B") else v for n, v in tree.items()}


TEXTS = ["the cat sat on the mat", "bad dog", "it ran far away and is home"]


def test_a_classifier_from_training_to_peft_and_transformers(encoder, tmp_path) -> None:
    """Backbone, export, the card's own recipe, the merged model and predict: one set of probabilities."""
    backbone = load_backbone(encoder, "text-classification", labels=LABELS)
    params = tuned(backbone)
    save(tmp_path / "a", Model(params), base_of(backbone), about_of(encoder, "text-classification", LABELS, backbone))
    answers = predict(tmp_path / "a", TEXTS)
    wanted = torch.tensor([[a.probabilities[label] for label in LABELS] for a in answers])

    # by hand: dense weights on a copy of the base, mean over tokens, head
    copied = BertModel.from_pretrained(encoder).eval()
    inputs = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for site in sites(params):
        layer = copied.get_submodule(site.removeprefix("encoder."))
        layer.weight.data += params[f"{site}/scale"] * params[f"{site}/B"] @ params[f"{site}/A"]
    with torch.no_grad():
        hidden, mask = copied(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        by_hand = (pooled @ params["head/weight"].T + params["head/bias"]).softmax(-1)
    torch.testing.assert_close(wanted, by_hand, rtol=1e-5, atol=1e-5)
    assert answers[0].label == LABELS[int(by_hand[0].argmax())]

    # the lines of the model card
    code = (tmp_path / "a" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "a")), names)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](**inputs).logits.softmax(-1), by_hand, rtol=1e-5, atol=1e-5)

    export(tmp_path / "a", tmp_path / "merged", merge=True)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert [whole.config.id2label[i] for i in range(3)] == list(LABELS)
    with torch.no_grad():
        torch.testing.assert_close(whole(**inputs).logits.softmax(-1), by_hand, rtol=1e-5, atol=1e-5)
    code = (tmp_path / "merged" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("THIS_FOLDER", str(tmp_path / "merged")), names)
    assert torch.equal(names["model"].head.weight, params["head/weight"])


def test_a_model_with_parts_predicts_as_before(encoder, tmp_path, user_code) -> None:
    """Two adapters under a gate, a shared change and an own prediction: equal logits after a round trip."""
    backbone = load_backbone(encoder, "text-classification", labels=LABELS)
    torch.manual_seed(3)
    first, other, shared = (tuned(backbone) for _ in range(3))
    model = Model(
        first | {"extra/shift": torch.randn(3)},
        ({n: v for n, v in other.items() if not n.startswith("head/")},),
        user_code.halves,
        ({n: v for n, v in shared.items() if not n.startswith("head/")},),
        predict=Temperature(2.0),
    )
    save(tmp_path / "a", model, base_of(backbone), about_of(encoder, "text-classification", LABELS, backbone))
    inputs = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    before = scores(stacked(backbone, model), model, inputs).softmax(-1)
    after = torch.tensor([list(a.probabilities.values()) for a in predict(tmp_path / "a", TEXTS)])
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="without --merge"):
        export(tmp_path / "a", tmp_path / "merged", merge=True)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's hint
def test_a_language_model_goes_on_greedily(decoder, tmp_path) -> None:
    backbone = load_backbone(decoder, "causal-lm")
    torch.manual_seed(4)
    params = tuned(backbone) | {"norm/transformer.ln_f.bias": torch.randn(WIDTH)}
    save(tmp_path / "a", Model(params), base_of(backbone), about_of(decoder, "causal-lm", (), backbone))
    export(tmp_path / "a", tmp_path / "merged", merge=True)
    whole = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    plain = GPT2LMHeadModel.from_pretrained(decoder).eval()
    by_peft = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    for text, answer in zip(TEXTS, predict(tmp_path / "a", TEXTS, max_new_tokens=6)):
        ids = torch.tensor([[2, *tokenizer()(text)["input_ids"]]])  # texts begin with the end-of-text token
        with torch.no_grad():
            torch.testing.assert_close(by_peft(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
            for _ in range(6):
                step = whole(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, step], 1)
                if int(step) == 2:
                    break
        wanted = tokenizer().decode(ids[0, 1 + len(text.split()) :], skip_special_tokens=True)
        assert isinstance(answer, str)
        assert answer == wanted


def test_a_client_with_own_labels_never_predicts_others(encoder, tmp_path) -> None:
    backbone = load_backbone(encoder, "text-classification", labels=LABELS)
    params = tuned(backbone) | {"head/bias": torch.tensor([0.0, 50.0, 0.0])}
    about = about_of(encoder, "text-classification", LABELS, backbone)
    for own, label in (((), "yes"), (("no",), "no")):
        save(tmp_path / "a", Model(params), base_of(backbone), dataclasses.replace(about, own_labels=own))
        (answer,) = predict(tmp_path / "a", TEXTS[:1])
        assert isinstance(answer, Prediction)
        assert answer.label == label


@pytest.mark.parametrize("dialogue", [False, True])
def test_prompts_are_formed_as_in_training(decoder, dialogue: bool, tmp_path) -> None:
    """A beginning-of-text token, then the prompt: what the model saw before the first predicted token."""
    backbone = load_backbone(decoder, "causal-lm")
    about = about_of(decoder, "causal-lm", (), backbone)
    if dialogue:
        data = {**about.settings["data"], "text": None, "prompt": "question", "response": "answer"}
        about = dataclasses.replace(about, settings={**about.settings, "data": data})
    save(tmp_path, Model(tuned(backbone)), base_of(backbone), about)
    (got,) = predict(tmp_path, ["the cat"], max_new_tokens=4)
    examples, units = _prompts(config_of(about), backbone, ["the cat"])
    assert prompt_of(examples, int(units[0])) == [2, 3, 5]  # the line break is no token of this tokenizer
    assert isinstance(got, str)


def test_image_files_are_classified(tmp_path) -> None:
    """The export's answer for a file equals the loaded base with the head by hand, on the same normalised pixels."""
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vit = ViTModel(ViTConfig(initializer_range=0.3, image_size=8, patch_size=4, **sizes), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "vit")
    settings = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
    image.fromarray(pixels.numpy()).save(tmp_path / "one.png")

    backbone = load_backbone(tmp_path / "vit", "image-classification", labels=LABELS)
    params = tuned(backbone)
    config = {
        "model": {"name": str(tmp_path / "vit"), "task": "image-classification"},
        "data": {"train": "x", "image": "image", "label": "label"},
        "algorithm": {"name": "fedit"},
    }
    about = About(run_settings(parse(config, "the test")), LABELS, "fedit", recipe=recipe(backbone))
    save(tmp_path / "a", Model(params), base_of(backbone), about)
    (answer,) = predict(tmp_path / "a", [str(tmp_path / "one.png")])
    code = (tmp_path / "a" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(tmp_path / "a")), names)
    with torch.no_grad():
        x = ((pixels / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]
        wanted = names["model"](pixel_values=x).logits.softmax(-1)
    assert isinstance(answer, Prediction)
    torch.testing.assert_close(torch.tensor([list(answer.probabilities.values())]), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="no image file"):
        predict(tmp_path / "a", ["absent.png"])
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(UserError, match=r"image .*a\.txt cannot be read: it is no image"):
        predict(tmp_path / "a", [str(tmp_path / "one.png"), str(tmp_path / "a.txt")])


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        *({"name": name} for name in sorted(ALGORITHMS)),
        {"name": "fdlora", "fusion": "product"},
        {"name": "slora", "sparse_rounds": 1},
        {"name": "slora", "sparse_rounds": 1, "merge": "svd"},
    ],
    ids=lambda algorithm: "-".join(map(str, algorithm.values())),
)
def test_every_algorithm_s_result_loads_in_peft(algorithm: dict, encoder, tmp_path) -> None:
    """What a run writes, read back or loaded by the lines of its card, gives the logits of what the run deploys."""
    rows = [
        {"text": " ".join(WORDS[(i * k + j) % 17] for j in range(4)), "label": LABELS[i % 3]}
        for k in range(1, 4)
        for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"name": str(encoder), "task": "text-classification", "dtype": "float32"},
        "adapter": {"rank": 4},
        "data": {"train": str(tmp_path / "rows.jsonl"), "text": "text", "label": "label", "partition": {"clients": 3}},
        "algorithm": algorithm,
        "training": {"rounds": 2, "lr": 0.05, "eval_every": 0},
    }
    folder = run(config, out=tmp_path / "run").folder
    experiment = assemble(load_config(folder / "config.toml"), folder)
    checkpoint = checkpoints.latest(folder / "checkpoints")
    assert checkpoint is not None
    deployed_models = {c.id: next(iter(of_client(experiment, checkpoint, c).values())) for c in experiment.judged}
    judge = experiment.algorithm.server_model(checkpoint["state"])
    wanted: dict[str | None, Model] = {**deployed_models, **({} if judge is None else {None: judge})}
    inputs = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    start = heads(experiment.spec, 0)
    untrained = outputs_of(experiment.backbone, Model(start), inputs)
    for client, model in wanted.items():
        place = deployed(folder, client)
        ours = outputs_of(experiment.backbone, dataclasses.replace(model, params={**start, **model.params}), inputs)
        again, about = load(place)
        torch.testing.assert_close(outputs_of(rebuilt(about), again, inputs), ours, rtol=0, atol=1e-5)
        assert (ours - untrained).abs().max() > 0.01
        assert (place / "adapter_config.json").exists() == (not not_plain(model))
        if not not_plain(model):
            code = (place / "README.md").read_text().split("```python\n")[1].split("```")[0]
            names: dict = {}
            exec(code.replace("THIS_FOLDER", str(place)), names)
            with torch.no_grad():
                assert (ours - names["model"](**inputs).logits).abs().max() <= 1e-5


def outputs_of(backbone, model: Model, inputs) -> Tensor:
    return scores(stacked(backbone, model), model, inputs)
