"""Models as PEFT adapters, both ways: one exact LoRA of what a model puts on its base, and folders that PEFT loads."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedlora.adapters.algebra import linalg, product, sites, stack, whole
from fedlora.adapters.lora import LaneLinear
from fedlora.errors import UserError
from fedlora.federation.orders import Model, logits
from fedlora.federation.spec import Shape, Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NO_SITES = "dummy-target-modules"  # PEFT's own name for an adapter that only brings whole modules
CLASSIFIERS = ("classifier", "score")  # PEFT always saves modules with these endings for a classification task
safe: Any = safetensors.torch  # untyped there
PRIVATE = ("extra/", "backbone/")  # arrays that no adapter format holds


@dataclass(frozen=True, eq=False)
class Base:
    """What a PEFT folder must know of the module under the adapter.

    ``name`` goes to ``base_model_name_or_path``, ``task`` to ``task_type``; ``head`` is the path of the module that
    trees call "head". ``values`` are the base's own parameters and buffers by path, by reference; tied ones appear
    under each of their paths and share memory. ``transposed``: the layers whose weight is (in, out), GPT-2's Conv1D.
    """

    name: str
    task: str | None = None
    head: str = "head"
    values: Tree = field(default_factory=dict[str, Tensor])
    transposed: frozenset[str] = frozenset()

    def path(self, name: str) -> str:
        """The parameter path behind a whole parameter's name in a tree.

        >>> Base("b", head="score").path("head/weight"), Base("b").path("norm/encoder.norm.bias")
        ('score.weight', 'encoder.norm.bias')
        """
        kind, _, rest = name.partition("/")
        return f"{self.head}.{rest}" if kind == "head" else rest

    def module(self, path: str) -> str:
        """The module that is saved for a parameter path: the parameter's own, or what PEFT will replace around it."""
        own = path.rpartition(".")[0]
        return next((parent for parent in _parents(path) if parent.endswith(self.replaced)), own)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Endings of modules that PEFT replaces unasked."""
        return CLASSIFIERS if self.task == "SEQ_CLS" else ()

    def aliases(self, path: str) -> list[str]:
        """The other paths of a tied parameter."""
        own = self.values.get(path)
        if own is None:
            return []
        return [p for p, v in self.values.items() if p != path and v.shape == own.shape and _memory(v) == _memory(own)]


def describe(module: nn.Module, name: str, task: str | None = None, head: str = "head") -> Base:
    """The ``Base`` of a Hugging Face module; adapted layers count as the layer that they wrap."""
    modules: dict[str, nn.Module] = dict(cast(Any, module).named_modules())
    wrapped = {path for path, layer in modules.items() if isinstance(layer, LaneLinear)}

    def bare(path: str) -> str:
        site, _, rest = path.rpartition(".base")
        return site + rest if site in wrapped else path

    transposed = frozenset(bare(path) for path, layer in modules.items() if type(layer).__name__ == "Conv1D")
    return Base(name, task, head, {bare(path): value for path, value in module.state_dict().items()}, transposed)


def _parents(path: str) -> list[str]:
    """The modules around a parameter, outermost first."""
    return [path[: dot.start()] for dot in re.finditer(r"\.", path)]


def _memory(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


# -- one exact LoRA


def flatten(model: Model) -> dict[str, Tensor]:
    """The one plain adapter (A, B, scale per site, and whole parameters) that equals a model, exactly.

    A single adapter keeps its factors, C folded into A. Several adapters and shared changes are stacked, weights and
    scales folded into B, rank = sum of ranks; where that exceeds min(out, in), or a change is dense, it is factored in
    float64 (rank <= min(out, in); what is dropped lies below the rounding of the change itself). ValueError: a gate,
    an own ``predict`` or private weights cannot be one adapter.
    """
    if reason := not_plain(model):
        raise ValueError(f"no single adapter: {reason}")
    weights = (1.0,) * (1 + len(model.others)) if model.weights is None else tuple(model.weights)  # type: ignore[arg-type]
    terms = [*zip(weights, (model.params, *model.others), strict=True), *((1.0, tree) for tree in model.shared)]
    tree = {name: value for name, value in whole(model.params).items() if not name.startswith(PRIVATE)}
    for site in sorted({site for _, term in terms for site in sites(term)}):
        own = [(weight, term) for weight, term in terms if f"{site}/A" in term or f"{site}/W" in term]
        tree |= _one(site, [weight for weight, _ in own], [term for _, term in own])
    return tree


def not_plain(model: Model) -> str:
    """Why a model is more than one adapter on the shared base ("": it is not)."""
    if callable(model.weights):
        return f"its adapters are weighted by a gate ({model.weights!r})"
    if model.predict is not logits:
        return f"it predicts by its own rule ({model.predict!r})"
    if model.backbone != "base" or any(name.startswith("backbone/") for name in model.params):
        return f"it has private weights (backbone {model.backbone!r})"
    return ""


def _one(site: str, weights: list[float], terms: list[Tree]) -> dict[str, Tensor]:
    factored = all(f"{site}/A" in term for term in terms)
    if factored and len(terms) == 1:
        (term,), (weight,) = terms, weights
        core, right = term.get(f"{site}/C"), term[f"{site}/A"]
        folded = right if core is None else (core.double() @ right.double()).to(right.dtype)
        scale = term[f"{site}/scale"] if weight == 1 else weight * term[f"{site}/scale"].double()
        return {f"{site}/A": folded, f"{site}/B": term[f"{site}/B"], f"{site}/scale": scale}
    wide = [{name: term[name].double() for name in term if name.rpartition("/")[0] == site} for term in terms]
    dtype = next(iter(term[n] for term in terms for n in (f"{site}/A", f"{site}/W") if n in term)).dtype
    if factored:
        stacked = stack(wide, weights)
        out, inner = stacked[f"{site}/B"].shape[0], stacked[f"{site}/A"].shape[1]
        if stacked[f"{site}/A"].shape[0] <= min(out, inner):
            return {name: value.to(dtype) for name, value in stacked.items()}
    dense = sum((weight * product(term, site) for weight, term in zip(weights, wide, strict=True)), torch.zeros(()))
    right, left = _exact(dense, torch.finfo(dtype).eps)
    one = torch.ones((), dtype=dtype)
    return {f"{site}/A": right.to(dtype), f"{site}/B": left.to(dtype), f"{site}/scale": one}


def _exact(dense: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """(A, B) with B A = dense up to a relative Frobenius error of ``rounding``; at least rank 1.

    B holds eigenvectors of dense dense^T (of the smaller side), A = B^T dense: a projection, whose error is what is
    left out however inexact the eigenvectors are, at a small part of an SVD's time.
    """
    if dense.shape[0] > dense.shape[1]:
        right, left = _exact(dense.T, rounding)
        return left.T, right.T
    vectors: Tensor = linalg.eigh(dense @ dense.T)[1].flip(1)
    rows = vectors.T @ dense
    tail = rows.square().sum(1).flip(0).cumsum(0).flip(0).sqrt()  # tail[k]: what is lost by keeping k
    kept = max(1, int((tail > rounding * float(tail[0])).sum()))
    return rows[:kept], vectors[:, :kept]


def change(model: Model) -> dict[str, Tensor]:
    """The dense change of every site's weight, (out, in), float64; the errors of ``flatten``."""
    tree = flatten(model)
    return {site: product({n: v.double() for n, v in tree.items()}, site) for site in sites(tree)}


