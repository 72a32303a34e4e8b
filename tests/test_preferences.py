"""The losses of preferences and rewards, against closed forms: a Gaussian whose reward-tilted optimum is known, and known gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kling.flow.preferences import advantages, awm_loss, deviation, dpo_loss, nft_loss, norm_hinge, norm_ratio, optimality


def clips(b: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    """v, x0, noise (b, 2, 3, 2, 2), and a mask that gives the first frame and half of the last."""
    g = torch.Generator().manual_seed(seed)
    v, x0, noise = torch.randn(3, b, 2, 3, 2, 2, generator=g, dtype=torch.float64).float()
    mask = torch.ones(b, 1, 3, 2, 2)
    mask[:, :, 0], mask[:, :, 2] = 0, 0.5
    return v, x0, noise, mask


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over a sample's elements weighted by m, written out."""
    weights = mask.expand_as(x)
    return (weights * x).sum(dim=(1, 2, 3, 4)) / weights.sum(dim=(1, 2, 3, 4))


def gradient(loss: Tensor, v: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), v)[0]


def test_advantages_are_measured_by_the_deviation_of_all_groups() -> None:
    """Jitter of 0.01 in one group, a broken clip in another: not the same push."""
    broken, jitter, equal = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.50, 0.51, 0.50, 0.51]), torch.ones(4)
    scale = deviation([broken, jitter, equal])
    assert scale == pytest.approx(math.sqrt((3 * 0.25**2 + 0.75**2 + 4 * 0.005**2) / 12))
    assert advantages(broken, scale)[3] == pytest.approx(-0.75 / scale) and float(advantages(jitter, scale).abs().max()) < 0.02
    assert advantages(equal, scale).tolist() == [0, 0, 0, 0]
    assert optimality(torch.tensor([-50.0, 0.0, 1.0, 50.0])).tolist() == pytest.approx([0, 0.5, 0.6, 1])


@pytest.mark.parametrize("b", [0.1, 1.0])
def test_nft_reaches_the_reward_tilted_optimum_of_a_gaussian(b: float) -> None:
    """x0 ~ N(0, 1) and r = exp(-l (x0 - a)²/2): given z, x0 and the tilted x0 are Gaussian with known means. The loss, integrated over x0
    (Gauss-Hermite), has its minimum at v_old + 2/b E[r | z] (v+ - v_old)."""
    sigma, z, l, a = 0.6, 0.7, 1.3, 0.9
    alpha = 1 - sigma
    variance = sigma**2 / (alpha**2 + sigma**2)  # of x0 given z
    middle = alpha * z / (alpha**2 + sigma**2)
    tilted = (middle / variance + l * a) / (1 / variance + l)  # mean of x0 given z, weighted by r
    share = math.exp(-l * (middle - a) ** 2 / 2 / (1 + l * variance)) / math.sqrt(1 + l * variance)  # E[r | z]
    v_old, v_plus = (z - middle) / sigma, (z - tilted) / sigma
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x0 = torch.tensor(middle + math.sqrt(variance) * nodes).float().view(-1, 1, 1, 1, 1)
    r, w = torch.exp(-l * (x0.flatten() - a) ** 2 / 2), torch.tensor(weights / weights.sum()).float()
    best = v_old + 2 / b * share * (v_plus - v_old)
    v = torch.full_like(x0, best).requires_grad_()
    one = torch.ones_like(x0)
    loss = nft_loss(v, torch.full_like(x0, v_old), torch.full_like(x0, z), x0, torch.full_like(x0, sigma), one, r, b, normalised=False)
    slopes = gradient(w * loss, v).flatten()
    assert float(slopes.sum()) == pytest.approx(0, abs=1e-4 * float(slopes.abs().sum()) + 1e-5)


