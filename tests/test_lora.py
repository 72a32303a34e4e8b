"""LoRAs go both ways between diffusers and us, and foreign ones load with the same effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_wan
import torch
from diffusers import WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from kling import KlingPipeline
from kling.errors import UserError
from kling.hub.lora import add_loras

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.saved("t2v-a14b", tmp_path_factory.mktemp("wan"))


def ours(folder: Path) -> KlingPipeline:
    return KlingPipeline.from_pretrained(folder, checkpoint="wan2.2-t2v-a14b", torch_dtype=torch.float32)


def outputs(theirs: torch.nn.Module, mine: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    z, text = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 7, 32)
    with torch.no_grad():
        return theirs(z, torch.tensor([500]), text).sample, mine(z, torch.tensor([0.5], dtype=torch.float64), text).sample


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """An adapter that does something."""
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False))
    return get_peft_model_state_dict(model)


def test_ours_loads_in_diffusers_and_theirs_in_ours(folder: Path, tmp_path: Path) -> None:
    theirs, pipe = WanPipeline.from_pretrained(folder), ours(folder)
    plain = outputs(theirs.transformer, pipe.transformer)
    layers = trained(pipe.transformer)
    KlingPipeline.save_lora_weights(tmp_path / "ours", transformer_lora_layers=layers)
    theirs.load_lora_weights(tmp_path / "ours")
    theirs.set_adapters(["default_0"], [2.0])  # alpha / rank, which the file does not hold
    a, b = outputs(theirs.transformer, pipe.transformer)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (b - plain[1]).abs().max() > 1e-3

    WanPipeline.save_lora_weights(
        tmp_path / "theirs", transformer_lora_layers=get_peft_model_state_dict(theirs.transformer, adapter_name="default_0")
    )
    fresh = ours(folder)
    add_loras(fresh, [(str(tmp_path / "theirs" / "pytorch_lora_weights.safetensors"), 2.0)])
    torch.testing.assert_close(outputs(theirs.transformer, fresh.transformer)[1], a, atol=1e-5, rtol=1e-5)


def foreign(folder: Path, path: Path) -> Path:
    """The original repository's naming, as most published LoRAs of Wan have it, with an alpha."""
    torch.manual_seed(2)
    state = {}
    for block in range(2):
        for layer in ("self_attn.q", "self_attn.o", "cross_attn.v", "ffn.0"):
            out, into = (64, 128) if layer == "ffn.0" else (128, 128)
            key = f"diffusion_model.blocks.{block}.{layer}"
            state |= {f"{key}.lora_down.weight": torch.randn(4, into), f"{key}.lora_up.weight": torch.randn(out, 4) * 0.1}
            state |= {f"{key}.alpha": torch.tensor(2.0)}
    save_file(state, path)
    return path


@pytest.mark.parametrize("second", [False, True])
def test_a_foreign_lora_has_the_effect_that_it_has_in_diffusers(second: bool, folder: Path, tmp_path: Path) -> None:
    file = foreign(folder, tmp_path / "foreign.safetensors")
    theirs, pipe = WanPipeline.from_pretrained(folder), ours(folder)
    theirs.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="x", load_into_transformer_2=second)
    (theirs.transformer_2 if second else theirs.transformer).set_adapters(["x"], [0.7])
    add_loras(pipe, [(str(file), 0.7)], second)
    for name in ("transformer", "transformer_2"):
        torch.testing.assert_close(*outputs(getattr(theirs, name), getattr(pipe, name)), atol=1e-5, rtol=1e-5)
    assert hasattr(pipe.transformer_2, "peft_config") == second


def test_what_is_no_lora_is_refused(folder: Path, tmp_path: Path) -> None:
    pipe = ours(folder)
    save_file({"blocks.0.attn1.to_q.weight": torch.ones(128, 128)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no LoRA that fits"):
        add_loras(pipe, [(str(tmp_path / "model.safetensors"), 1.0)])
    with pytest.raises(UserError, match="do not exist"):
        add_loras(pipe, [(str(tmp_path / "none.safetensors"), 1.0)])
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        add_loras(pipe, [(str(tmp_path / "x.pt"), 1.0)])
    pipe.transformer_2 = None
    with pytest.raises(UserError, match="one only"):
        add_loras(pipe, [("x", 1.0)], second=True)
