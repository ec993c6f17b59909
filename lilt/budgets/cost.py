"""What one training step costs: matmul FLOPs and the bytes kept for backward, from a real step on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lilt.budgets.counter import Counter
from lilt.model import TwoTower
from lilt.towers import ImageContract, Inputs, Tower
from lilt.towers.tokenizer import FixedTokenizer


@dataclass(frozen=True)
class Cost:
    """FLOPs of the matrix products of forward and backward, and bytes that autograd keeps between the two."""

    flops: int
    saved_bytes: int


def meta_batch(vision: Tower, text: Tower, pairs: int, text_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a batch on the meta device: images (B, 3, H, W) and token tensors (B, L).

    L is text_tokens or the tower's context where that is shorter; open_clip's towers always take their whole context.
    """
    image, caption = vision.example(), text.example()
    assert isinstance(image, Tensor) and isinstance(caption, dict) and not isinstance(text.contract, ImageContract)
    length = min(text_tokens, text.contract.context_tokens)
    if isinstance(text.contract, FixedTokenizer):
        length = caption["input_ids"].shape[1]
    tokens = {key: torch.empty(pairs, length, dtype=value.dtype, device="meta") for key, value in caption.items()}
    return torch.empty(pairs, *image.shape[1:], device="meta"), tokens


def step_cost(core: TwoTower, images: Tensor, tokens: Inputs, counter: Counter | None = None) -> Cost:
    """Run forward and backward of a contrastive step in training mode and count.

    Backward runs only to the shallowest trained tensor, as in training. Each storage that autograd keeps counts once;
    parameters and buffers, which are there anyway, do not count. One counter handed on from step to step saves time.
    """
    counter = counter or Counter()
    before = counter.flops
    resident = {tensor.untyped_storage()._cdata for tensor in (*core.parameters(), *core.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storage keeps its address from being given again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in resident:
            kept[storage._cdata] = storage
        return tensor

    core.train()
    with fused_kernels(), counter:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            out = core(images, tokens)
            logits = out.scale * out.image @ out.text.T
            rows = torch.arange(len(logits), device=logits.device)
            loss = F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)
        loss.backward()
    return Cost(counter.flops - before, sum(storage.nbytes() for storage in kept.values()))


@contextlib.contextmanager
def fused_kernels() -> Iterator[None]:
    """Let attention and dropout on meta save what an accelerator's kernels save.

    Left alone, torch takes the unfused attention there, which keeps the weights (B, H, L, L) that fused ones do not.
    """
    attention, dropout = F.scaled_dot_product_attention, F.dropout
    F.scaled_dot_product_attention = partial(_attention, attention)  # type: ignore[misc, assignment]
    F.dropout = partial(_dropout, dropout)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = attention, dropout  # type: ignore[misc]


def _attention(
    other: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not query.is_meta or query.ndim != 4 or query.shape[-1] != value.shape[-1]:
        more = {"scale": scale, "enable_gqa": enable_gqa}
        return other(query, key, value, attn_mask, dropout_p, is_causal, **more)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    if attn_mask is not None and attn_mask.requires_grad:  # a learned bias: the other kernel has a gradient for it
        bias = attn_mask.expand(*query.shape[:3], key.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _dropout(
    other: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if input.is_meta and training and 0 < p < 1:
        return torch.native_dropout(input, p, True)[0]
    return other(input, p, training, inplace)
