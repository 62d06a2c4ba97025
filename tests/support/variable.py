"""Networks with axes of any size, and with state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Encoder(nn.Module):
    """``tokens: int64 [N, T] -> {each: [N, T, 20], halves: [N, (T + 1) // 2], whole: [N, 16]}``, T up to 64.

    One attention head over embeddings with positions; vocabulary 20.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, width)
        self.places = nn.Parameter(torch.randn(64, 1))
        self.mix = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, 20)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(tokens) + self.places[: tokens.shape[1]]
        query, key, value = self.mix(x).chunk(3, -1)
        scores = torch.softmax(query @ key.transpose(1, 2) / key.shape[-1] ** 0.5, -1)
        x = x + scores @ value
        return {"each": self.dense(x), "halves": x[:, ::2].mean(-1), "whole": x.mean(1)}


class Both(nn.Module):
    """Gives what a function of two tensors gives."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.function(a, b)


class Resizer(nn.Module):
    """``image: [N, 3, H, W] -> map: [N, 4, H, W]``, both cut to a multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 4, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(image))


class Cells(nn.Module):
    """``x: [N, T, 4], h, c: [N, 1, 8] -> (scores: [N, T, 3], (h_next, c_next: [N, 1, 8]))``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells = nn.LSTM(4, 8, batch_first=True)
        self.dense = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, (h, c) = self.cells(x, (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()))
        return self.dense(y), (h.transpose(0, 1), c.transpose(0, 1))
