"""Small models whose landscape is known, and data for them."""

import torch
from torch import nn


class Quadratic(nn.Module):
    """A batch is matrices H; the loss is the mean of ½·θᵀHθ over them."""

    def __init__(self, at):
        super().__init__()
        self.theta = nn.Parameter(at.clone())

    def forward(self, H):
        flat = self.theta.reshape(-1)
        return 0.5 * torch.einsum("i,nij,j->n", flat, H, flat)


def quadratic_loss(model, H):
    return model(H).mean()


def quadratic_data(size=12, examples=10, seed=0):
    """Symmetric matrices, their mean, and ragged batches of them."""
    H = torch.randn(examples, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    H = H @ H.mT
    return H.mean(0), list(H.split([4, 3, 2, 1]))


def quadratic(seed=1):
    return Quadratic(torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


LINE, ONES = nn.Linear(2, 1), [torch.ones(2, 2)]
