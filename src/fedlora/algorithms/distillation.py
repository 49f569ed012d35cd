"""What models that teach each other have in common."""

from __future__ import annotations

from torch import Tensor


def divergence(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    """KL(teacher || student) per example, the teacher a constant; over tokens, the mean over labelled ones.

    Logits (examples, classes), or (examples, tokens, vocabulary) with ``labels`` (examples, tokens), -100: unlabelled.

    >>> import torch
    >>> divergence(torch.zeros(1, 2), torch.tensor([[0.0, 100.0]])).round(decimals=3)   # log 2
    tensor([0.6930])
    """
    target = teacher.detach().log_softmax(-1)
    each = (target.exp() * (target - student.log_softmax(-1))).sum(-1)
    if labels is None or labels.dim() < 2:
        return each
    counted = (labels != -100).to(each.dtype)
    return (each * counted).sum(-1) / counted.sum(-1).clamp_min(1)
