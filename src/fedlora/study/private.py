"""Clients with models of their own (``[clients] models``): loading them, feeding them, and writing them as folders."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedlora.errors import UserError
from fedlora.federation.algorithm import Algorithm
from fedlora.federation.orders import Model
from fedlora.federation.spec import Tree, derive
from fedlora.learning.backbone import Backbone
from fedlora.learning.batches import to_device
from fedlora.learning.examples import Examples, Task
from fedlora.learning.loading import load_backbone
from fedlora.learning.sources import Kind, load_processor, quiet
from fedlora.study.config import RunConfig

FOLDER, PARTS = "backbone", "parts.safetensors"
Modules = Mapping[str, nn.Module]
"""Modules given as objects, under the names that ``[clients] models`` uses."""


def require_suitable(config: RunConfig, algorithm: Algorithm[Any, Any, Any]) -> None:
    """Refuses algorithms and tasks for which models of the clients' own mean nothing."""
    if config.clients.models is None:
        return
    if not algorithm.private_backbones:
        raise UserError(
            f"[clients] models: {config.algorithm.name} puts adapters on one base that all clients share",
            "use pfedlora, standalone, lg-fedavg, fml, fedkd, fedproto or fedgh, or leave models out",
        )
    if config.model.task == "causal-lm":
        raise UserError(
            "[clients] models: language models of different kinds have no labels in common", "use a classification task"
        )


def assigned(names: Sequence[str] | None, clients: Iterable[str]) -> dict[str, str]:
    """Client -> backbone: the list cycled over the clients.

    >>> assigned(["cnn-1", "cnn-2"], ["a", "b", "c"])
    {'a': 'cnn-1', 'b': 'cnn-2', 'c': 'cnn-1'}
    """
    return {client: names[i % len(names)] if names else "base" for i, client in enumerate(clients)}


def load(
    config: RunConfig, base: Backbone, given: Modules | None, device: str, wanted: Collection[str] | None = None
) -> dict[str, Backbone]:
    """The distinct models of ``[clients] models`` by name (only those ``wanted``), each giving representations of the
    base's width.

    One object a name, however many clients begin with it: what each has trained lies in its memory.
    """
    known = (*(config.clients.models or ()), config.model.name)
    if foreign := sorted(set(given or ()) - set(known)):
        raise UserError(
            f"models: nothing is called {foreign[0]!r} in [clients] models ({', '.join(known)})", "name it there too"
        )
    found: dict[str, Backbone] = {}
    for position, name in enumerate(dict.fromkeys(config.clients.models or ())):
        if wanted is not None and name not in wanted:
            continue
        module = (given or {}).get(name)
        if not (module is None or isinstance(module, nn.Module)):
            raise UserError(
                f"models: {name!r} is given as a {type(module).__name__}, not as a torch module",
                "give an object, built",
            )
        with explained(f"[clients] models: {name!r}"):
            found[name] = load_backbone(
                name if module is None else module,
                config.model.task,
                labels=base.labels,
                pooling=config.model.pooling,
                device=device,
                processor=getattr(module, "processor", None) or (None if module is None else base.processor),
                width=base.width,
                adapt=False,
                seed=derive(config.seed, "backbone", position),  # not the name: a folder may move
            )
        found[name].name = name  # of a module it is its class's, which others share
    return found