# -- PEFT's format


def to_peft(model: Model, base: Base, start: Tree | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, adapter_model.safetensors) of a model that is one plain adapter, see ``flatten``.

    ``start`` holds the whole parameters that the base checkpoint does not bring (a new head's seeded start); they are
    saved where the model names no others. Raises ValueError for a model that is not plain.
    """
    tree = {**(start or {}), **flatten(model)}
    ranks = {site: tree[f"{site}/A"].shape[0] for site in sites(tree)}
    scales = {site: float(tree[f"{site}/scale"]) for site in ranks}
    alphas = {site: _whole_number(scales[site] * rank) for site, rank in ranks.items()}
    rank, alpha = _commonest(ranks, 1), _commonest(alphas, 1)
    tensors = {f"{PREFIX}{site}.lora_{factor}.weight": tree[f"{site}/{factor}"] for site in ranks for factor in "AB"}
    values, modules = _saved(tree, base)
    tensors |= {PREFIX + path: value for path, value in values.items()}
    config = {
        "peft_type": "LORA",
        "task_type": base.task,
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(site in base.transposed for site in ranks),
        "target_modules": sorted(ranks) or NO_SITES,
        "rank_pattern": {_anchored(site): r for site, r in ranks.items() if r != rank},
        "alpha_pattern": {_anchored(site): a for site, a in alphas.items() if a != alpha},
        "modules_to_save": modules or None,
    }
    return config, {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def _saved(tree: Tree, base: Base) -> tuple[dict[str, Tensor], list[str]]:
    """All values of all modules that PEFT will replace, by path, and the modules to name.

    PEFT replaces every module whose path *ends* with a name it is given, and wants each of its values in the file: what
    the tree does not hold comes from the base. A tied parameter is saved under each of its paths, since PEFT's copies
    are no longer tied.
    """
    values = {base.path(n): v for n, v in whole(tree).items() if not n.startswith(PRIVATE)}
    values |= {alias: value for path, value in list(values.items()) for alias in base.aliases(path)}
    modules = sorted({base.module(path) for path in values})
    for path, own in base.values.items():
        if any(parent.endswith((*modules, *base.replaced)) for parent in _parents(path)):
            values.setdefault(path, own)
    return values, modules


def _anchored(site: str) -> str:
    """A pattern of PEFT's that matches this path only: its patterns otherwise match any path that ends so."""
    return "^" + re.escape(site)


def _whole_number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _commonest(values: Mapping[str, Any], default: Any) -> Any:
    return Counter(values.values()).most_common(1)[0][0] if values else default


# Settings of PEFT's LoRA that change what an adapter computes, and the values under which they do not.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": (),
    "trainable_token_indices": (),
    "target_parameters": ([],),
    "alora_invocation_tokens": (),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "kasa_config": (),
    "megatron_config": (),
    "arrow_config": (),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # the others change the base's weights
}


