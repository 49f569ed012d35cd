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
    """What the optimisers do: Muon for the matrices, AdamW for the rest, both warmed up and taken down by a cosine.

    Muon needs about a third of the tokens AdamW needs here. `minutes` ends the schedule early on a slow machine.
    """

    steps: int
    minutes: float = math.inf
    batch: int = 4
    lr_matrices: float = 0.02
    lr_others: float = 3e-3
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
    """A Llama of 4 layers, width 192, 3 heads, tied embeddings: 2.6 M parameters with 4096 tokens."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
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
) -> tuple[int, float]:
    """Train in place on packed windows; returns the steps and the seconds it took."""
    device, began, step, smooth = model.device, time.perf_counter(), 0, 0.0
    optimizers = _optimizers(model, plan)
    windows = _windows(documents, plan.batch, np.random.default_rng(seed))
    with tqdm(total=plan.steps, mininterval=20, desc="pretraining") as bar:
        while (progress := max(step / plan.steps, (time.perf_counter() - began) / 60 / plan.minutes)) < 1:
            ids = torch.from_numpy(next(windows)).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
            loss = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * _schedule(progress, plan.warmup)
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            smooth += (loss.item() - smooth) * max(0.02, 1 / step)
            bar.set_postfix(loss=f"{smooth:.3f}", progress=f"{progress:.1%}", refresh=False)
            bar.update()
            if step % plan.checkpoint_every == 0:
                checkpoint()
    return step, time.perf_counter() - began


def _optimizers(model: LlamaForCausalLM, plan: Training) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    return [
        torch.optim.Muon([{"params": matrices, "peak": plan.lr_matrices}], weight_decay=plan.weight_decay),
        torch.optim.AdamW(
            [{"params": others, "peak": plan.lr_others}], betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def _schedule(progress: float, warmup: float) -> float:
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _windows(documents: list[Ints], batch: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Batches (batch, CONTEXT + 1) of the shuffled, packed documents, epoch after epoch."""
    while True:
        stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        starts = rng.permutation(np.arange(0, len(stream) - CONTEXT, CONTEXT))
        for at in range(0, len(starts) - batch + 1, batch):
            yield np.stack([stream[start : start + CONTEXT + 1] for start in starts[at : at + batch]])


@torch.no_grad()
def bits(model: LlamaForCausalLM, stream: Ints) -> NDArray[np.float64]:
    """-log2 p of every token of the stream but the first, shape (len(stream) - 1,).

    Windows overlap by half, so that a token is predicted from at least CONTEXT / 2 tokens once there are as many.
    """
    found = np.zeros(len(stream) - 1)
    scored = 0
    for start in range(0, len(stream) - 1, CONTEXT // 2):
        window = torch.from_numpy(stream[start : start + CONTEXT + 1]).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(window[None, :-1], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="none").double().cpu().numpy()
        found[scored : start + len(losses)] = losses[scored - start :] / math.log(2)
        scored = start + len(losses)
        if scored == len(found):
            break
    return found


def bits_per_byte(bits_per_token: NDArray[np.float64], stream: Ints, sizes: Ints) -> float:
    """Bits of the stream's last tokens, as many as are given, by their bytes; special tokens are not scored."""
    counted = sizes[stream[len(stream) - len(bits_per_token) :]]
    return float(bits_per_token[counted > 0].sum() / counted.sum())


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
