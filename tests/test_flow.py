"""The path, the noise levels, the loss and guidance, against their formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from kling.condition.state import KEYFRAME, TARGET
from kling.errors import UserError
from kling.flow.diffusers_scheduler import DiffusersWalk
from kling.flow.guidance import Guidance, given_share, guided_velocity
from kling.flow.levels import draw_sigma, shift_sigma, sigma_grid
from kling.flow.losses import flow_loss
from kling.flow.path import to_x0, velocity
from kling.flow.solvers import KlingFlowScheduler
from kling.flow.unipc import is_unipc


def test_the_path_inverts():
    x0, eps = torch.randn(2, 3), torch.randn(2, 3)
    sigma = torch.tensor(0.3)
    z, v = (1 - sigma) * x0 + sigma * eps, velocity(x0, eps)
    assert torch.allclose(to_x0(z, v, sigma), x0, atol=1e-6)


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
def test_an_expert_s_levels_follow_the_density_truncated_to_its_range(density: str, within: tuple[float, float]):
    every, own = (draw_sigma((40000,), torch.Generator().manual_seed(0), density, 5.0, **kw) for kw in ({}, {"within": within}))
    inside = every[(every > within[0]) & (every < within[1])]  # the definition: leave the others out
    assert within[0] <= own.min() and own.max() <= within[1]
    for q in (0.05, 0.3, 0.5, 0.7, 0.95):
        assert float(own.quantile(q)) == pytest.approx(float(inside.quantile(q)), abs=0.01)


@pytest.mark.parametrize("call", [lambda: sigma_grid(0), lambda: sigma_grid(4, -1), lambda: draw_sigma((1,), torch.Generator(), "beta")])
def test_invalid_level_grids_are_refused(call):
    with pytest.raises(UserError):
        call()


def test_the_loss_uses_only_unknown_elements_and_weights_samples_equally():
    v, target = torch.zeros(2, 4, 3, 2, 2), torch.ones(2, 4, 3, 2, 2)
    mask = torch.ones(2, 1, 3, 2, 2)
    mask[0, :, 0] = 0
    target[0, :, 0] = 100  # given: must not count
    assert flow_loss(v, target, mask).tolist() == [1.0, 1.0]
    mask[1] = 0.5
    assert float(flow_loss(v, target, mask)[1]) == pytest.approx(1.0)


def test_guidance_follows_its_formula_without_needless_passes():
    values = {("prompt", True): 5.0, ("prompt", False): 3.0, ("negative", True): 2.0}
    calls = []

    def predict(which: str, camera: bool) -> torch.Tensor:
        calls.append((which, camera))
        return torch.tensor(values[which, camera])

    assert float(guided_velocity(predict, 3.0, 2.0, True)) == 5 + 2 * (5 - 2) + 1 * (5 - 3)
    calls.clear()
    assert float(guided_velocity(predict, 1.0, 1.0, True)) == 5 and calls == [("prompt", True)]
    values |= {("no tracks", True): 4.5, ("no references", True): 4.0}
    more = {"no tracks": 4.0, "no references": 1.0}
    assert float(guided_velocity(predict, 3.0, 2.0, True, None, more)) == 5 + 2 * (5 - 2) + 1 * (5 - 3) + 3 * (5 - 4.5)
    more["no references"] = 2.5
    assert float(guided_velocity(predict, 3.0, 1.0, True, None, more)) == 5 + 2 * (5 - 2) + 3 * (5 - 4.5) + 1.5 * (5 - 4)


def test_guidance_grows_away_from_frames_that_are_given():
    """Frames 0 and, appended, 5.5 are given; half of frame 3 is too, which does not count. Reach 4."""
    mask, position, kind = torch.ones(1, 1, 9, 2, 2), torch.tensor([[*range(8), 5.5]]), torch.tensor([[TARGET] * 8 + [KEYFRAME]])
    mask[:, :, [0, 8]], mask[:, :, 3, 0] = 0, 0
    share = given_share(mask, position, kind, 4.0)
    assert share.shape == (1, 1, 9, 1, 1)
    assert share.flatten().tolist() == [0, 0.25, 0.5, 0.625, 0.375, 0.125, 0.125, 0.375, 0]
    assert given_share(mask, position, kind, 0.0) is None and given_share(mask.clamp(min=0.1), position, kind, 4.0) is None
    values = {("prompt", True): 5.0, ("prompt", False): 3.0, ("negative", True): 2.0}
    v = guided_velocity(lambda *which: torch.full((1, 2, 9, 2, 2), values[which]), 3.0, 2.0, True, share)
    torch.testing.assert_close(v, (5 + share * (2 * (5 - 2) + 1 * (5 - 3))).expand_as(v))


def test_guidance_on_some_of_the_steps():
    """Levels 1, 0.8 … 0; inside the interval every second step computes guidance, and the steps between add the last change again."""
    calls = []

    def predict(which: str, camera: bool) -> torch.Tensor:
        calls.append(which)
        return torch.tensor(float(len(calls)) if which == "prompt" else 0.0)

    guided, made = Guidance((0.15, 0.85), every=2), []
    for level in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        made.append(float(guided(predict, 3.0, 1.0, False, level)))
    assert "".join(which[0] for which in calls) == "p" + "pn" + "p" + "pn" + "p" + "p"
    first, second = 2 * 2.0, 2 * 5.0  # (g - 1)(prompt - negative), where prompt counts the calls
    assert made == [1.0, 2 + first, 4 + first, 5 + second, 7 + second, 8.0]


SHAPE = (1, 2, 3, 4, 4)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_unipc_equals_that_of_diffusers(steps: int, shift: float):
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000, "flow_shift": shift}
    theirs, ours = (UniPCMultistepScheduler(**settings) for _ in range(2))
    theirs.set_timesteps(steps)
    walk = DiffusersWalk(ours, steps, "cpu", shift)
    assert walk._unipc is not None
    z = a = b = torch.randn(SHAPE)
    everything, nothing = torch.ones(1, 1, 3, 4, 4), torch.zeros(SHAPE)
    for i, t in enumerate(theirs.timesteps):
        a = theirs.step((3 * a).sin() + a, t, a, return_dict=False)[0]
        level = walk.sigmas[i]
        b, _ = walk.step((3 * b).sin() + b, level, walk.sigmas[i + 1], b, everything, nothing)
        torch.testing.assert_close(b, a, atol=2e-5, rtol=2e-5)
    assert (b - z).norm() > 0.1 * z.norm()


def test_other_forms_of_unipc_are_left_to_diffusers():
    for change in ({"solver_order": 3}, {"solver_type": "bh1"}, {"disable_corrector": [0]}):
        settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, **change}
        assert not is_unipc(UniPCMultistepScheduler(**settings))
    assert not is_unipc(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("solver", ["euler", "adams"])
def test_a_step_follows_the_general_formula_if_levels_differ(solver: str):
    """x0 = z - σ v where m > 0, c where m = 0; z <- x0 + (σ⁺/σ)(z - x0) where σ > 0, unchanged where σ = 0."""
    scheduler = KlingFlowScheduler(solver=solver)
    scheduler.set_timesteps(4)
    z, c, v = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([0.0, 1.0, 0.5]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 4, 4)
    sigma, after = (torch.where(mask > 0, mask * level, 0.02).double() for level in (0.75, 0.5))
    sigma[:, :, 1, :2], after[:, :, 1, :2] = 0.0, 0.0  # arrived
    got, x0 = scheduler.step(v, sigma, after, z, mask, c)
    expected = torch.where(mask > 0, z - sigma * v, c)
    torch.testing.assert_close(x0(), expected)
    moved = z - (sigma - after) * v
    torch.testing.assert_close(got, torch.where(mask > 0, torch.where(sigma > 0, moved, z), z))
    ratio = after[mask.expand_as(after) == 1].max() / 0.75
    torch.testing.assert_close(got[:, :, 1, 2:], expected[:, :, 1, 2:] + ratio * (z - expected)[:, :, 1, 2:])
