"""What is no adapter that could be read or written is refused by name; a folder is never left half written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedlora.adapters.peft import Base, fit_to, from_peft, read, replacing, to_peft, whole_of
from fedlora.errors import UserError
from fedlora.federation.orders import Model, Outputs
from fedlora.federation.spec import Tree


def saved(folder, config: dict, tensors: Tree) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    save_file(dict(tensors), folder / "adapter_model.safetensors")


FACTORS = {"base_model.model.q.lora_A.weight": torch.ones(2, 3), "base_model.model.q.lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"use_dora": True}, FACTORS, "use_dora = True"),
        ({"bias": "all"}, FACTORS, "bias = 'all'"),
        ({"lora_bias": True}, FACTORS, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, FACTORS, "pissa_niter_4"),
        ({"layer_replication": [[0, 2]]}, FACTORS, "layer_replication"),
        ({"peft_type": "IA3"}, FACTORS, "'IA3'"),
        ({"r": 3}, FACTORS, "says rank 3"),
        ({}, {"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, "q lacks lora_A or lora_B"),
        ({}, FACTORS | {"base_model.model.e.lora_embedding_A": torch.ones(2, 3)}, "lora_embedding_A"),
        ({}, FACTORS | {"base_model.model.q.lora_magnitude_vector": torch.ones(2)}, "lora_magnitude_vector"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(config: dict, tensors: Tree, words: str, tmp_path) -> None:
    saved(tmp_path, {}, FACTORS)
    assert read(tmp_path)["q/scale"] == 2
    saved(tmp_path, config, tensors)
    with pytest.raises(UserError, match=r"\n  -> ") as raised:
        read(tmp_path)
    assert words in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_files_that_are_missing_or_broken_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        read(tmp_path)
    saved(tmp_path, {}, FACTORS)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not readable as safetensors"):
        read(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="never pickle"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not readable as JSON"):
        read(tmp_path)


def test_an_adapter_of_another_base_is_refused() -> None:
    tree = {"q/A": torch.ones(2, 3), "q/B": torch.ones(4, 2), "q/scale": torch.ones(())}
    fit_to(tree, {"q": (4, 3)}, "there")
    with pytest.raises(UserError, match="q is 4 x 3"):
        fit_to(tree, {"q": (3, 4)}, "there")
    with pytest.raises(UserError, match="it adapts 'q'"):
        fit_to(tree, {"k": (4, 3)}, "there")


def test_saved_modules_that_nothing_would_read_are_refused() -> None:
    table = torch.randn(5, 3)
    base = Base("b", "SEQ_CLS", "classifier.out", {"dense.weight": torch.ones(3, 3), "e": table, "tied": table})
    shapes = {"head/weight": (2, 3), "embedding/e": (5, 3)}
    head, trained = {"head/weight": torch.zeros(2, 3)}, table + 1
    same = {"embedding/dense.weight": torch.ones(3, 3).bfloat16()}  # PEFT saves a classifier's every part
    assert whole_of(head | same, shapes, base, "there").keys() == head.keys()
    assert whole_of({"embedding/e": trained, "embedding/tied": trained}, shapes, base, "there").keys() == {
        "embedding/e"
    }
    for other in ({"embedding/dense.weight": torch.zeros(3, 3)}, {"norm/n.weight": torch.ones(3)}):
        with pytest.raises(UserError, match="which this run does not train"):
            whole_of(head | other, shapes, base, "there")
    with pytest.raises(UserError, match="does not train"):  # no longer tied
        whole_of({"embedding/e": trained, "embedding/tied": table}, shapes, base, "there")
    with pytest.raises(UserError, match=r"head/weight is \(4, 3\), the run's is \(2, 3\)"):
        whole_of({"head/weight": torch.zeros(4, 3)}, shapes, base, "there")


def test_halves_do_not_round_the_scale() -> None:
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 16}
    tensors = {f"q.lora_{name}.weight": torch.ones(6, 6, dtype=torch.bfloat16) for name in "AB"}
    assert float(from_peft(config, tensors)["q/scale"]) == pytest.approx(16 / 6, rel=1e-7)


def halves(features: Tensor, params: Tree) -> Tensor:
    return torch.full((len(features), 2), 0.5)


def doubled(outputs: Outputs, params: Tree) -> Tensor:
    return 2 * outputs.logits


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Model({}, ({},), weights=halves), "gate"),
        (Model({}, predict=doubled), "own rule"),
        (Model({}, backbone="cnn-1"), "cnn-1"),
        (Model({"backbone/w": torch.ones(1)}), "private"),
    ],
)
def test_what_is_no_single_adapter_is_refused(model: Model, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_peft(model, Base("b"))


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "deep" / "folder"
    with replacing(target) as fresh:
        (fresh / "old").write_text("1")
    with pytest.raises(FileNotFoundError), replacing(target) as fresh:
        (fresh / "missing" / "new").write_text("2")
    assert [p.name for p in target.iterdir()] == ["old"]
    with replacing(target) as fresh:
        (fresh / "new").write_text("2")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in target.parent.iterdir()] == ["folder"]
