"""The State: masks, levels, positions and the step, against the formulas of the design."""

from __future__ import annotations

import random

import pytest
import torch

from kling.condition.state import KEYFRAME, TARGET, Given, State, build_state
from kling.condition.tasks import TASKS, check_tasks, draw_task, keyframe_share
from kling.errors import UserError
from kling.flow.levels import frame_grid, sigma_grid
from kling.flow.solvers import KlingFlowScheduler
from kling.flow.walk import walk

B, C, F, HH, WW = 2, 3, 4, 4, 6


def state_of(*given: Given, sigma_c: float = 0.0, **kwargs):
    K = len(given[0].keyframes)
    clean = torch.randn(len(given), C, F, HH, WW, generator=torch.Generator().manual_seed(0))
    lone = torch.randn(len(given), C, K, HH, WW, generator=torch.Generator().manual_seed(1)) if K else None
    return build_state(list(given), clean, lone, sigma_c=sigma_c, **kwargs)


def test_levels_follow_the_mask():
    """sigma_tok = m sigma + [m = 0] sigma_c, frame by frame."""
    state = state_of(Given(known=1, keyframes=((12, 0.75),)), sigma_c=0.02)
    sigma = state.sigma(torch.tensor([0.8]))[0, 0, :, 0, 0]
    assert sigma.tolist() == pytest.approx([0.02, 0.8, 0.8, 0.8, 0.25 * 0.8])
    assert state.position[0].tolist() == [0, 1, 2, 3, (12 + 1.5) / 4]
    assert state.kind[0].tolist() == [TARGET] * F + [KEYFRAME]


def test_sampling_starts_from_noise_where_unknown_and_from_the_clip_where_given():
    state = state_of(Given(known=2))
    noise = torch.randn_like(state.clean)
    z = state.noised(torch.ones(1), noise)
    assert torch.equal(z[:, :, :2], state.clean[:, :, :2]) and torch.equal(z[:, :, 2:], noise[:, :, 2:])


def test_spatial_masks_are_whole_tokens():
    space = torch.zeros(HH, WW)
    space[0, 0] = 1
    state = state_of(Given(space=space))
    assert state.mask[0, 0, 0, :2, :2].min() == 1 and state.mask.sum() == 4 * F
    tokens = told(state, torch.tensor([0.5]))
    assert tokens.shape == (1, F, 2, 3) and tokens[0, :, 0, 0].tolist() == [0.5] * F