class explained:
    """Whatever goes wrong inside the block is why a model cannot serve as a client's. ``place``: where it is named."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            what = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(
                f"{self.place} gives no representation of an example: {what}",
                "name an encoder, a classifier with a linear head, or cnn-1 to cnn-5",
            ) from error


def encoded(task: Task, table: Any, backbones: Mapping[str, Backbone]) -> dict[str, Examples]:
    """The store of examples, as each backbone reads them; backbones with equal processors share one."""
    stores: dict[str, Examples] = {}
    for name, backbone in backbones.items():
        alike = next((n for n in stores if _same(backbones[n], backbone)), None)
        stores[name] = stores[alike] if alike else task.encode(table, backbone.processor)
    return stores


def _same(a: Backbone, b: Backbone) -> bool:
    return (
        a.processor is b.processor
        or a.name == b.name
        or (a.kind == "image-classification" and a.processor == b.processor)
    )


@torch.no_grad()
def require_representations(backbones: Mapping[str, Backbone], task: Task, stores: Mapping[str, Examples]) -> None:
    """Shows every private model (the base, where there are none) two examples: what it gives must be (examples, width)
    finite numbers."""
    for name, backbone in backbones.items():
        if (name == "base" and len(backbones) > 1) or not len(stores[name]):
            continue
        units = stores[name].units(np.arange(min(2, len(stores[name]))))  # one alone hides what mixes examples
        inputs, _ = task.collate(stores[name], units)
        with explained(f"[model] name = {backbone.name!r}" if name == "base" else f"[clients] models: {name!r}"):
            features: Any = backbone.forward(to_device(inputs, backbone.device, backbone.dtype))[0]
            wanted = (len(units), backbone.width)
            if not isinstance(features, Tensor):
                raise ValueError(f"it gives a {type(features).__name__}, not an array of shape {wanted}")
            if tuple(features.shape) != wanted:
                raise ValueError(f"it gives an array of shape {tuple(features.shape)}, not {wanted}")
            if not bool(torch.isfinite(features).all()):
                raise ValueError("its numbers are not finite")


# -- folders


def write(folder: Path, model: Model, backbone: Backbone, start: Tree) -> dict[str, Any]:
    """``backbone/`` holds the trained model in its own format (transformers', or a module's state as safetensors), its
    map to the common width and its head as one; ``parts.safetensors`` both apart, and the arrays of objectives."""
    values = {**start, **model.params}
    module = backbone.plain(values)
    target = folder / FOLDER
    target.mkdir()
    if isinstance(module, PreTrainedModel):
        names = dict(enumerate(backbone.labels))
        module.config.id2label, module.config.label2id = names, {label: i for i, label in names.items()}
        with quiet():
            module.save_pretrained(target)
    else:
        safetensors.torch.save_model(module, str(target / "model.safetensors"))
    if hasattr(backbone.processor, "save_pretrained"):
        backbone.processor.save_pretrained(target)
    mapped = isinstance(backbone.module.get_submodule(backbone.head_path), nn.Linear)
    map_of = {f"backbone/{backbone.head_path}.{name}" for name in ("weight", "bias")}
    own = {**backbone.own(("backbone",)), **values}
    kept = {k: v for k, v in own.items() if k.startswith(("head/", "extra/")) or k in map_of}
    safetensors.torch.save_file(
        {k: v.detach().cpu().clone().contiguous() for k, v in kept.items()}, str(folder / PARTS)
    )
    return {
        "folder": FOLDER,
        "class": f"{type(module).__module__}.{type(module).__name__}",
        "transformers": isinstance(module, PreTrainedModel),
        "width": backbone.width if mapped else None,
    }


def read(
    folder: Path, part: Mapping[str, Any], kind: Kind, labels: Sequence[str], module: Any, device: str = "cpu"
) -> tuple[Backbone, dict[str, Tensor]]:
    """The backbone that ``write`` wrote, and all its values. ``module``: an object of the class, where that is no
    transformers model."""
    source: Any = folder / part["folder"]
    processor = None
    if not part["transformers"]:
        if module is None:
            raise UserError(
                f"{folder}: its model is of your own class {part['class']}",
                "give the module: fedlora.predict(models={name: module})",
            )
        place, source = source, copy.deepcopy(module)
        safetensors.torch.load_model(source, str(place / "model.safetensors"))
        processor = getattr(module, "processor", None)
        if processor is None and len(list(place.iterdir())) > 1:
            processor = load_processor(str(place), kind)
    backbone = load_backbone(
        source,
        kind,
        labels=labels,
        device=device,
        processor=processor,
        width=part["width"],
        adapt=False,
    )
    parts = safetensors.torch.load_file(str(folder / PARTS), device=device)
    return backbone, {**backbone.own(("backbone",)), **parts}
