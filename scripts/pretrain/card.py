"""The model card, from the facts of the run."""

from typing import Any


def render(facts: dict[str, Any]) -> str:
    """README.md of the model folder, in Markdown."""
    scores, training, tokens = facts["bits_per_byte"], facts["training"], facts["tokens"]
    code = scores["code"]
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in code.items())
    third_party = {k: v for k, v in facts["packages"].items() if "Python standard library" not in v}
    standard = sorted(set(facts["packages"]) - set(third_party))
    licences = "\n".join(f"| {name} | {licence} |" for name, licence in sorted(third_party.items()))
    return f"""---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The embedded language model of fedlora

A Llama-architecture causal language model of {facts["parameters"]:,} parameters (byte-level BPE of 4096 tokens,
context {training["context"]}, float16), trained from nothing on technical English: the docstrings of Python packages,
never their code. It exists so that federated fine-tuning can be tried without a download: it knows English about code
and has still to learn code. It is far too small for anything else.

## Training

| | |
|---|---|
| command | `{facts["command"].strip()}` |
| seed | {facts["seed"]} |
| text | {tokens["train"]:,} training tokens; doctests and code blocks removed, repeated paragraphs dropped |
| steps | {training["steps"]:,} of {training["batch"]} x {training["context"]} tokens: {tokens["seen"]:,} seen |
| optimisers | Muon lr {training["lr_matrices"]} for matrices, AdamW lr {training["lr_others"]} for the rest |
| schedule | warm-up {training["warmup"]:.0%}, then cosine; clip {training["clip"]}; bf16 autocast |
| time | {training["seconds"]:,} s on {training["device"]} |

## Held-out bits per byte

5 % of the files were held out before the tokeniser was trained ({tokens["validation"]:,} tokens). The 5-gram model is
an interpolated modified Kneser-Ney model over the same tokens, counted on the same training text. Our windows overlap
by half; both score the same tokens.

| docstrings | bits per byte |
|---|---|
| this model | {scores["docstrings"]:.3f} |
| 5-gram | {scores["docstrings_5gram"]:.3f} |

Source code of the code bases that are held out entirely (neither code nor docstrings in training; training paragraphs
that repeat theirs were removed), about 30 kB each:

| code base | bits per byte |
|---|---|
{rows}
| **mean** | {sum(code.values()) / len(code):.3f} |

## Data and licences

Docstrings of these packages, with the licence each one's metadata names, and of the Python standard library (PSF-2.0)
without the held-out code bases. Packages under a GPL or LGPL licence were left out.

| package | licence (distribution) |
|---|---|
{licences}

Standard library modules: {", ".join(standard)}.
"""
