"""Deployed models as folders: a plain adapter is a PEFT folder; any other model is parts and code that joins them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedlora.adapters.algebra import whole
from fedlora.adapters.lora import LaneLinear, mergeable, merged_weight
from fedlora.adapters.peft import Base, change, describe, flatten, not_plain, read, replacing, to_peft, write
from fedlora.assets import embedded_lm
from fedlora.data.keys import meant
from fedlora.errors import UserError
from fedlora.federation.orders import Model, logits
from fedlora.federation.spec import ModelSpec, Tree
from fedlora.learning.pooled import PooledClassifier
from fedlora.learning.sources import quantisation
from fedlora.study import private
from fedlora.study.algorithm import find
from fedlora.study.code import named, revived
from fedlora.study.config import RunConfig, parse
from fedlora.study.config import load as load_config

if TYPE_CHECKING:
    from fedlora.learning.backbone import Backbone

ABOUT = "fedlora.json"
GLOBAL, CLIENTS = "global", "clients"


@dataclass(frozen=True)
class About:
    """What a folder says of its model beyond the weights.

    ``settings``: of the resolved run file what loads the base and encodes an input, see ``settings``. ``recipe``:
    Python lines that end with ``base = ...``. ``own_labels``: those that the client knows, where label spaces are own.
    ``round``: the server's that a newcomer met, whose model no later round writes again.
    """

    settings: Mapping[str, Any]
    labels: tuple[str, ...] = ()
    algorithm: str = ""
    client: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    recipe: tuple[str, ...] = ()
    own_labels: tuple[str, ...] = ()
    round: int | None = None


# -- the base


def settings(config: RunConfig) -> dict[str, Any]:
    """What of a run file a deployed model needs: the model, the adapted layers, and how inputs become tokens."""
    data = config.data.model_dump(mode="json", include={"text", "image", "prompt", "response", "max_length"})
    clients = config.clients.model_dump(mode="json", include={"models"})
    adapter = config.adapter.model_dump(mode="json", include={"targets", "layers"})
    own = {"clients": clients} if config.clients.models else {}
    return {"seed": config.seed, "model": config.model.model_dump(mode="json"), "adapter": adapter, "data": data} | own


def config_of(about: About) -> RunConfig:
    """The part of the run file that a folder remembers."""
    return parse({**about.settings, "algorithm": {"name": about.algorithm}}, ABOUT)


def base_of(backbone: Backbone) -> Base:
    """What a PEFT folder must know of a run's base."""
    task = {"text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}.get(backbone.kind)
    return describe(backbone.module, _public(backbone.name), task, backbone.head_path)


def _public(name: str) -> str:
    """The name under which PEFT and transformers find a base."""
    if name == "minilm":
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(embedded_lm()) if name == "embedded-lm" else name


def heads(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """The head that every model of a run starts from; saved where a model names no other."""
    return {name: value for name, value in spec.start(seed).items() if name.startswith("head/")}


def recipe(backbone: Backbone) -> tuple[str, ...]:
    """Python lines that load the base, in float32 as predictions are made."""
    module, lines, name = backbone.module, (), repr(_public(backbone.name))
    if backbone.name == "embedded-lm":
        lines, name = ("from fedlora.assets import embedded_lm",), "embedded_lm()"
    arguments = f'{name}, dtype="float32"'
    if (how := quantisation(module)) is not None:
        said = ", ".join(f"{key}={value!r}" for key, value in how.to_diff_dict().items() if not key.startswith("_"))
        lines = (*lines, f"from transformers import {type(how).__name__}")
        arguments += f", quantization_config={type(how).__name__}({said})"
    if isinstance(module, PooledClassifier):
        kind = type(module.encoder).__name__
        return (
            *lines,
            "from fedlora.learning.pooled import PooledClassifier, PooledConfig",
            f"from transformers import {kind}",
            "",
            f"encoder = {kind}.from_pretrained({arguments})",
            f'config = PooledConfig(encoder.config, "{module.config.pooling}", num_labels={len(backbone.labels)})',
            "base = PooledClassifier(config, encoder)",
        )
    if backbone.labels:
        arguments += f", num_labels={len(backbone.labels)}, ignore_mismatched_sizes=True"
    kind = type(module).__name__
    return (*lines, f"from transformers import {kind}", "", f"base = {kind}.from_pretrained({arguments})")


def rebuilt(about: About, device: str = "cpu") -> Backbone:
    """The base that a folder's model sits on, in float32."""
    from fedlora.learning.loading import load_backbone

    config = config_of(about)
    return load_backbone(
        config.model.name,
        config.model.task,
        labels=about.labels,
        pooling=config.model.pooling,
        targets=config.adapter.targets,
        layers=config.adapter.layers,
        bits=config.model.bits,
        device=device,
        seed=config.seed,
    )


# -- writing and reading a model


def save(
    folder: str | Path,
    model: Model,
    base: Base,
    about: About,
    start: Tree | None = None,
    own: Backbone | None = None,
) -> None:
    """Writes a model as a folder, whole or not at all; one that is there is replaced.

    A plain model (also several adapters with constant weights, and shared changes) is one PEFT adapter, exactly. With a
    gate, an own ``predict`` or private weights, each part is a PEFT folder of its own and ``fedlora.json`` names the
    code. ``start``: see ``to_peft``. ``own``: the client's own model, where it has one: it is written whole, in its
    own format.
    """
    with replacing(folder) as fresh:
        if own is not None:
            parts = {"own": private.write(fresh, model, own, start or {}), **_code(model)}
        else:
            parts = _plain(fresh, model, base, start) if not not_plain(model) else _parts(fresh, model, base, start)
        content = {"format": 1, **dataclasses.asdict(about), "head": base.head, "model": parts}
        (fresh / ABOUT).write_text(json.dumps(content, indent=2) + "\n")
        use = _use_own(parts["own"]) if own else _use_parts() if not_plain(model) else _use_adapter(about)
        (fresh / "README.md").write_text(card(about, base, use))


def _plain(folder: Path, model: Model, base: Base, start: Tree | None) -> dict[str, Any]:
    write(folder, *to_peft(model, base, start))
    return {"params": _part(".", {**(start or {}), **flatten(model)})}


def _parts(folder: Path, model: Model, base: Base, start: Tree | None) -> dict[str, Any]:
    """Every part in a folder of its own: params, other-1, ..., shared; and what no adapter holds in extra."""
    own = {name: value for name, value in model.params.items() if name.startswith(("extra/", "backbone/"))}
    trees = {"params": {n: v for n, v in model.params.items() if n not in own}}
    trees |= {f"other-{i}": tree for i, tree in enumerate(model.others, 1)}
    described: dict[str, Any] = {"others": []}
    for name, tree in trees.items():
        write(folder / name, *to_peft(Model(tree), base, start if name == "params" else None))
        part = _part(name, {**(start or {} if name == "params" else {}), **flatten(Model(tree))})
        described |= {"params": part} if name == "params" else {"others": [*described["others"], part]}
    if model.shared:
        write(folder / "shared", *to_peft(Model({}, shared=model.shared), base))
        described["shared"] = _part("shared", flatten(Model({}, shared=model.shared)))
    if own:
        save_file({n: v.detach().cpu().clone().contiguous() for n, v in own.items()}, folder / "extra.safetensors")
    return described | _code(model)


def _code(model: Model) -> dict[str, Any]:
    """How the parts are joined."""
    return {
        "weights": named(model.weights) if callable(model.weights) else model.weights and list(model.weights),
        "predict": None if model.predict is logits else named(model.predict),
        "backbone": model.backbone,
    }


def _part(folder: str, tree: Tree) -> dict[str, Any]:
    """Where a part is, and which whole parameters of its file are the model's (PEFT wants more in it)."""
    return {"folder": folder, "whole": sorted(n for n in whole(tree) if not n.startswith("extra/"))}


def load(folder: str | Path, models: Mapping[str, Any] | None = None) -> tuple[Model, About]:
    """The model of a folder that ``save`` wrote (``models``: as for ``run``); UserError names what is missing."""
    model, about, _ = opened(folder, models)
    return model, about


def opened(folder: str | Path, models: Mapping[str, Any] | None = None) -> tuple[Model, About, Backbone | None]:
    """``load``, and the client's own model where the folder has one."""
    path = Path(folder)
    content = _content(path)
    described = content["model"]
    head = content["head"]
    fields: dict[str, Any] = {f.name: content[f.name] for f in dataclasses.fields(About) if f.name in content}
    fields |= {name: tuple(fields[name]) for name in ("labels", "recipe", "own_labels")}
    about, own = About(**fields), None
    if "own" in described:
        task = config_of(about).model.task
        module = (models or {}).get(described["backbone"])
        own, params = private.read(path, described["own"], task, about.labels, module)
    else:
        extra = path / "extra.safetensors"
        params = _read(path, described["params"], head) | (load_file(extra) if extra.exists() else {})
    weights = described.get("weights")
    model = Model(
        params,
        tuple(_read(path, part, head) for part in described.get("others", ())),
        revived(weights, path) if isinstance(weights, Mapping) else weights and tuple(weights),
        (_read(path, described["shared"], head),) if "shared" in described else (),
        described.get("backbone", "base"),
        revived(described["predict"], path) if described.get("predict") else logits,
    )
    return model, about, own


def _read(folder: Path, part: Mapping[str, Any], head: str) -> dict[str, Any]:
    tree = read(folder / part["folder"], head)
    known = set(part["whole"])
    return {name: value for name, value in tree.items() if name in known or name not in whole(tree)}


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / ABOUT).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no {ABOUT}", "name a run folder or a folder that `fedlora export` wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / ABOUT}: not readable as JSON: {error}", "export the model again") from None
    if content.get("format") != 1:
        raise UserError(f"{folder / ABOUT}: format {content.get('format')!r} is unknown", "use a newer fedlora")
    return content