def from_peft(config: Mapping[str, Any], tensors: Tree, head: str = "head", place: str = "the adapter") -> Tree:
    """The tree of a PEFT LoRA: A, B and scale (alpha / r, or alpha / sqrt(r) with ``use_rslora``) per site.

    Saved modules become ``head/...`` (those under the path ``head``), ``embedding/...`` (matrices) or ``norm/...``.
    UserError: another method than LoRA, or a variant whose result A, B and a scale do not give.
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"{place}: peft_type is {config.get('peft_type')!r}", "only PEFT's LORA adapters can be read")
    for key, harmless in REFUSED.items():
        value = config.get(key)
        if value is not None and value not in harmless:
            raise UserError(f"{place}: {key} = {value!r} cannot be read", "give a plain LoRA adapter without it")
    tree: dict[str, Tensor] = {}
    for name, value in tensors.items():
        path = name.removeprefix(PREFIX)
        if found := re.fullmatch(r"(.+)\.lora_([AB])\.weight", path):
            tree[f"{found[1]}/{found[2]}"] = value
        elif ".lora_" in path:
            raise UserError(f"{place}: {name} is not a factor of a linear layer", "give an adapter of linear layers")
        elif path.startswith(f"{head}."):
            tree[f"head/{path.removeprefix(f'{head}.')}"] = value
        else:
            tree[f"{'embedding' if value.dim() > 1 else 'norm'}/{path}"] = value
    for site in sorted({name[:-2] for name in tree if name.endswith(("/A", "/B"))}):
        tree[f"{site}/scale"] = _scale(config, tree, site, place)
    return tree


def _scale(config: Mapping[str, Any], tree: Tree, site: str, place: str) -> Tensor:
    right, left = tree.get(f"{site}/A"), tree.get(f"{site}/B")
    rank = _looked_up(config.get("rank_pattern"), site, config.get("r"))
    alpha = _looked_up(config.get("alpha_pattern"), site, config.get("lora_alpha"))
    if right is None or left is None or right.dim() != 2 or left.dim() != 2:
        raise UserError(f"{place}: {site} lacks lora_A or lora_B, or they are not matrices", "export it again")
    if not right.shape[0] == left.shape[1] == rank:
        shapes = f"lora_A {tuple(right.shape)}, lora_B {tuple(left.shape)}"
        raise UserError(f"{place}: {site} has {shapes}, but {CONFIG} says rank {rank}", "use matching files")
    scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return torch.tensor(scale, dtype=torch.promote_types(right.dtype, torch.float32))  # halves would round it


def _looked_up(patterns: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the path ends with, at a dot."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", site)), default)


# -- files


@contextmanager
def replacing(folder: str | os.PathLike[str]) -> Generator[Path]:
    """A new folder to write into; on success it is flushed to disk and takes the place of ``folder`` by a rename."""
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    for left_over in (fresh, old):
        shutil.rmtree(left_over, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write(folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Tree) -> None:
    """Writes the two files of an adapter into a folder that exists or not, whole or not at all per file."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    safe.save_file(dict(tensors), path / f"{WEIGHTS}.new", metadata={"format": "pt"})
    os.replace(path / f"{WEIGHTS}.new", path / WEIGHTS)
    (path / f"{CONFIG}.new").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(path / f"{CONFIG}.new", path / CONFIG)


