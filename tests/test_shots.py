"""Shots: each token reads the words of its own shot only, positions jump at a cut, and one shot costs no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kling.condition.state import SHOT_GAP, Given, State, build_state
from kling.dit import KlingTransformer3DModel
from kling.dit.walk_cache import WalkCache
from kling.errors import UserError
from kling.nn.attention import Attention

C, F, HH, WW = 4, 5, 4, 6
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 12, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2}
TINY |= {"in_channels": C, "out_channels": C, "num_kinds": 2}
SHOTS = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]])  # (b, F) of two samples with three texts each


def transformer(**more: object) -> KlingTransformer3DModel:
    torch.manual_seed(0)
    model = KlingTransformer3DModel(**TINY | more).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, C, F, HH, WW), torch.tensor([0.3, 0.9]), torch.randn(6, 7, 12)  # latents, levels, texts (b · S, l, e)


# ------------------------------------------------------------------------------------------------------------------ the State


def state_of(given: list[Given], starts: list[list[int]] | None) -> State:
    lone = torch.zeros(len(given), C, len(given[0].keyframes), HH, WW) if given[0].keyframes else None
    return build_state(given, torch.zeros(len(given), C, F, HH, WW), lone, shots=starts)


def test_positions_jump_at_every_cut_and_a_keyframe_is_of_the_shot_that_it_falls_in() -> None:
    given = [Given(known=1, keyframes=((7, 1.0),)), Given(keyframes=((16, 0.5),))]  # pixel frames 7 and 16: latent frames 2 and 4
    state = state_of(given, [[0, 2, 4], [0, 1]])
    assert state.shot.tolist() == [[0, 0, 1, 1, 2, 1], [0, 1, 1, 1, 1, 1]]
    plain = state_of(given, None).position
    assert torch.equal(state.position - plain, SHOT_GAP * state.shot)
    assert plain[0, 5] == (7 + 1.5) / 4, "a keyframe's own place is between the latents"
    assert SHOT_GAP % 1, "a distance across a cut is no distance within a shot"


def test_one_shot_is_the_state_of_before() -> None:
    given = [Given(known=1), Given()]
    assert state_of(given, [[0], [0]]).shot is None and torch.equal(state_of(given, [[0], [0]]).position, state_of(given, None).position)


def test_shots_follow_the_samples_and_the_frames_of_a_state() -> None:
    state = state_of([Given(), Given()], [[0, 2, 4], [0, 1]])
    assert torch.equal(state.rows(1).shot, state.shot[1:]) and torch.equal(state.part(1, 3).shot, state.shot[:, 1:3])
    assert state.rows(1).repeated(3).shot.tolist() == [[0, 1, 1, 1, 1]] * 3 and torch.equal(state.to("cpu").shot, state.shot)


# ------------------------------------------------------------------------------------------------------------ cross-attention


def test_cross_attention_by_shot_is_masked_attention_over_all_words() -> None:
    """Against the definition: softmax over the words of all shots, with those of other shots masked, in float64."""
    torch.manual_seed(0)
    layer = Attention(32, 2, qk_norm=False).double()
    x, text = torch.randn(2, F * 6, 32, dtype=torch.float64), torch.randn(6, 7, 32, dtype=torch.float64)
    rows = SHOTS + torch.tensor([[0], [3]])
    out = layer(x, text, rows=rows)
    for i in range(2):
        heads = [t.unflatten(-1, (2, 16)) for t in (layer.to_q(x[i]), layer.to_k(text.flatten(0, 1)), layer.to_v(text.flatten(0, 1)))]
        q, k, v = heads  # (n, heads, 16), (6 · 7, heads, 16) twice
        mine = rows[i].repeat_interleave(6)[:, None] == torch.arange(6).repeat_interleave(7)  # (n, 42)
        scores = torch.einsum("nhd,mhd->hnm", q, k) / 4
        weights = scores.masked_fill(~mine, -torch.inf).softmax(-1)
        want = layer.to_out[0](torch.einsum("hnm,mhd->nhd", weights, v).flatten(1))
        torch.testing.assert_close(out[i], want, atol=1e-12, rtol=1e-12)


def test_where_tokens_do_not_see_each_other_every_shot_is_the_clip_of_its_own_words() -> None:
    model = transformer()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)
    z, sigma, text = inputs()
    with torch.no_grad():
        mixed = model(z, sigma, text, shots=SHOTS).sample
        alone = torch.stack([model(z, sigma, text[s::3]).sample for s in range(3)])  # (S, b, c, F, h, w), all frames with one text
    for i in range(2):
        for j in range(F):
            torch.testing.assert_close(mixed[i, :, j], alone[SHOTS[i, j], i, :, j], atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.1, "the words matter here"


def test_words_reach_other_shots_only_through_the_picture() -> None:
    """A word of a shot that no frame is of changes nothing; its gradient is zero."""
    model, (z, sigma, text) = transformer(), inputs()
    text.requires_grad_()
    model(z, sigma, text, shots=SHOTS).sample.sum().backward()
    used = text.grad.abs().amax((1, 2)) > 0
    assert used.tolist() == [True, True, True, True, True, False], "sample 1 has no third shot"


def test_one_shot_is_computed_to_the_bit_as_without_shots() -> None:
    model, (z, sigma, text) = transformer(), inputs()
    with torch.no_grad():
        want = model(z, sigma, text[:2]).sample
        torch.testing.assert_close(model(z, sigma, text[:2], shots=torch.zeros(2, F, dtype=torch.long)).sample, want)
        assert torch.equal(model(z, sigma, text[:2], shots=None).sample, want)


def test_a_walk_keeps_the_words_of_all_shots() -> None:
    model, (z, sigma, text) = transformer(), inputs()
    cache = WalkCache(len(model.blocks))
    with torch.no_grad():
        want = model(z, sigma, text, shots=SHOTS).sample
        model(z, sigma, text, shots=SHOTS, walk_cache=cache)
        again = model(z, sigma, text, shots=SHOTS, walk_cache=cache).sample
    assert torch.equal(again, want) and len(cache.layers[0].pairs["text"][0]) == 6


def test_a_camera_may_be_given_for_some_shots_only() -> None:
    model = transformer(camera_channels=24, camera_fold="pool", camera_downscale=1)
    z, sigma, text = inputs()
    rays, shown = torch.randn(2, 24, F, HH, WW), torch.tensor([[1, 1, 0, 0, 1], [0] * 5], dtype=torch.bool)
    with torch.no_grad():
        part = model._camera(rays, torch.zeros(2, F * 6, 32), shown).unflatten(1, (F, 6))
        whole = model._camera(rays, torch.zeros(2, F * 6, 32), None).unflatten(1, (F, 6))
    assert torch.equal(part, whole * shown[..., None, None]) and bool((whole != 0).any())


def test_shots_that_do_not_fit_are_refused() -> None:
    model, (z, sigma, text) = transformer(), inputs()
    with pytest.raises(UserError, match="shots of shape"):
        model(z, sigma, text, shots=SHOTS[:, 1:])
    with pytest.raises(UserError, match="5 texts"):
        model(z, sigma, text[:5], shots=SHOTS)
    model._parallel_config = object()
    with pytest.raises(UserError, match="context parallelism"):
        model(z, sigma, text, shots=SHOTS)