@pytest.mark.parametrize("b", [0.1, 1.0])
def test_the_gradient_of_nft_at_the_old_policy_is_weighted_flow_matching(b: float) -> None:
    """d/dv = 10 (2 r - 1) sigma (x0 - x_old) m / (w n): for r = 1/2 it is 0."""
    v, x0, noise, mask = clips()
    sigma = 0.7 * mask
    z, r = (1 - sigma) * x0 + sigma * noise, torch.tensor([0.0, 0.5, 0.8, 1.0])
    v.requires_grad_()
    found = gradient(nft_loss(v, v.detach(), z, x0, sigma, mask, r, b), v)
    off = z - sigma * v.detach() - x0
    w = mean(off.abs(), mask)
    n = 2 * mask.flatten(1).sum(1)
    expected = -10 * ((2 * r - 1) / (w * n)).view(-1, 1, 1, 1, 1) * mask * sigma * off
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert float(found[1].abs().max()) < 1e-6 and bool((found[:, :, 0] == 0).all())
    matching = gradient(mean((v - (noise - x0)) ** 2, mask), v)  # the same direction, or the opposite one, as plain training
    assert bool(((found[3] * matching[3]).sum() > 0) & ((found[0] * matching[0]).sum() < 0))


def test_nft_of_average_clips_only_holds_the_policy() -> None:
    """r = 1/2, unnormalised: L = 5/b (|e|² + sigma² b² |v - v_old|²), so the gradient is 10 b sigma² (v - v_old)."""
    v, x0, noise, _ = clips()
    mask, b = torch.ones(4, 1, 3, 2, 2), 0.5
    sigma = torch.full_like(mask, 0.7)
    z, v_old = (1 - sigma) * x0 + sigma * noise, torch.randn_like(v)
    v.requires_grad_()
    found = gradient(nft_loss(v, v_old, z, x0, sigma, mask, torch.full((4,), 0.5), b, normalised=False), v)
    torch.testing.assert_close(found, 10 * b * 0.49 * (v.detach() - v_old) / v[0].numel(), rtol=1e-3, atol=1e-6)


def test_dpo_at_the_reference_is_log_2_with_the_known_gradient() -> None:
    """dL/dv = beta/4 d/dv (D(win) - D(lose))."""
    v, x0, noise, mask = clips()
    v.requires_grad_()
    loss = dpo_loss(v, v.detach(), noise - x0, mask, beta=7.0)
    assert loss.shape == (2,) and loss.tolist() == pytest.approx([math.log(2)] * 2)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    expected = gradient(7 / 4 * sign * mean((v - (noise - x0)) ** 2, mask), v)
    torch.testing.assert_close(gradient(loss, v), expected)


def test_dpo_grows_where_the_worse_clip_is_learned() -> None:
    v, x0, noise, mask = clips()
    target = noise - x0
    better, worse = v.clone(), v.clone()
    better[0::2], worse[1::2] = target[0::2], target[1::2]
    losses = [float(dpo_loss(x, v, target, mask, beta=10.0).mean()) for x in (better, v, worse)]
    assert losses[0] < math.log(2) - 0.1 < losses[1] + 0.1 < losses[2]


def test_awm_at_the_old_policy_is_weighted_flow_matching_and_is_clipped_outside() -> None:
    v, x0, noise, mask = clips()
    A = torch.tensor([1.0, -1.0, 0.5, 0.0])
    v.requires_grad_()
    found = gradient(awm_loss(v, v.detach(), noise - x0, mask, A), v)
    torch.testing.assert_close(found, gradient(A * mean((v - (noise - x0)) ** 2, mask), v))
    near = (noise - x0).clone().requires_grad_()  # already much better than the old policy: a good clip pulls no further
    assert float(gradient(awm_loss(near, near.detach() + 2, noise - x0, mask, torch.ones(4)), near).abs().max()) == 0


def test_the_hinge_acts_above_the_reference_only() -> None:
    v, _, _, mask = clips()
    for scale in (0.5, 1.0, 2.0):
        x = (scale * v).requires_grad_()
        hinge = norm_hinge(x, v, mask)
        assert hinge.tolist() == pytest.approx([max(0.0, scale**2 - 1)] * 4, abs=1e-5)
        assert norm_ratio(x, v, mask).tolist() == pytest.approx([scale] * 4)
        assert (float(gradient(hinge, x).abs().max()) > 0) == (scale > 1)