# -- run folders, copies and merges


def deployed(folder: str | Path, client: str | None = None) -> Path:
    """The folder of a client's deployed model (None: the global one) in a run folder; an export is its own."""
    path = Path(folder)
    if (path / ABOUT).exists():
        own = _content(path)["client"]
        if client is not None and client != own:
            whose = "the global model" if own is None else f"client {own!r}"
            raise UserError(f"{path} holds the model of {whose}, not of client {client!r}", "leave --client out")
        return path
    _import_algorithm(path)
    adapters = path / "adapters"
    if (path / "config.json").exists():  # transformers'
        raise UserError(f"{path}: a whole (merged) model, no adapter", "load it with transformers: see its README.md")
    if not adapters.is_dir() and not any(path.glob("sites/*/adapters")):
        raise UserError(
            f"{path}: no adapters are there", "name a finished run's folder (`fedlora resume` finishes one)"
        )
    written = written_in(path)
    if client is None:
        if not (adapters / GLOBAL / ABOUT).exists():
            some = f", for example --client {next(iter(written))!r}" if written else ""
            raise UserError(f"{path}: this algorithm has no global model", f"name a client{some}")
        return adapters / GLOBAL
    if client not in written:
        raise UserError(
            f"{path}: no adapter of client {client!r} ({meant(client, written) if written else 'none were written'})",
            'clients beyond [output] client_adapters are not written: set it to "all" and run `fedlora resume`; '
            "one that never trained gets its own by `fedlora personalize`",
        )
    return written[client]


