"""Losses that move a flow towards what a reward or a comparison prefers. They know no model: velocities in, a loss per sample out.

Throughout, v is the velocity in training, v_old that of the policy that made the clips, v_ref that of the start; x0 (b, c, G, h, w) the
clips, z = (1 - sigma) x0 + sigma eps, and mask m (b, 1, G, h, w): means run over one sample's elements, weighted by m as in `flow_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kling.flow.losses import flow_loss

CLIP = 5.0  # advantages beyond it count as it


def deviation(groups: Sequence[Tensor]) -> float:
    """Of rewards (k,) from the means of their groups, over all groups of a round."""
    return float(torch.cat([rewards - rewards.mean() for rewards in groups]).std(correction=0))


def advantages(rewards: Tensor, scale: float) -> Tensor:
    """A = (R - mean) / scale in a group of clips of one request, (k,) -> (k,).

    scale: the `deviation` of all groups, as in DiffusionNFT. Divided by its own, a group of clips that differ by the jitter of a ruler
    would weigh as much as one with a broken clip; so it moves next to nothing, like one whose clips are all right or all wrong.
    """
    return (rewards - rewards.mean()) / scale


def optimality(advantage: Tensor) -> Tensor:
    """r = clip(A, ±5) / 10 + 1/2: how good a clip is, from 0 to 1. 1/2 is the mean of its group."""
    return advantage.clamp(-CLIP, CLIP) / (2 * CLIP) + 0.5


def nft_loss(
    v: Tensor, v_old: Tensor, z: Tensor, x0: Tensor, sigma: Tensor, mask: Tensor, r: Tensor, b: float = 1.0, normalised: bool = True
) -> Tensor:
    """DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): good clips pull v, bad ones push it away, with no likelihood and no SDE.

        v± = (1 ∓ b) v_old ± b v          x± = z - sigma v±
        L = 5 / b [r |x+ - x0|² / w+ + (1 - r) |x- - x0|² / w-]          w± = mean |x± - x0|, without gradient

    At v = v_old its gradient is that of (2 r - 1) times flow matching, times a positive number; at r = 1/2 v is only held to v_old. Without
    w the optimum is v_old + 2/b E[r | z] (v+ - v_old), where v+ is the velocity of the clips weighted by r.

    sigma: of every element, as `State.sigma`. r: (b,), see `optimality`. b: a smaller one goes further. Returns (b,).
    """
    change = b * (v.float() - v_old.float())
    loss = torch.zeros_like(r)
    for weight, side in ((r, 1), (1 - r, -1)):
        x = z - sigma * (v_old.float() + side * change)  # (b, c, G, h, w)
        error = flow_loss(x, x0, mask)  # (b,)
        if normalised:
            error = error / _mean((x - x0).detach().abs(), mask).clamp(min=1e-5)
        loss = loss + weight * error
    return CLIP / b * loss


def dpo_loss(v: Tensor, v_ref: Tensor, target: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Flow-DPO (Liu et al. 2025, arXiv 2501.13918) for pairs in the order win, lose, win, lose …: (2 n, ...) -> (n,).

        D = mean |v - (eps - x0)|² - mean |v_ref - (eps - x0)|²          L = -log sigmoid(-beta/2 (D(win) - D(lose)))

    Both clips of a pair need the same noise and level. beta is the same at all levels: one that falls with the level invites hacking.
    """
    gain = flow_loss(v, target, mask) - flow_loss(v_ref, target, mask)  # D, (2 n,)
    return -F.logsigmoid(-beta / 2 * (gain[0::2] - gain[1::2]))


def awm_loss(v: Tensor, v_old: Tensor, target: Tensor, mask: Tensor, advantage: Tensor, clip: float = 0.2) -> Tensor:
    """Advantage-weighted matching (Xue et al. 2025, arXiv 2509.25050): PPO with the flow-matching loss as -log p. (b,)

        ratio = exp(|v_old - (eps - x0)|² - |v - (eps - x0)|²)          L = -min(ratio A, clip(ratio, 1 ± clip) A)

    At v = v_old its gradient is that of A times flow matching.
    """
    ratio = (flow_loss(v_old, target, mask) - flow_loss(v, target, mask)).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def norm_hinge(v: Tensor, v_ref: Tensor, mask: Tensor) -> Tensor:
    """max(0, |v|² - |v_ref|²) / |v_ref|², (b,): these losses inflate v unless something holds it (NormGuard, arXiv 2606.27771)."""
    own, start = (_mean(x.float().square(), mask) for x in (v, v_ref))
    return F.relu(own - start) / start.clamp(min=1e-6)


def norm_ratio(v: Tensor, v_ref: Tensor, mask: Tensor) -> Tensor:
    """|v| / |v_ref|, (b,)."""
    own, start = (_mean(x.float().square(), mask) for x in (v, v_ref))
    return (own / start.clamp(min=1e-12)).sqrt()


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the elements of each sample, weighted by m: (b, c, G, h, w) -> (b,)."""
    return (mask * x.mean(dim=1, keepdim=True)).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-6)
