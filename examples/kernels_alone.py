"""The operators in another vision graph network, without fer_models: `python kernels_alone.py`."""

import time

import torch
from torch import Tensor, nn

import fer_kernels


class GraphBlock(nn.Module):
    """Max-relative graph convolution with relation weights: two operators and three linear layers."""

    def __init__(self, dim: int, k: int, dilation: int, heads: int = 4) -> None:
        super().__init__()
        self.k, self.dilation = k, dilation
        self.norm = nn.LayerNorm(dim)
        self.p, self.q = nn.Linear(dim, dim // 4), nn.Linear(dim, dim // 4)
        self.a = nn.Parameter(torch.zeros(heads, dim // 4 // heads))  # zero: plain max-relative at first
        self.out = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (B, N, k) neighbours of each node among all nodes; the N x N distances are never in memory
        idx = fer_kernels.dilated_knn(h, k=self.k, dilation=self.dilation)
        # max over neighbours of weight * (h_j - h_i); backward needs no (B, N, k, C) tensor either
        m = fer_kernels.relation_aggregate(h, idx, p=self.p(h), q=self.q(h), a=self.a)
        return x + self.out(torch.cat([h, m], -1))


class GraphNetwork(nn.Module):
    def __init__(self, dim: int = 96, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, stride=8)
        self.blocks = nn.Sequential(*(GraphBlock(dim, k=9, dilation=1 + i // 2) for i in range(depth)))
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        nodes = self.patches(images).flatten(2).mT
        return self.head(self.blocks(nodes).mean(1))


def step_seconds(model: nn.Module, images: Tensor, backend: str) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        with fer_kernels.use_backend(backend):
            model(images).square().mean().backward()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    torch.manual_seed(0)
    model, images = GraphNetwork(), torch.randn(8, 3, 112, 112)
    with torch.no_grad(), fer_kernels.use_backend("reference"):
        expected = model(images)
    with torch.no_grad():
        print(f"largest difference from the reference: {float((model(images) - expected).abs().max()):.1e}")
    ours, reference = step_seconds(model, images, "auto"), step_seconds(model, images, "reference")
    print(f"a training step: {ours * 1e3:.1f} ms, on the reference {reference * 1e3:.1f} ms")
