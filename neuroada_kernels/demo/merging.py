"""Merging the adapted model: what changes, what it costs, and that it can be undone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

import neuroada_kernels as nk
from neuroada_kernels.benchmarks.timing import Quartiles, paired_ratio
from neuroada_kernels.demo.training import bits_per_byte
from neuroada_kernels.demo.transformer import Transformer


@dataclass(frozen=True)
class Merged:
    """``cost_*`` is the time of a forward over the plain model's in the same round."""

    largest_logit: float
    largest_difference: float  # of a logit, between merged and unmerged
    loss_unmerged: float  # bits per byte, held out
    loss_merged: float
    changed_weights: int
    unrestored_weights: int  # after unmerging
    cost_merged: Quartiles
    cost_unmerged: Quartiles


@torch.no_grad()
def merge_and_undo(
    adapted: Transformer, plain: Transformer, held_out: Tensor, batch: Tensor, rounds: int
) -> Merged:
    """Merge ``adapted`` and unmerge it; ``plain`` is the model it was adapted from."""
    tokens = batch[:, :-1]
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    logits, loss = adapted(tokens), bits_per_byte(adapted, held_out)
    unmerged_cost = _cost(adapted, plain, tokens, rounds)
    nk.merge(adapted)
    changed = _differing(adapted, before)
    merged_logits, merged_loss = adapted(tokens), bits_per_byte(adapted, held_out)
    merged_cost = _cost(adapted, plain, tokens, rounds)
    nk.unmerge(adapted)
    return Merged(
        largest_logit=float(logits.abs().max()),
        largest_difference=float((merged_logits - logits).abs().max()),
        loss_unmerged=loss,
        loss_merged=merged_loss,
        changed_weights=changed,
        unrestored_weights=_differing(adapted, before),
        cost_merged=merged_cost,
        cost_unmerged=unmerged_cost,
    )


def _differing(model: Transformer, before: dict[str, Tensor]) -> int:
    """Number of elements of parameters that differ from ``before`` in any bit."""
    return sum(
        int((p.view(torch.int32) != before[name].view(torch.int32)).sum())
        for name, p in model.named_parameters()
    )


def _cost(model: Transformer, plain: Transformer, tokens: Tensor, rounds: int) -> Quartiles:
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, rounds):  # the first is a warm-up
        for samples, candidate in zip(seconds, (model, plain), strict=True):
            start = time.perf_counter()
            candidate(tokens)
            if number >= 0:
                samples.append(time.perf_counter() - start)
    return paired_ratio(*seconds)