def told(state: State, level: torch.Tensor) -> torch.Tensor:
    """The level of every token (b, G, h', w'), expanded from the distinct ones."""
    values, index, _ = state.levels(level)
    G, h, w = state.mask.shape[2], HH // 2, WW // 2
    return values[index].repeat_interleave(G * h * w // index.shape[1], dim=1).unflatten(1, (G, h, w))


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_network_gets_every_token_s_level_in_few_rows(per_frame):
    """Clips given in part, softly, in space and not at all, in one batch, against the formula for every element."""
    hole = torch.zeros(HH, WW)
    hole[2:, 2:] = 1
    rows = {
        (Given(), Given()): (2, 1),
        (Given(known=1), Given(known=2)): (4, F),
        (Given(hold=0.5), Given(space=hole)): (4, F * 6),
        (Given(known=1, space=hole), Given(hold=0.3)): (4, F * 6),
        (Given(keyframes=((9, 0.7),)), Given(known=1, keyframes=((12, 1.0),))): (4, F + 1),
    }
    for given, (values, runs) in rows.items():
        state = state_of(*given, sigma_c=0.02)
        G = state.mask.shape[2]
        level = torch.rand(2, G) if per_frame else torch.rand(2)
        assert torch.equal(told(state, level), state.sigma(level)[:, 0, :, ::2, ::2])
        found = state.levels(level)
        assert found.values.shape == (values * (G if per_frame else 1),) and found.index.shape == (2, max(runs, G if per_frame else 1))
        part = state.part(1, 3)
        assert torch.equal(
            told(part, level[:, 1:3] if per_frame else level), part.sigma(level[:, 1:3] if per_frame else level)[:, 0, :, ::2, ::2]
        )


def test_a_per_frame_level_reaches_its_frame():
    state = state_of(Given(), Given())
    level = torch.rand(2, F)
    assert torch.equal(state.sigma(level)[:, 0, :, 0, 0], level)


@pytest.mark.parametrize("solver", ["euler", "adams"])
def test_a_perfect_velocity_arrives_at_the_truth(solver):
    """With v = eps - x0 every solver is exact on a straight path; given frames stay unchanged."""
    state = state_of(Given(known=1, keyframes=((12, 1.0),)))
    truth = torch.randn_like(state.clean)
    truth = torch.where(state.mask > 0, truth, state.clean)
    noise = torch.randn_like(truth)
    scheduler = KlingFlowScheduler(solver=solver)
    scheduler.set_timesteps(7, shift=3.0)
    z = state.noised(torch.ones(1), noise)
    for level, nxt in zip(scheduler.sigmas[:-1, None], scheduler.sigmas[1:, None], strict=True):
        z, x0 = scheduler.step(noise - truth, state.sigma(level), state.sigma(nxt), z, state.mask, state.clean)
        assert torch.allclose(x0(), truth, atol=1e-4)
    assert torch.allclose(state.finish(z), truth[:, :, :F], atol=1e-4)
    assert torch.equal(state.finish(z)[:, :, 0], state.clean[:, :, 0])


def test_adams_is_second_order():
    """For dx/dsigma = x the error of Euler is proportional to the step, that of Adams-Bashforth to its square."""

    def error(solver: str, steps: int) -> float:
        scheduler = KlingFlowScheduler(solver=solver)
        scheduler.set_timesteps(steps)
        z = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
        one, mask = torch.ones_like(z), torch.ones_like(z)
        for s, n in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
            z, _ = scheduler.step(z, s.double() * one, n.double() * one, z, mask, one)
        return abs(float(z) - float(torch.exp(torch.tensor(-1.0))))

    assert error("euler", 32) / error("euler", 64) == pytest.approx(2, rel=0.1)
    assert error("adams", 32) / error("adams", 64) == pytest.approx(4, rel=0.15)


def test_a_finished_frame_stays_unchanged():
    """Diffusion forcing: with delays, frame 0 is finished first and stays unchanged while the others continue."""
    grid = frame_grid(sigma_grid(4), torch.tensor([0, 2, 4, 6]))
    assert grid.shape == (11, F) and grid[0].tolist() == [1.0] * 4 and grid[-1].tolist() == [0.0] * 4
    state = state_of(Given())
    scheduler = KlingFlowScheduler()
    z = state.noised(grid[:1], torch.randn_like(state.clean))
    seen = []
    for level, nxt in zip(grid[:-1, None].transpose(0, 1).unbind(1), grid[1:, None].transpose(0, 1).unbind(1), strict=True):
        z, _ = scheduler.step(torch.randn_like(z), state.sigma(level), state.sigma(nxt), z, state.mask, state.clean)
        seen.append(z[:, :, 0].clone())
    assert all(torch.equal(seen[3], later) for later in seen[4:])


def test_every_task_draws_what_its_name_says():
    rng = random.Random(0)
    for name, (appended, draw, _) in TASKS.items():
        for _ in range(20):
            given = draw(rng, F, HH, WW)
            assert len(given.keyframes) == appended
            if name != "keyframes":  # its frame is tied to the cache later
                assert given.task(F) == name or (name == "continuation" and F // 2 < 2)
    weights = {"text": 3.0, "last": 1.0}
    assert keyframe_share(weights) == 0.25
    assert {draw_task(rng, weights, 1) for _ in range(10)} == {"last"}
    with pytest.raises(UserError, match="lst"):
        check_tasks({"lst": 1})


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gives_whole_numbers_of_frames(name: str) -> None:
    """A truth value is one of them in most places, and makes a batch of tensors of another kind in some."""
    rng = random.Random(0)
    assert {type(TASKS[name][1](rng, 5, 8, 14).known) for _ in range(20)} == {int}


def test_a_keyframe_goes_with_the_frame_at_which_it_lies():
    """Delayed frame by frame, a soft keyframe has its frame's level at every step, references are never behind, and no step is added."""
    clean, lone = torch.zeros(2, C, F, HH, WW), torch.zeros(2, C, 2, HH, WW)
    given = [Given(keyframes=((t, 0.4),), references=1) for t in (5, 12)]
    for shots in (None, [[0, 2], [0, 3]]):
        state = build_state(given, clean, lone, shots=shots)
        assert state.lies_at.tolist() == [[0, 1, 2, 3, 2, 0], [0, 1, 2, 3, 3, 0]]
    scheduler, seen = KlingFlowScheduler(num_inference_steps=4), []

    def predict(z, level, next_level, highest):
        seen.append(level)
        return torch.zeros_like(z)

    steps = list(walk(state, scheduler, predict, torch.randn_like(state.clean), None, delay=2))
    assert len(steps) == 4 + 2 * (F - 1)
    for level in seen:
        assert torch.equal(level[:, 4], level.gather(1, torch.tensor([[2], [3]]))[:, 0]) and torch.equal(level[:, 5], level[:, 0])
    assert seen[4][0].tolist() == [0.0, 0.5, 1.0, 1.0, 1.0, 0.0]
