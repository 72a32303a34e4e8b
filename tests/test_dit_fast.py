"""The transformer's optimisations do not change its results."""

from __future__ import annotations

import pytest
import torch
from test_dit import IMAGE, TOKENS, B, G, H, W, inputs, kling, wan

from kling.dit.walk_cache import WalkCache
from kling.nn.modulation import ModulatedNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_modulation_folds_into_the_norm(dtype: torch.dtype) -> None:
    norm, x, shift, scale = ModulatedNorm(8), torch.randn(B, TOKENS, 8).to(dtype), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    plain = torch.nn.functional.layer_norm(x.double(), (8,), eps=1e-6) * (1 + scale[0, 0].double()) + shift[0, 0].double()
    spelled = [v.expand(B, TOKENS, 1, 8) for v in (shift, scale)]  # the same vectors, token by token
    for vectors in ((shift, scale), spelled):
        with torch.no_grad():
            y = norm(x, *vectors)
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.double(), plain, **({"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 8e-3})
        )


@pytest.mark.parametrize("offloaded", [False, True])
def test_the_walk_cache_changes_nothing_and_is_computed_once(offloaded: bool) -> None:
    """Also under group offloading, whose hooks hand every block copies of the dicts that it is called with."""
    model = kling(wan(**IMAGE))
    if offloaded:
        cpu = torch.device("cpu")
        model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    x = [inputs(sigma=torch.full((B,), level)) for level in (0.9, 0.5, 0.1)]
    for step in x:
        step["hidden_states"] = torch.randn(B, 4, G, H, W)
        step["encoder_hidden_states"], step["encoder_hidden_states_image"] = x[0]["encoder_hidden_states"], torch.ones(B, 7, 10)
    calls: list[int] = []
    for layer in (model.blocks[1].attn2.to_k, model.blocks[1].attn2.add_v_proj, model.rope):
        layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = [model(**step).sample for step in x]
        assert len(calls) == 9
        walk_cache = WalkCache(2)
        for step, want in zip(x, expected, strict=True):
            assert torch.equal(model(**step, walk_cache=walk_cache).sample, want)
    assert len(calls) == 12
