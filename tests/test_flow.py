"""The path, the clock, the loss and guidance, against their formulas."""

from __future__ import annotations

import pytest
import torch

from kling.errors import UserError
from kling.flow.guidance import guided_velocity
from kling.flow.loss import flow_loss
from kling.flow.path import to_noise, to_x0, velocity
from kling.flow.time import draw_sigma, shift_sigma, sigma_grid


def test_the_path_inverts():
    x0, eps = torch.randn(2, 3), torch.randn(2, 3)
    sigma = torch.tensor(0.3)
    z, v = (1 - sigma) * x0 + sigma * eps, velocity(x0, eps)
    assert torch.allclose(to_x0(z, v, sigma), x0, atol=1e-6) and torch.allclose(to_noise(z, v, sigma), eps, atol=1e-6)


def test_shift_is_a_bijection_with_known_values():
    assert float(shift_sigma(torch.tensor(0.5), 3.0)) == pytest.approx(0.75)
    grid = sigma_grid(10, 5.0)
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    assert torch.allclose(shift_sigma(shift_sigma(grid, 5.0), 0.2), grid, atol=1e-6)


def test_logit_normal_matches_its_quantiles():
    sigma = draw_sigma((20000,), torch.Generator().manual_seed(0))
    for q in (0.1, 0.5, 0.9):
        z = torch.distributions.Normal(0, 1).icdf(torch.tensor(q))
        assert float(sigma.quantile(q)) == pytest.approx(float(z.sigmoid()), abs=0.01)


@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
@pytest.mark.parametrize("within", [(0.875, 1.0), (0.0, 0.875)])
def test_an_expert_s_levels_are_those_of_the_density_that_fall_to_it(density: str, within: tuple[float, float]):
    every, own = (draw_sigma((40000,), torch.Generator().manual_seed(0), density, 5.0, **kw) for kw in ({}, {"within": within}))
    inside = every[(every > within[0]) & (every < within[1])]  # the definition: leave the others out
    assert within[0] <= own.min() and own.max() <= within[1]
    for q in (0.05, 0.3, 0.5, 0.7, 0.95):
        assert float(own.quantile(q)) == pytest.approx(float(inside.quantile(q)), abs=0.01)


@pytest.mark.parametrize("call", [lambda: sigma_grid(0), lambda: sigma_grid(4, -1), lambda: draw_sigma((1,), torch.Generator(), "beta")])
def test_bad_clocks_are_refused(call):
    with pytest.raises(UserError):
        call()


def test_loss_sees_unknown_elements_only_and_each_sample_alike():
    v, target = torch.zeros(2, 4, 3, 2, 2), torch.ones(2, 4, 3, 2, 2)
    mask = torch.ones(2, 1, 3, 2, 2)
    mask[0, :, 0] = 0
    target[0, :, 0] = 100  # given: must not count
    assert flow_loss(v, target, mask).tolist() == [1.0, 1.0]
    mask[1] = 0.5
    assert float(flow_loss(v, target, mask)[1]) == pytest.approx(1.0)


def test_guidance_is_its_formula_and_costs_no_needless_pass():
    values = {("prompt", True): 5.0, ("prompt", False): 3.0, ("negative", True): 2.0}
    calls = []

    def predict(which: str, camera: bool) -> torch.Tensor:
        calls.append((which, camera))
        return torch.tensor(values[which, camera])

    assert float(guided_velocity(predict, 3.0, 2.0, True)) == 5 + 2 * (5 - 2) + 1 * (5 - 3)
    calls.clear()
    assert float(guided_velocity(predict, 1.0, 1.0, True)) == 5 and calls == [("prompt", True)]
