"""Make the embedded language model: `python scripts/pretrain`."""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin at barriers cost others, and us, a core

import card
import corpus
import model as lm
import ngram
import numpy as np
import torch

from fedlora.assets import embedded_lm
from fedlora.data.packages import available, sources

VOCABULARY = 4096
CODE_BYTES = 30_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=embedded_lm(), help="folder to write")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of 4 windows of 512 tokens")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end the schedule after this time at the latest"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    plan = lm.Training(steps=options.steps, minutes=options.minutes)

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
    steps, seconds = lm.train(model, train, plan, options.seed, lambda: lm.save(model, tokenizer, options.out))
    lm.save(model, tokenizer, options.out)
    say(f"trained {steps} steps in {seconds:.0f} s")
    model = lm.load(options.out).to(options.device)  # what is measured is what was saved

    baseline = ngram.bits(ngram.fit(np.concatenate(train)), validation, VOCABULARY)
    code = {name: code_stream(name, tokenizer, options.seed) for name in available()}
    measured = {
        "docstrings": lm.bits_per_byte(lm.bits(model, validation)[-len(baseline) :], validation, sizes),
        "docstrings_5gram": lm.bits_per_byte(baseline, validation, sizes),
        "code": {name: lm.bits_per_byte(lm.bits(model, stream), stream, sizes) for name, stream in code.items()},
    }
    facts = {
        "command": f"python scripts/pretrain --steps {plan.steps} --minutes {plan.minutes:g} --seed {options.seed}",
        "seed": options.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {
            **vars(plan),
            "steps": steps,
            "minutes": None,
            "context": lm.CONTEXT,
            "seconds": round(seconds),
            "device": options.device,
        },
        "tokens": {
            "train": tokens,
            "validation": len(validation),
            "seen": steps * plan.batch * lm.CONTEXT,
        },
        "bits_per_byte": measured,
        "held_out": available(),
        "packages": texts.licences,
    }
    (options.out / "pretraining.json").write_text(json.dumps(facts, indent=1) + "\n")
    (options.out / "README.md").write_text(card.render(facts))
    say(json.dumps(measured, indent=1))


def code_stream(package: str, tokenizer: lm.Tokenizer, seed: int) -> np.ndarray:
    """About 30 kB of a code base's files, drawn at random, as one token stream."""
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
