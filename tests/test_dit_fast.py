"""The transformer's optimisations do not change its results."""

from __future__ import annotations

import pytest
import torch
from test_dit import EXTRAS, IMAGE, TOKENS, B, G, H, W, gradients, inputs, kling, wan

from kling.dit.walk_cache import WalkCache
from kling.nn.modulation import ModulatedNorm
from kling.nn.packing import Packing, attend_packed


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


def test_packed_batches_are_the_batches_one_by_one() -> None:
    """Two pictures, a clip and a longer one with sizes, levels and texts of their own: outputs and gradients."""
    model = kling(**EXTRAS, camera_fold="pool")
    for extra in (model.kind_embedding.weight, model.control_adapter.conv.weight):
        torch.nn.init.normal_(extra, std=0.2)
    torch.manual_seed(2)
    text = "encoder_hidden_states"
    batches = [
        {"hidden_states": torch.randn(2, 4, 1, 4, 6), "sigma": torch.tensor([0.2, 0.9]), text: torch.randn(2, 5, 12)},
        {
            "hidden_states": torch.randn(1, 4, 3, 4, 6),
            "sigma": torch.tensor([[0.0, 0.5, 0.5]]),
            text: torch.randn(1, 7, 12),
        },
        {"hidden_states": torch.randn(1, 4, 2, 6, 2), "sigma": torch.rand(1, 2, 3, 1), text: torch.randn(1, 5, 12)},
    ]
    batches[0] |= {"camera": torch.randn(2, 24, 1, 32, 48), "camera_mask": torch.tensor([True, False])}
    batches[1] |= {"kinds": torch.tensor([[0, 0, 1]]), "positions": torch.tensor([[0.0, 1.0, 2.5]])}
    expected = [model(**batch).sample for batch in batches]
    packed = model.forward_packed(batches)
    for a, b in zip(expected, packed, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
    one, all_at_once = (gradients(model, torch.cat([x.flatten() for x in outputs])) for outputs in (expected, packed))
    assert one.keys() == all_at_once.keys()
    for name in one:
        torch.testing.assert_close(all_at_once[name], one[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.gpu
def test_packed_attention_in_one_kernel_is_that_of_the_batches() -> None:
    of, to = Packing(((2, 5), (1, 40))), Packing(((2, 3), (1, 7)))
    q, k, v = (torch.randn(1, n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in (50, 13, 13))
    attend = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))  # noqa: E731
    loop = Packing.join([attend(*parts).transpose(1, 2) for parts in zip(of.split(q), to.split(k), to.split(v), strict=True)])
    torch.testing.assert_close(attend_packed(q, k, v, attend, of, to), loop.flatten(2), atol=2e-2, rtol=2e-2)
