"""Attention as matrix products on a CPU, against an explicit implementation in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kling.nn.attention import MOST_KEYS, Attention, attend_by_products, by_products


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(b, n, heads, d), (b, m, heads, d) -> (b, n, heads · d), sample by sample and head by head."""
    rows = [
        torch.cat([torch.softmax(q[i, :, h] @ k[i, :, h].T / q.shape[-1] ** 0.5, -1) @ v[i, :, h] for h in range(q.shape[2])], dim=-1)
        for i in range(len(q))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize(("n", "m"), [(35, 35), (140, 12), (308, 308)])
def test_products_in_bf16_are_within_a_hundredth_in_outputs_and_gradients(n: int, m: int) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, length, 3, 32, dtype=torch.float64) for length in (n, m, m)]
    rounded = [x.bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    upstream = torch.randn(2, n, 96, dtype=torch.float64).bfloat16()
    out, truth = attend_by_products(*rounded), written_out(*exact)
    assert out.shape == truth.shape and (out.double() - truth).norm() < 1e-2 * truth.norm()
    found, gradients = torch.autograd.grad(out, rounded, upstream), torch.autograd.grad(truth, exact, upstream.double())
    for ours, theirs in zip(found, gradients, strict=True):
        assert (ours.double() - theirs).norm() < 1e-2 * theirs.norm()


def test_products_are_for_bf16_on_a_cpu_and_few_keys() -> None:
    q = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    assert by_products(q, q)
    assert not by_products(q.float(), q.float())
    assert not by_products(q, q.expand(1, 4, 1, 8).repeat(1, MOST_KEYS, 1, 1))
    assert not by_products(q.to("meta"), q.to("meta"))


def test_the_chosen_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """`set_attention_backend` takes precedence over the default for CPUs."""
    monkeypatch.setattr("kling.nn.attention.attend_by_products", lambda *_: pytest.fail("the backend that was set is not used"))
    layer = Attention(32, 2).bfloat16()
    layer.set_attention_backend("native")
    layer(torch.randn(1, 6, 32, dtype=torch.bfloat16))
