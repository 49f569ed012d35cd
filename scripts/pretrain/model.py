"""Tokeniser, network and training loop of the embedded language model."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512
SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BOS, EOS = range(3)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Training:
    """What the optimiser does: `steps` batches of `batch` windows, warm-up, then a cosine to a twentieth of `lr`."""

    steps: int
    batch: int = 8
    lr: float = 3e-3
    warmup: float = 0.04
    weight_decay: float = 0.1
    clip: float = 1.0
    checkpoint_every: int = 500


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE; every encoded text starts with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Ints]:
    """<s> text </s> for each text."""
    return [np.array([*found.ids, EOS], dtype=np.int64) for found in tokenizer.encode_batch(texts)]


def token_bytes(tokenizer: Tokenizer) -> Ints:
    """UTF-8 bytes of each token (a byte-level token has one character a byte), 0 for the special ones."""
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return np.array([0 if piece in SPECIAL else len(piece) for piece, _ in pieces], dtype=np.int64)


def build(vocabulary: int) -> LlamaForCausalLM:
    """A Llama of 4 layers, width 256, 4 heads, tied embeddings: 4.1 M parameters with 4096 tokens."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden (n, d) @ weight.T (v, d) against targets (n,), gradients made on the way.

    Never holds the (n, v) logits: on a CPU they would take half the time of a training step.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        h, w, n = hidden.bfloat16(), weight.bfloat16(), len(targets)
        grad_h, grad_w, loss = torch.empty_like(h), torch.zeros_like(weight), weight.new_zeros(())
        chunk = 256 if hidden.device.type == "cpu" else 8192
        for start in range(0, n, chunk):
            part, y = h[start : start + chunk], targets[start : start + chunk, None]
            logits = (part @ w.T).float()
            normaliser = logits.logsumexp(1, keepdim=True)
            loss += (normaliser - logits.gather(1, y)).sum()
            p = logits.sub_(normaliser).exp_()
            p.scatter_add_(1, y, torch.full_like(p[:, :1], -1.0))
            grad = (p / n).bfloat16()
            grad_h[start : start + chunk] = grad @ w
            grad_w += grad.T @ part
        ctx.save_for_backward(grad_h.to(hidden.dtype), grad_w)
        return loss / n

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_h, grad_w = ctx.saved_tensors
        return grads[0] * grad_h, grads[0] * grad_w, None


def train(
    model: LlamaForCausalLM, documents: list[Ints], plan: Training, seed: int, checkpoint: Callable[[], None]
) -> float:
    """Train in place on packed windows; returns the seconds it took."""
    device = model.device
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=True)
    windows, began, smooth = _windows(documents, plan.batch, np.random.default_rng(seed)), time.perf_counter(), 0.0
    bar = tqdm(range(plan.steps), mininterval=20, desc="pretraining")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * _schedule(step / plan.steps, plan.warmup)
        ids = torch.from_numpy(next(windows)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        loss = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        smooth += (loss.item() - smooth) * max(0.02, 1 / (step + 1))
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if (step + 1) % plan.checkpoint_every == 0:
            checkpoint()
    return time.perf_counter() - began


def bits_per_byte(model: LlamaForCausalLM, stream: Ints, sizes: Ints) -> float:
    """Bits per byte over the windows of a token stream; special tokens are context, not targets."""
    return float(_bits(model, stream)[sizes[targets_of(stream)] > 0].sum() / sizes[targets_of(stream)].sum())


def targets_of(stream: Ints) -> Ints:
    """The tokens `bits_per_byte` scores: all but the first, cut to whole windows where there is one."""
    return stream[1 : 1 + _usable(stream)]


@torch.no_grad()
def _bits(model: LlamaForCausalLM, stream: Ints, batch: int = 16) -> NDArray[np.float64]:
    length = min(CONTEXT, _usable(stream))
    inputs = stream[: _usable(stream)].reshape(-1, length)
    targets = targets_of(stream).reshape(-1, length)
    found: list[NDArray[np.float64]] = []
    for start in range(0, len(inputs), batch):
        ids = torch.from_numpy(inputs[start : start + batch]).to(model.device)
        wanted = torch.from_numpy(targets[start : start + batch]).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none")
        found.append(losses.double().cpu().numpy() / math.log(2))
    return np.concatenate(found)


def _usable(stream: Ints) -> int:
    return (len(stream) - 1) // CONTEXT * CONTEXT or len(stream) - 1


def _windows(documents: list[Ints], batch: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Batches (batch, CONTEXT + 1) of the shuffled, packed documents, epoch after epoch."""
    while True:
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        starts = rng.permutation(np.arange(0, len(stream) - CONTEXT, CONTEXT))
        for at in range(0, len(starts) - batch + 1, batch):
            yield np.stack([stream[start : start + CONTEXT + 1] for start in starts[at : at + batch]])


def _schedule(progress: float, warmup: float) -> float:
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def load(folder: Path) -> LlamaForCausalLM:
    """The saved weights in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Float16 safetensors, tokeniser and configurations that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    copy = build(model.config.vocab_size)
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(folder)
    pad, bos, eos = SPECIAL
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    file = folder / "tokenizer_config.json"  # transformers 5 names a class that transformers 4 does not have
    file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
