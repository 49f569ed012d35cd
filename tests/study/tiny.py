"""A tiny encoder and a tiny language model as folders, and a user's files: what the command line is tried on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
import torch
import transformers

TOPICS = {
    "animals": ["cat", "dog", "horse", "goat", "hen"],
    "tools": ["saw", "drill", "axe", "file", "rasp"],
    "fruit": ["plum", "pear", "fig", "lime", "grape"],
}
FILLERS = ["the", "a", "one", "some", "sees", "takes", "near", "old", "new", "big"]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer that knows the words above."""
    words = ["[PAD]", "[UNK]", "<s>", "</s>", *FILLERS, *(word for topic in TOPICS.values() for word in topic), "?"]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )


def encoder(folder: Path) -> Path:
    """A random BERT of two layers."""
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    return _saved(transformers.BertModel, config, folder)


def language_model(folder: Path) -> Path:
    """A random Llama of two layers."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return _saved(transformers.LlamaForCausalLM, config, folder)


def _saved(cls: type, config: transformers.PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = cls(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentence(rng: random.Random, topic: str) -> str:
    """Words around one of the topic's."""
    words = [rng.choice(FILLERS) for _ in range(rng.randint(1, 4))]
    words.insert(rng.randint(0, len(words)), rng.choice(TOPICS[topic]))
    return " ".join(words)


def reviews(file: Path, rows: int = 240, seed: int = 0) -> Path:
    """JSONL with text, label and hospital."""
    rng = random.Random(seed)
    with file.open("w") as out:
        for i in range(rows):
            topic = rng.choice(sorted(TOPICS))
            row = {"text": sentence(rng, topic), "label": topic, "hospital": f"St. {'ABC'[i % 3]}/ward {i % 2}"}
            out.write(json.dumps(row) + "\n")
    return file


def run_file(folder: Path, **sections: str) -> Path:
    """The smallest run file on the files above; sections add lines."""
    model = encoder(folder / "model")
    data = reviews(folder / "mine.jsonl")
    parts = {
        "model": f'name = "{model.name}"\ntask = "text-classification"\ndtype = "float32"\n',
        "data": f'train = "{data.name}"\ntext = "text"\nlabel = "label"\n',
        "algorithm": 'name = "fedit"\n',
        "engine": "lanes = 2\n",
    }
    for name, lines in sections.items():
        parts[name] = lines if name == "algorithm" else parts.get(name, "") + lines
    file = folder / "my.toml"
    file.write_text("".join(f"[{name}]\n{lines}\n" for name, lines in parts.items()))
    return file
