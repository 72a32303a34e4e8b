"""The byte-level text encoder: any language, one output shape, and batching does not change the result for a prompt."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kling.errors import UserError
from kling.text import ByteTextEncoder
from kling.text.agree import agreement_loss, pool
from kling.text.encoder import TOGETHER

SMALL = {"byte_dim": 32, "out_dim": 48, "head_dim": 16, "ffn_mult": 2, "max_bytes": 63}
PROMPTS = ["", "a red ball", "一个红色的球在草地上滚动", "a much longer prompt, nearly as long as the encoder reads it", "é"]


@pytest.fixture(scope="module")
def encoder() -> ByteTextEncoder:
    torch.manual_seed(0)
    return ByteTextEncoder(**SMALL).eval()


def test_the_shipped_size_fits_its_budget() -> None:
    model = ByteTextEncoder()
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000
    assert model.encode([""]).shape == (1, 64, 192)


def test_batching_never_changes_a_prompt(encoder: ByteTextEncoder) -> None:
    together = encoder.encode(PROMPTS)
    assert together.shape == (len(PROMPTS), 16, 48)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        torch.testing.assert_close(encoder.encode([prompt])[0], expected, atol=1e-5, rtol=1e-5)


def test_prompts_of_all_lengths_keep_their_order(encoder: ByteTextEncoder) -> None:
    prompts = ["a" * (37 * i % 60) for i in range(2 * TOGETHER + 5)]
    together = encoder.encode(prompts)
    for i in range(0, len(prompts), 7):
        assert torch.allclose(together[i], encoder.encode([prompts[i]])[0], atol=1e-5), i


def test_output_is_zero_past_the_end_and_only_there(encoder: ByteTextEncoder) -> None:
    for prompt, tokens in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        used = len(prompt.encode()) // 4 + 1  # the begin mark takes a place
        assert tokens[:used].any(dim=1).all() and not tokens[used:].any()


def test_spelling_of_unicode_and_spaces_around_do_not_matter(encoder: ByteTextEncoder) -> None:
    assert torch.equal(encoder.encode(["e\u0301"]), encoder.encode([" é\n"]))


def test_order_and_every_byte_matter(encoder: ByteTextEncoder) -> None:
    a, b, c = encoder.encode(["red on blue", "blue on red", "red on bluf"])
    assert not torch.allclose(a, b, atol=1e-3) and not torch.allclose(a, c, atol=1e-3)


def test_a_prompt_too_long_is_refused_with_both_numbers(encoder: ByteTextEncoder) -> None:
    encoder.encode(["x" * 63])
    with pytest.raises(UserError, match="66 bytes .*63"):
        encoder.encode(["球" * 22])


def test_every_weight_learns() -> None:
    model = ByteTextEncoder(**SMALL)
    model.encode(PROMPTS).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_saving_and_loading_keeps_everything(encoder: ByteTextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    again = ByteTextEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(PROMPTS), encoder.encode(PROMPTS))


def test_agreement_loss_equals_its_closed_form() -> None:
    n, temperature = 6, 0.25
    unit = torch.eye(n, 8)
    loss, found = agreement_loss(unit, unit, temperature)  # -log(e^(1/t) / (e^(1/t) + n - 1))
    assert math.isclose(float(loss), math.log1p((n - 1) * math.exp(-1 / temperature)), rel_tol=1e-5) and float(found) == 1
    same, _ = agreement_loss(unit[:1].expand(n, -1), unit[:1].expand(n, -1), temperature)
    assert math.isclose(float(same), math.log(n), rel_tol=1e-5)  # nothing tells them apart
    _, swapped = agreement_loss(unit, unit.roll(1, 0), temperature)
    assert float(swapped) == 0


def test_a_pooled_prompt_is_the_direction_of_its_tokens(encoder: ByteTextEncoder) -> None:
    text = encoder.encode(PROMPTS)
    for row, vector in zip(text, pool(text), strict=True):
        mean = row[row.abs().sum(-1) > 0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())
