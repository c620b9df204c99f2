"""Muon, against PyTorch's own on the same matrices."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from export.training.optimizer import OPTIMIZERS, Muon, orthogonal


def layers() -> nn.Sequential:
    """Kernels of two shapes, one of them twice, tall and wide, and biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1))


def learn(network: nn.Module, step: int) -> None:
    """Gradients of that step."""
    network.zero_grad()
    image = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(step))
    network(image).square().mean().backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kernels_move_as_pytorchs_muon_moves_matrices(memory_format: torch.memory_format) -> None:
    network = layers().to(memory_format=memory_format)
    kernels = [p for p in network.parameters() if p.ndim > 1]
    matrices = [nn.Parameter(kernel.detach().clone().flatten(1)) for kernel in kernels]
    ours = Muon(network.parameters(), lr=1e-2)
    reference = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        chance = torch.Generator().manual_seed(step)
        for matrix, kernel in zip(matrices, kernels, strict=True):
            # At random, and so far from singular: there rounding to bf16 decides, in both.
            kernel.grad = torch.randn(kernel.shape, generator=chance)
            matrix.grad = kernel.grad.flatten(1).clone()
        before = [matrix.detach().clone() for matrix in matrices]
        ours.step()
        reference.step()
        for matrix, kernel, old in zip(matrices, kernels, before, strict=True):
            moved = (matrix - old).norm()
            assert moved > 0
            assert (kernel.flatten(1) - matrix).norm() < 0.1 * moved  # both round to bf16
            kernel.data.copy_(matrix.view(kernel.shape))  # or steps would drift apart for that alone


def test_biases_move_as_adam_moves_them() -> None:
    network, other = layers(), layers()
    muon, adam = OPTIMIZERS["muon"](network.parameters(), 1e-2), OPTIMIZERS["adam"](other.parameters(), 1e-2)
    for optimizer, which in ((muon, network), (adam, other)):
        learn(which, 0)
        optimizer.step()
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert (mine.ndim == 1) == torch.equal(mine, theirs)


def test_the_learning_rate_of_the_group_is_that_of_both() -> None:
    network = layers()
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = Muon(network.parameters(), lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    learn(network, 0)
    optimizer.step()
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new)


def test_going_on_from_a_saved_state_is_going_on() -> None:
    network = layers()
    optimizer = Muon(network.parameters(), lr=1e-2)
    learn(network, 0)
    optimizer.step()
    copy = layers()
    copy.load_state_dict(network.state_dict())
    resumed = Muon(copy.parameters(), lr=1e-2)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))  # a load may share tensors
    for which, its_optimizer in ((network, optimizer), (copy, resumed)):
        learn(which, 1)
        its_optimizer.step()
    for mine, theirs in zip(network.parameters(), copy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_has_no_gradient_stays() -> None:
    network = layers()
    learn(network, 0)
    network[1].weight.grad = None
    before = [p.detach().clone() for p in network.parameters()]
    Muon(network.parameters(), lr=1e-2).step()
    same = [torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True)]
    assert same == [name == "1.weight" for name, _ in network.named_parameters()]


@pytest.mark.parametrize("shape", [(1, 8, 40), (3, 40, 8), (2, 16, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_nothing_to_move_is_no_division_by_zero() -> None:
    assert torch.equal(orthogonal(torch.zeros(1, 4, 9)), torch.zeros(1, 4, 9))
