"""Files that ship with the package."""

from pathlib import Path


def embedded_lm() -> Path:
    """Folder of the embedded causal language model, ready for `AutoModelForCausalLM.from_pretrained`.

    >>> (embedded_lm() / "config.json").is_file()
    True
    """
    return Path(__file__).parent / "lm"
