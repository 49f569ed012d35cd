"""The frozen base: one forward pass with adapters on it, and what its parameters are."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode
from transformers import PreTrainedModel

from fedlora.adapters.inject import embeddings, norms, remove
from fedlora.adapters.lora import LaneLinear, Plan, applied
from fedlora.federation.spec import Extras, ModelSpec, Tree
from fedlora.learning.checkpointing import checkpointable, checkpointed, surrounded
from fedlora.learning.packing import Known, Layers, Packing, below, packable, packed
from fedlora.learning.pooled import hidden_size, masked_mean
from fedlora.learning.prefix import Prefix
from fedlora.learning.prepacked import Prepacked, using
from fedlora.learning.sources import Kind, joined, linear, move, put

LONG = {torch.float32: 256, torch.float64: 256, torch.bfloat16: 512}
"""Tokens from which SDPA is faster on a CPU, backwards too, than attention by plain products."""


@dataclass(eq=False)
class Backbone:
    """A frozen model in evaluation mode with a LaneLinear at every adapted site.

    ``module``: the whole model; for classification its head is taken off (``head``, at ``head_path``), so that what it
    calls logits are the features; where a common width is asked for and its own is another, a linear map to that width
    is in the head's place. ``processor``: its tokenizer or image processor (None for a module of one's own);
    ``prepacked``: layers whose weights lie twice.
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
    unpadded: bool = True
    prepacked: Sequence[Prepacked] = ()

    def __post_init__(self) -> None:
        self.module.requires_grad_(False).eval()
        self._layers = list(self.sites.values())
        self._stack = self._packable()
        self._configs = [m.config for m in self.module.modules() if isinstance(m, PreTrainedModel)]
        self._attention = ""
        self._prefix: Prefix | None = None
        self._checkpointed: list[nn.Module] = []

    @property
    def dtype(self) -> torch.dtype:
        """The type that the base computes in."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Backbone:
        """Moves the base in place. The head's own values stay as loaded."""
        move(self.module, dtype, device)
        self.remember(0 if self._prefix is None else self._prefix.limit)
        return self

    def remember(self, limit: int) -> None:
        """Keeps what the layers below the first adapter say of each text, in at most so many bytes (0: nothing). Only
        where sequences run without their padding; what was kept before is forgotten."""
        depth = 0 if self._stack is None else self._stack.depth(self.sites)
        self._prefix = Prefix(depth, limit) if limit and depth else None

    def checkpoint(self) -> None:
        """From now on layers keep their inputs only, and are computed again for gradients: the same numbers in less
        memory. UserError where a model has no layers of which this is known."""
        self._checkpointed = checkpointable(self.module, self.name)

    # -- one pass

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        plan: Plan | None = None,
        overrides: Mapping[str, Tensor] | None = None,
        together: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(features (examples, width), logits (examples, tokens, vocabulary) of a language model, else None).

        ``overrides``: values by parameter path that replace the base's own, differentiably; ``together``: the lanes'
        factors meet all rows in one product (``Plan.together`` says when they may).
        """
        self._attend(inputs)
        replaced = {self._actual[path]: value for path, value in (overrides or {}).items()}
        with self._adapted(inputs, plan, together, replaced):
            if self.kind == "causal-lm":
                return self._language(inputs, replaced)
            out = self._call(inputs, replaced)
        return (out.logits if hasattr(out, "logits") else out), None

    @contextmanager
    def _adapted(
        self, inputs: Mapping[str, Tensor], plan: Plan | None, together: bool, replaced: Mapping[str, Tensor]
    ) -> Generator[None]:
        """The adapted layers follow the plan, on packed tokens where this model and batch allow it."""
        found, together = None, together and plan is not None and len(plan.segments) > 1
        if "input_ids" in inputs and self.packs(inputs["input_ids"].shape[1]):
            found = cast(Layers, self._stack).packing(inputs["attention_mask"], self.dtype, together)
        with ExitStack() as stack:
            stack.enter_context(using(self.prepacked))
            if found is not None:
                lower = None if replaced else self._lower(inputs, found)
                stack.enter_context(packed(cast(Layers, self._stack), found, lower))
                plan = None if plan is None else found.plan(plan)
            if plan is not None and together:
                plan = plan.together(self.dtype, self.device)
            stack.enter_context(applied(self._layers, plan))
            if self._checkpointed:
                now = [(config, config._attn_implementation) for config in self._configs]
                as_here = (partial(using, self.prepacked), partial(applied, self._layers, plan))
                again = partial(surrounded, self.module, replaced, now, as_here)
                stack.enter_context(checkpointed(self._checkpointed, again))
            yield

    def _lower(self, inputs: Mapping[str, Tensor], found: Packing) -> Known | None:
        """What the layers below the first adapter say of a batch; None where nothing is kept. Whoever counts operations
        sees a whole pass, whatever was known, and the numbers are the same."""
        prefix = self._prefix
        if prefix is None:
            return None
        lengths = np.diff(found.starts)
        read = [value.cpu().numpy() for name, value in inputs.items() if name != "attention_mask"]  # segments too
        texts = [b"".join(value[row, :length].tobytes() for value in read) for row, length in enumerate(lengths)]

        def alone(row: int) -> Tensor:
            own = {name: value[row : row + 1, : int(lengths[row])] for name, value in inputs.items()}
            return below(cast(Layers, self._stack), prefix.depth, self.dtype, own, partial(self._call, own, {}))

        counted = is_in_torch_dispatch_mode()
        with _disable_current_modes():
            known = found.joined(prefix.rows(texts, alone))
        return Known(prefix.depth, known, counted)

    def packs(self, longest: int) -> bool:
        """Whether sequences of at most this length run without their padding."""
        return longest <= self.limit

    @property
    def limit(self) -> int:
        """The longest sequence that runs without its padding (0: none does): of a known model, short ones on a CPU, any
        on a GPU whose kernel takes them, but none for which attention slides."""
        if self._stack is None or not self.unpadded or not self.switching:
            return 0
        most = LONG.get(self.dtype, 1) - 1
        if self.device.type != "cpu":
            most = sys.maxsize if self.by_ends else 0
        return min(most, self._stack.window)

    def short(self, longest: int) -> bool:
        """Whether padded sequences of this length are attended to by plain products: on a CPU, where SDPA is slower.
        Never in float64: what masks there is beyond float32, in which models' own products compute their weights, and
        a row of masks alone would be no number."""
        wide = self.dtype == torch.float64
        return self.device.type == "cpu" and not wide and longest < LONG.get(self.dtype, 0)

    @property
    def by_ends(self) -> bool:
        """Whether attention takes sequences that lie end to end."""
        return self._stack is not None and self._stack.by_ends(self.device, self.dtype)

    def _packable(self) -> Layers | None:
        """The layers that can be packed, if every adapted layer is in one of them."""
        found = packable(self.module)
        inside = found is not None and all(site.startswith(f"{found.path}.") for site in self.sites)
        return found if inside else None

    def _language(self, inputs: Mapping[str, Tensor], replaced: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        seen: list[Tensor] = []
        output: nn.Module = self.module.get_output_embeddings()  # type: ignore[operator]
        handle = output.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        try:
            out = self._call({**inputs, "use_cache": False}, replaced)  # type: ignore[dict-item]
        finally:
            handle.remove()
        return masked_mean(seen[0], inputs["attention_mask"]), out.logits

    def _call(self, inputs: Mapping[str, Any], replaced: Mapping[str, Tensor]) -> Any:
        named = isinstance(self.module, PreTrainedModel)
        args, kwargs = ((), dict(inputs)) if named else (tuple(inputs.values()), {})
        if not replaced:
            return self.module(*args, **kwargs)
        return torch.func.functional_call(self.module, dict(replaced), args, kwargs)

    def _attend(self, inputs: Mapping[str, Tensor]) -> None:
        """Eager attention for short sequences on a CPU; else SDPA."""
        if not self.switching or "input_ids" not in inputs:
            return
        wanted = "eager" if self.short(inputs["input_ids"].shape[1]) else "sdpa"
        if wanted != self._attention:
            for config in self._configs:
                config._attn_implementation = wanted
            self._attention = wanted

    @contextmanager
    def replaced(self, overrides: Mapping[str, Tensor]) -> Generator[None]:
        """The base's own parameters hold other values inside the block (for passes that are not differentiated)."""
        own = {path: self.module.get_parameter(self._actual[path]) for path in overrides}
        kept = {path: parameter.data for path, parameter in own.items()}
        prefix, self._prefix = self._prefix, None
        try:
            for path, parameter in own.items():
                parameter.data = overrides[path].detach()
            yield
        finally:
            self._prefix = prefix
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
        that rank (None: the rank itself, a scale of 1). Norms and embeddings, or the whole base, are named where
        ``extras`` trains them."""
        extras = Extras() if extras is None else extras
        largest = dict.fromkeys(self.sites, ranks) if isinstance(ranks, int) else {s: ranks[s] for s in self.sites}
        values: dict[str, Tensor] = {}
        whole: dict[str, tuple[int, ...]] = {}
        if self.head is not None:
            for name, value in self.head.named_parameters():
                whole[f"head/{name}"] = tuple(value.shape)
                if self.head_fits:
                    values[f"head/{name}"] = value.detach().clone()
        everything = extras.backbone != "frozen"
        if everything:
            values |= self.own(("backbone",))
        for kind, found in () if everything else (("norm", norms), ("embedding", embeddings)):
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
            pretrained={name: value.to(dtype) for name, value in values.items()},
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the base weights, rounded to bfloat16: it does not depend on the type that is computed in."""
        digest = hashlib.sha256()
        for path in sorted(self._actual):
            value = self.parameter(path)
            digest.update(f"{path}{tuple(value.shape)}".encode())
            rounded = value.to("cpu", torch.bfloat16) if value.is_floating_point() else value.cpu()
            digest.update(rounded.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def plain(self, values: Tree | None = None) -> nn.Module:
        """A copy of the model as it was loaded: no adapted layers, its head in place (for export).

        ``values``: ``backbone/...`` and ``head/...`` entries to put in. A map to a common width and the head after it
        become one linear head.
        """
        values = values or {}
        model = copy.deepcopy(self.module)
        dtype = next((value.dtype for key, value in values.items() if key.startswith("backbone/")), self.dtype)
        move(model, dtype, None)  # trained values are wider than a base in bfloat16
        with torch.no_grad():
            for key, value in values.items():
                if (path := self.reads(key)) is not None:
                    model.get_parameter(self._actual[path]).copy_(value)
        remove(model)
        if self.head is not None:
            head = {name: values.get(f"head/{name}", value) for name, value in self.head.named_parameters()}
            found = model.get_submodule(self.head_path)
            layer = joined(found, head) if isinstance(found, nn.Linear) else linear(head["weight"], head.get("bias"))
            put(model, self.head_path, layer.to(self.device, dtype))
        return model
