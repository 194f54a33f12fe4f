"""Cross entropy of a product's rows against soft labels, with its gradients found on the way: one pass over the logits,
which are not kept. Algorithm: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quire.speculate.compiled import Compiled


def soft_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_sums: Tensor, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows' cross entropies added up, each times its importance: float32 []; and each row's largest logit, [N].

    hidden [N, K]; weight [V, K] of any float type; labels [N, V], the logits of the wanted distributions, and
    label_sums float32 [N], their log-sum-exps; importance float32 [N]. Differentiable by hidden and weight.
    """
    loss, largest = _SoftEntropy.apply(hidden, weight, labels, label_sums, importance)  # type: ignore[no-untyped-call]
    return loss, largest


class _SoftEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, label_sums: Tensor, importance: Tensor
    ) -> tuple[Tensor, Tensor]:
        factor = weight.to(hidden.dtype)
        entropies, largest, by_logit = _entropies(F.linear(hidden, factor), labels, label_sums, importance)
        ctx.mark_non_differentiable(largest)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(by_logit @ factor, by_logit.T @ hidden)
            ctx.weight_dtype = weight.dtype
        return entropies.sum(), largest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden * gradients[0], by_weight.to(ctx.weight_dtype) * gradients[0], None, None, None


@Compiled
def _entropies(logits: Tensor, labels: Tensor, label_sums: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's cross entropy times its importance, its largest logit, and what the logits change of the former."""
    given = logits.to(torch.float32)
    shares = (labels.to(torch.float32) - label_sums.unsqueeze(1)).exp()
    log_sum = given.logsumexp(-1, keepdim=True)
    entropies = log_sum.squeeze(1) - (shares * given).sum(-1)
    by_logit = ((given - log_sum).exp() - shares) * importance.unsqueeze(1)
    return entropies * importance, given.argmax(-1), by_logit.to(logits.dtype)


@Compiled
def log_sums(logits: Tensor) -> Tensor:
    """float32 [N] of [N, V]."""
    return logits.to(torch.float32).logsumexp(-1)