def read(folder: str | os.PathLike[str], head: str = "head") -> dict[str, Tensor]:
    """The tree of a PEFT LoRA folder, see ``from_peft``; UserError names the file that is missing or unreadable."""
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: no {CONFIG}", "name the folder of a PEFT adapter")
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path}: no {WEIGHTS}", "save the adapter with safe_serialization=True (never pickle)")
    try:
        config = json.loads((path / CONFIG).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path / CONFIG}: not readable as JSON: {error}", "save the adapter again") from None
    try:
        tensors: dict[str, Tensor] = safe.load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / WEIGHTS}: not readable as safetensors: {error}", "save the adapter again") from None
    return dict(from_peft(config, tensors, head, str(path)))


def fit_to(tree: Tree, shapes: Mapping[str, tuple[int, int]], place: str) -> None:
    """UserError unless every site of an imported tree is one of the run's, (out, in), with its shape."""
    for site in sites(tree):
        own = (tree[f"{site}/B"].shape[0], tree[f"{site}/A"].shape[1])
        if site not in shapes:
            known = ", ".join(sorted(shapes)[:3])
            raise UserError(f"{place}: it adapts {site!r}, which this run does not (it has {known}, ...)", _REMEDY)
        if own != tuple(shapes[site]):
            raise UserError(f"{place}: {site} is {own[0]} x {own[1]}, the model's is {shapes[site]}", _REMEDY)


def whole_of(tree: Tree, shapes: Mapping[str, Shape], base: Base, place: str) -> dict[str, Tensor]:
    """The whole parameters of an imported tree, without those that only repeat the base or a tied one of the tree.
    UserError for any that is none of the run's, which nothing would read, or that has another shape."""
    found = {name: value for name, value in whole(tree).items() if name in shapes}
    for name, value in found.items():
        if tuple(value.shape) != tuple(shapes[name]):
            both = f"{tuple(value.shape)}, the run's is {tuple(shapes[name])}"
            raise UserError(f"{place}: {name} is {both}", "use an adapter of this base model and of as many labels")
    for name, value in whole(tree).items():
        path = base.path(name)
        tied = [other for key, other in found.items() if base.path(key) in base.aliases(path)]
        known = tied or [base.values[path]] if path in base.values else []
        if name not in found and not any(_alike(value, other) for other in known):
            raise UserError(
                f"{place}: it brings its own {path!r}, which this run does not train",
                "set head, norm or embedding in [adapter.extras] to what trains it, or give an adapter without it",
            )
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two values are the same in bfloat16: bases are loaded in several types."""
    return a.shape == b.shape and torch.equal(a.cpu().bfloat16(), b.cpu().bfloat16())


_REMEDY = "use an adapter of this base model, or set [adapter] targets and layers to the layers that it adapts"
