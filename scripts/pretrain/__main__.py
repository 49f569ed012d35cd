"""Make the embedded language model: `python scripts/pretrain`."""

import argparse
import json
import random
import shlex
import sys
import time
from pathlib import Path

import card
import corpus
import model as lm
import ngram
import numpy as np
import torch

from fedlora.assets import embedded_lm
from fedlora.data.packages import available, sources

VOCABULARY = 4096
CODE_BYTES = 60_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=embedded_lm(), help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help="training steps")
    parser.add_argument("--batch", type=int, default=lm.Training.batch, help="windows of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=lm.Training.lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    plan = lm.Training(steps=options.steps, batch=options.batch, lr=options.lr)

    texts = corpus.collect(options.seed)
    say(f"{len(texts.train)} training files, {len(texts.validation)} held-out files, {len(texts.licences)} packages")
    tokenizer = lm.train_tokenizer([document.text for document in texts.train], VOCABULARY)
    sizes = lm.token_bytes(tokenizer)
    train = lm.encode(tokenizer, [document.text for document in texts.train])
    validation = np.concatenate(lm.encode(tokenizer, [document.text for document in texts.validation]))
    tokens = sum(map(len, train))
    say(f"{tokens} training tokens, {len(validation)} held-out tokens")

    torch.manual_seed(options.seed)
    model = lm.build(VOCABULARY).to(options.device)
    seconds = lm.train(model, train, plan, options.seed, lambda: lm.save(model, tokenizer, options.out))
    lm.save(model, tokenizer, options.out)
    say(f"trained in {seconds:.0f} s")
    model = lm.load(options.out).to(options.device)  # what is measured is what was saved

    counted = ngram.fit(np.concatenate(train))
    start = len(counted)  # the first tokens have no full 5-gram context
    baseline_targets = validation[start - 1 :]
    scored = ngram.bits(counted, validation, VOCABULARY)[sizes[baseline_targets] > 0]
    code = {name: code_stream(name, tokenizer, options.seed) for name in available()}
    measured = {
        "docstrings": lm.bits_per_byte(model, validation, sizes),
        "docstrings_5gram": float(scored.sum() / sizes[baseline_targets].sum()),
        "code": {name: lm.bits_per_byte(model, stream, sizes) for name, stream in code.items()},
    }
    facts = {
        "command": "python scripts/pretrain " + shlex.join(sys.argv[1:]),
        "seed": options.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {**vars(plan), "context": lm.CONTEXT, "seconds": round(seconds), "device": options.device},
        "tokens": {
            "train": tokens,
            "validation": len(validation),
            "seen": plan.steps * plan.batch * lm.CONTEXT,
        },
        "bits_per_byte": measured,
        "held_out": available(),
        "packages": texts.licences,
    }
    (options.out / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")
    (options.out / "README.md").write_text(card.render(facts))
    say(json.dumps(measured, indent=1))


def code_stream(package: str, tokenizer: lm.Tokenizer, seed: int) -> np.ndarray:
    """About 60 kB of a code base's files, drawn at random, as one token stream."""
    files = [text for _, text in sources(package)]
    random.Random(seed).shuffle(files)
    chosen: list[str] = []
    while files and sum(map(len, chosen)) < CODE_BYTES:
        chosen.append(files.pop()[:CODE_BYTES])
    return np.concatenate(lm.encode(tokenizer, chosen))


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


if __name__ == "__main__":
    main()