def written_in(run: Path) -> dict[str, Path]:
    """The clients' adapters of a run folder, those at its sites too."""
    folders = [*run.glob(f"adapters/{CLIENTS}/*"), *run.glob(f"sites/*/adapters/{CLIENTS}/*")]
    return {_content(place)["client"]: place for place in sorted(folders) if (place / ABOUT).exists()}


def _import_algorithm(run: Path) -> None:
    """A run folder's own algorithm file may define gates and predictions: it is imported, as when the run resumes."""
    if (run / "config.toml").exists():
        name = load_config(run / "config.toml").algorithm.name
        if ".py:" in name:
            find(name)


def export(folder: str | Path, to: str | Path, client: str | None = None, merge: bool = False) -> Path:
    """Copies a deployed model out of a run folder, or (``merge``) writes the base with the change merged in, which
    transformers loads. UserError where there is no such model, or ``to`` is neither empty nor absent."""
    source, target = deployed(folder, client), Path(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {target}: exists and is not empty", "name a new folder")
    with replacing(target) as fresh:
        if merge:
            _write_merged(source, fresh)
        else:
            shutil.copytree(source, fresh, dirs_exist_ok=True)
    return target


def _write_merged(source: Path, folder: Path) -> None:
    model, about = load(source)
    backbone = rebuilt(about)
    base, module = base_of(backbone), cast(PreTrainedModel, backbone.plain())
    merged(module, model, base)
    if about.labels:  # the head's rows are in our order
        module.config.id2label = dict(enumerate(about.labels))
        module.config.label2id = {label: i for i, label in enumerate(about.labels)}
    module.save_pretrained(folder)
    if backbone.processor is not None:
        backbone.processor.save_pretrained(folder)
    (folder / "README.md").write_text(card(about, base, _use_merged(module)))


def merged(module: nn.Module, model: Model, base: Base, start: Tree | None = None) -> None:
    """Puts a plain model's change into a module's own weights: W0 + dW at every site, and the whole parameters."""
    if reason := not_plain(model):
        raise UserError(f"this model cannot be merged: {reason}", "export it without --merge")
    parameters = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for site, delta in change(model).items():
            layer = module.get_submodule(site)
            layer = layer.base if isinstance(layer, LaneLinear) else layer
            if not mergeable(layer):
                raise UserError(
                    f"{site} is a {type(layer).__name__}, not torch's own Linear: what its weight means is not known",
                    "export without --merge (PEFT's merge_and_unload may know it)",
                )
            weight = merged_weight(layer, delta)
            layer.get_parameter("weight").copy_(weight.T if site in base.transposed else weight)
        for name, value in {**(start or {}), **whole(model.params)}.items():
            if not name.startswith("extra/"):
                parameters[base.path(name)].copy_(value)


# -- the model card


def card(about: About, base: Base, use: str) -> str:
    """README.md of a folder: what it is and how it is used."""
    who = "the global model" if about.client is None else f"the model of client `{about.client}`"
    facts = [f"Trained by federated fine-tuning (fedlora, algorithm `{about.algorithm}`) on the base `{base.name}`."]
    if about.labels:
        facts.append(f"Labels, in the order of the logits: {', '.join(about.labels)}")
    if about.metrics:
        facts.append("\n".join(f"- {name}: {value:.4f}" for name, value in about.metrics.items()))
    head = f"base_model: {json.dumps(base.name)}\ntags: [lora, federated-learning, fedlora]"
    return "\n\n".join((f"---\n{head}\n---", f"# {about.algorithm}: {who}", *facts, "## Use", use))


SHELL = '```sh\nfedlora predict THIS_FOLDER --text "..."\n```\n'


def _use_adapter(about: About) -> str:
    lines = ("from peft import PeftModel", *about.recipe)
    load = 'model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()'
    own = any(PooledClassifier.__name__ in line for line in lines)
    note = "\nPEFT's Auto classes cannot load it: they know no such head on this encoder.\n" if own else ""
    return "```python\n" + "\n".join((*lines, load)) + f"\n```\n{note}\nor\n\n{SHELL}"


def _use_parts() -> str:
    return f"Several parts, joined by the code that `{ABOUT}` names:\n\n{SHELL}"


def _use_own(part: Mapping[str, Any]) -> str:
    folder = part["folder"]
    if not part["transformers"]:
        return f"The state of a `{part['class']}` is `{folder}/model.safetensors`.\n"
    package, _, name = part["class"].rpartition(".")
    package = "transformers" if package.startswith("transformers.") else package
    lines = (f"from {package} import {name}", "", f'model = {name}.from_pretrained("THIS_FOLDER/{folder}").eval()')
    return "The client's own model:\n\n```python\n" + "\n".join(lines) + f"\n```\n\nor\n\n{SHELL}"


def _use_merged(module: nn.Module) -> str:
    name = type(module).__name__
    source = "fedlora.learning.pooled" if isinstance(module, PooledClassifier) else "transformers"
    lines = (f"from {source} import {name}", "", f'model = {name}.from_pretrained("THIS_FOLDER").eval()')
    return "```python\n" + "\n".join(lines) + "\n```\n"
