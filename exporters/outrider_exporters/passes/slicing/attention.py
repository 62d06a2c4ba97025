"""Attention with fewer heads than ``nn.MultiheadAttention`` can have: it insists on heads that fill its width."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class SlimAttention(nn.Module):
    """Takes the place of ``nn.MultiheadAttention``: same arguments, same answers, any number of heads.

    Attributes:
        heads: how many there are, each of ``head_size`` features; ``heads * head_size`` may be less than the width.
        q, k, v: float32 projections of query, key and value to ``heads * head_size`` features.
        out: from there back to the width.
    """

    # PyTorch's Transformer layers read these to see whether their fused kernel can be used; it cannot.
    in_proj_bias: None = None
    in_proj_weight: None = None
    _qkv_same_embed_dim = False

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads: int = source.num_heads
        self.head_size = source.head_dim
        self.batch_first = source.batch_first
        self.dropout = source.dropout
        biases = (None, None, None) if source.in_proj_bias is None else source.in_proj_bias.detach().chunk(3)
        together: torch.Tensor | None = source.in_proj_weight
        apart = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        weights = apart if together is None else together.chunk(3)
        self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        bias = source.out_proj.bias
        self.out = _linear(source.out_proj.weight, None if bias is None else bias.detach())
        self.train(source.training)

    @property
    def num_heads(self) -> int:
        """As ``nn.MultiheadAttention`` calls it."""
        return self.heads

    def forward(  # noqa: PLR0917  nn.MultiheadAttention's own parameters
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Float32 [N, T, width], or [T, N, width], or [T, width], to the same, and the weights when asked for."""
        single = query.dim() == 2
        batch = 0 if single or self.batch_first else 1
        if single:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q = self._split(self.q(query.transpose(0, batch)))
        k = self._split(self.k(key.transpose(0, batch)))
        v = self._split(self.v(value.transpose(0, batch)))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q)
        mixed, weights = self._attend(q, k, v, mask, causal=causal, need_weights=need_weights)
        answer: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2)).transpose(0, batch)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return answer[0], None if weights is None else weights[0]
        return answer, weights

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        causal: bool,
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        share = self.dropout if self.training else 0.0
        if not need_weights:
            return functional.scaled_dot_product_attention(q, k, v, mask, share, causal), None
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.head_size**-0.5
        weights = functional.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), share)
        return torch.matmul(weights, v), weights

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[N, T, heads * head_size] -> [N, heads, T, head_size]."""
        return x.reshape(*x.shape[:-1], self.heads, self.head_size).transpose(1, 2)

    def _mask(
        self, attention: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor
    ) -> torch.Tensor | None:
        """Both masks as one to be added to the scores. Raises ValueError for a mask that differs from head to head."""
        total = None
        if attention is not None:
            if attention.dim() != 2:
                raise ValueError(f"the attention mask has {attention.dim()} axes, expected [T, S]; heads were removed")
            total = _additive(attention, q)
        if padding is not None:
            added = _additive(padding, q)[:, None, None, :]
            total = added if total is None else total + added
        return total


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask of truth values (true: not looked at) or of numbers, as numbers to be added."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
    return mask.to(like.dtype)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
