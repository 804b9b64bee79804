"""The fp32 Muon optimiser."""

import pytest
import torch

from phi_mm.tiny.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    assert result.dtype == torch.float32
    assert values.min() > 0.4 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.diag(u.T @ result @ v.T).min() > 0.4  # the singular vectors are the same


def test_step_has_the_spectral_norm_of_its_rate():
    weight = torch.nn.Parameter(torch.zeros(64, 16))
    optimizer = Muon([weight], lr=0.1)
    weight.grad = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    largest = torch.linalg.svdvals(weight.detach()).max().item()
    assert largest == pytest.approx(0.1 * 2, rel=0.3)  # sqrt(64 / 16) = 2


def test_fits_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(8, 8, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], lr=0.1)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        (weight - goal).square().sum().backward()
        optimizer.step()
    assert (weight - goal).abs().max() < 0.05


def test_weight_decay_shrinks_without_a_gradient_direction():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.zeros(4, 4)
    Muon([weight], lr=0.5, weight_decay=0.1).step()
    assert torch.allclose(weight, torch.full((4, 4), 0.95))


def test_refuses_vectors():
    with pytest.raises(ValueError, match=r"got a parameter of shape \(3,\), expected a matrix"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
