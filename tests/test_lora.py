"""LoRAs are exchanged with diffusers in both directions, and those of other tools load with the same effect."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_wan
import torch
from diffusers import WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

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
    """A trained adapter, whose effect is not zero."""
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
    """The original repository's naming, with an alpha, as in most published LoRAs for Wan."""
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
def test_a_foreign_lora_has_the_same_effect_as_in_diffusers(second: bool, folder: Path, tmp_path: Path) -> None:
    file = foreign(folder, tmp_path / "foreign.safetensors")
    theirs, pipe = WanPipeline.from_pretrained(folder), ours(folder)
    theirs.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="x", load_into_transformer_2=second)
    (theirs.transformer_2 if second else theirs.transformer).set_adapters(["x"], [0.7])
    add_loras(pipe, [(str(file), 0.7)], second)
    for name in ("transformer", "transformer_2"):
        torch.testing.assert_close(*outputs(getattr(theirs, name), getattr(pipe, name)), atol=1e-5, rtol=1e-5)
    assert hasattr(pipe.transformer_2, "peft_config") == second


# ------------------------------------------------------------------------------- every naming, against the sum written out by hand

ORIGINAL = {"attn1.to_q": "self_attn.q", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0"}
SHAPES = {"attn1.to_q": (128, 128), "attn2.to_out.0": (128, 128), "ffn.net.0.proj": (64, 128)}
Naming = Callable[[str, str, bool], str]  # (block's name and layer's name of ours, A or B) -> key
NAMINGS: dict[str, Naming] = {
    "diffusers": lambda block, layer, up: f"transformer.{block}.{layer}.lora_{'AB'[up]}.weight",
    "peft": lambda block, layer, up: f"base_model.model.{block}.{layer}.lora_{'AB'[up]}.weight",
    "peft, an adapter's name": lambda block, layer, up: f"base_model.model.{block}.{layer}.lora_{'AB'[up]}.default.weight",
    "DiffSynth": lambda block, layer, up: f"{block}.{ORIGINAL[layer]}.lora_{'AB'[up]}.default.weight",
    "DiffSynth, of a pipeline": lambda block, layer, up: f"pipe.dit.{block}.{ORIGINAL[layer]}.lora_{'AB'[up]}.weight",
    "ComfyUI": lambda block, layer, up: f"diffusion_model.{block}.{ORIGINAL[layer]}.lora_{('down', 'up')[up]}.weight",
    "musubi": lambda block, layer, up: f"lora_unet_{block}_{ORIGINAL[layer]}".replace(".", "_") + f".lora_{('down', 'up')[up]}.weight",
    "old diffusers": lambda block, layer, up: f"transformer.{block}.{layer}.lora.{('down', 'up')[up]}.weight",
}


def matrices() -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return {
        (f"blocks.{block}", layer): (torch.randn(4, into), torch.randn(out, 4) * 0.1)
        for block in range(2)
        for layer, (out, into) in SHAPES.items()
        if (block, layer) != (1, "ffn.net.0.proj")  # as trainers that train some layers only
    }


def load_from_python(pipe: KlingPipeline, file: Path, scale: float) -> None:
    """diffusers' way, which is the same reader."""
    pipe.load_lora_weights(file, adapter_name="mine")
    pipe.transformer.set_adapters(["mine"], [scale])


def load_tensors(pipe: KlingPipeline, file: Path, scale: float) -> None:
    pipe.load_lora_weights(load_file(file), adapter_name="mine")
    pipe.transformer.set_adapters(["mine"], [scale])


def load_from_words(pipe: KlingPipeline, file: Path, scale: float) -> None:
    add_loras(pipe, [(str(file), scale)])


DOORS = {"command line": load_from_words, "Python": load_from_python, "Python, tensors": load_tensors}
Door = Callable[[KlingPipeline, Path, float], None]


def written(path: Path, naming: str, alpha: float | None = None, **more: torch.Tensor) -> Path:
    state = dict(more)
    for (block, layer), (down, up) in matrices().items():
        names = [NAMINGS[naming](block, layer, which) for which in (False, True)]
        state |= {names[0]: down.clone(), names[1]: up.clone()}
        if alpha is not None:
            state[names[0].rpartition(".lora")[0] + ".alpha"] = torch.tensor(alpha)
    path.parent.mkdir(exist_ok=True)
    save_file(state, path)
    return path


def by_hand(folder: Path, scale: float, **whole: torch.Tensor) -> KlingPipeline:
    """The model with scale · B A, and full differences, added to its weights."""
    pipe = ours(folder)
    with torch.no_grad():
        for (block, layer), (down, up) in matrices().items():
            pipe.transformer.get_parameter(f"{block}.{layer}.weight").add_(scale * up @ down)
        for name, change in whole.items():
            pipe.transformer.get_parameter(name).add_(change)
    return pipe


def same(expected: torch.nn.Module, found: torch.nn.Module) -> None:
    a, b = (outputs(model, model)[1] for model in (expected, found))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(("alpha", "door"), [(None, "command line"), (2.0, "command line"), (None, "Python"), (2.0, "Python, tensors")])
def test_every_naming_is_read_with_the_same_effect(naming: str, alpha: float | None, door: str, folder: Path, tmp_path: Path) -> None:
    pipe, file = ours(folder), written(tmp_path / "x.safetensors", naming, alpha)
    DOORS[door](pipe, file, 0.7)
    expected = by_hand(folder, 0.7 * (1.0 if alpha is None else alpha / 4))
    same(expected.transformer, pipe.transformer)
    assert all(not p.is_meta for p in pipe.transformer.parameters())


def test_norms_tables_and_biases_of_distilled_loras_are_applied(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(4)
    names = {  # the original's name -> ours
        "blocks.0.norm3.diff": "blocks.0.norm2.weight", "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight", "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "blocks.1.modulation.diff": "blocks.1.scale_shift_table", "head.modulation.diff": "scale_shift_table",
        "head.head.diff": "proj_out.weight", "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
        "patch_embedding.diff": "patch_embedding.weight",
    }  # fmt: skip
    model = ours(folder).transformer
    changes = {theirs: torch.randn(model.get_parameter(mine).shape) * 0.05 for theirs, mine in names.items()}
    file = written(tmp_path / "x.safetensors", "ComfyUI", **{f"diffusion_model.{name}": change for name, change in changes.items()})
    pipe = ours(folder)
    with caplog.at_level(logging.WARNING):
        add_loras(pipe, [(str(file), 0.5)])
    expected = by_hand(folder, 0.5, **{names[theirs]: 0.5 * change for theirs, change in changes.items()})
    same(expected.transformer, pipe.transformer)
    assert not caplog.records


def test_a_bias_of_pefts_on_one_layer_only(folder: Path, tmp_path: Path) -> None:
    bias = torch.randn(128, generator=torch.Generator().manual_seed(5))
    file = written(tmp_path / "x.safetensors", "diffusers", **{"transformer.blocks.0.attn1.to_q.lora_B.bias": bias})
    pipe = ours(folder)
    add_loras(pipe, [(str(file), 1.0)])
    expected = by_hand(folder, 1.0, **{"blocks.0.attn1.to_q.bias": bias})
    same(expected.transformer, pipe.transformer)


def test_alpha_of_peft_s_settings_is_applied(folder: Path, tmp_path: Path) -> None:
    """lora_alpha in the JSON beside peft's own file, and an alpha_pattern that overrides it."""
    written(tmp_path / "adapter_model.safetensors", "peft")
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"blocks.0.attn1.to_q": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    pipe = ours(folder)
    add_loras(pipe, [(str(tmp_path / "adapter_model.safetensors"), 1.0)])
    same(by_hand(folder, 2.0).transformer, pipe.transformer)


@pytest.mark.parametrize("door", DOORS)
def test_unused_tensors_are_named_in_one_line(door: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Image layers of an image-to-video LoRA, the text encoder's, a bias where there is none, and an unknown name."""
    odd = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(4, 128),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.ones(128, 4),
        "lora_te_text_model_encoder.lora_down.weight": torch.ones(4, 4),
        "diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.ones(128),
        "what_is_this": torch.ones(1),
    }
    pipe = ours(folder)
    with caplog.at_level(logging.WARNING, "kling"):
        DOORS[door](pipe, written(tmp_path / "x.safetensors", "ComfyUI", **odd), 1.0)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "5 of its 15 tensors are not used" in said and "k_img" in said and "\n" not in said
    same(by_hand(folder, 1.0).transformer, pipe.transformer)


Q = "diffusion_model.blocks.0.cross_attn.q"
TROUBLES = {
    "half a layer": ({f"{Q}.lora_down.weight": torch.ones(4, 128)}, "incomplete: of blocks.0.attn2.to_q"),
    "the other half": ({f"{Q}.lora_up.weight": torch.ones(128, 4)}, "incomplete: of blocks.0.attn2.to_q"),
    "an alpha alone": ({f"{Q}.alpha": torch.tensor(4.0)}, "no matrices"),
    "NaN": ({f"{Q}.lora_down.weight": torch.full((4, 128), torch.nan), f"{Q}.lora_up.weight": torch.ones(128, 4)}, "holds NaN"),
    "integers": ({f"{Q}.lora_down.weight": torch.ones(4, 128).int(), f"{Q}.lora_up.weight": torch.ones(128, 4).int()}, "int32 numbers"),
    "another size": ({f"{Q}.lora_down.weight": torch.ones(4, 64), f"{Q}.lora_up.weight": torch.ones(64, 4)}, "is 128x128, the file's 64"),
    "two ranks": ({f"{Q}.lora_down.weight": torch.ones(4, 128), f"{Q}.lora_up.weight": torch.ones(128, 8)}, "no LoRA that fits"),
    "a norm of another size": ({"blocks.0.norm3.diff": torch.ones(64)}, "is 128, the file's 64"),
    "DoRA": ({f"{Q}.dora_scale": torch.ones(128)}, "is a DoRA"),
    "LoKr": ({f"{Q}.lokr_w1": torch.ones(4, 4)}, "is a LoKr"),
    "two adapters": (
        {f"blocks.0.cross_attn.q.lora_A.{name}.weight": torch.ones(4, 128) for name in ("default", "other")}, "holds two adapters",
    ),
    "one layer in two namings": (
        {f"{name}.lora_{part}.weight": torch.ones(shape) for name in ("blocks.0.cross_attn.q", "blocks.0.attn2.to_q")
         for part, shape in (("A", (4, 128)), ("B", (128, 4)))}, "twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_damaged_or_unsupported_file_is_refused_in_one_line(trouble: str, door: str, folder: Path, tmp_path: Path) -> None:
    odd, says = TROUBLES[trouble]
    file = written(tmp_path / "x.safetensors", "musubi", **odd)
    pipe = ours(folder)
    with pytest.raises(UserError, match=says) as error:
        DOORS[door](pipe, file, 1.0)
    assert "\n" not in str(error.value) and ("the LoRA given" if door == "Python, tensors" else str(file)) in str(error.value)
    assert not hasattr(pipe.transformer, "peft_config"), "nothing is applied of it"


def test_a_file_for_both_experts_gives_each_its_part(folder: Path, tmp_path: Path) -> None:
    state = {}
    for (block, layer), pair in matrices().items():
        for up, x in enumerate(pair):
            key = NAMINGS["diffusers"](block, layer, up)
            state |= {key: x.clone(), key.replace("transformer", "transformer_2"): x + 1}
    save_file(state, tmp_path / "x.safetensors")
    pipe = ours(folder)
    add_loras(pipe, [(str(tmp_path / "x.safetensors"), 1.0)])
    same(by_hand(folder, 1.0).transformer, pipe.transformer)


def test_from_python_it_is_found_in_folders_and_adapters_have_names(folder: Path, tmp_path: Path) -> None:
    pipe, expected = ours(folder), by_hand(folder, 1.0)
    written(tmp_path / "a" / "x.safetensors", "musubi")
    pipe.load_lora_weights(tmp_path / "a")
    same(expected.transformer, pipe.transformer)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(str(tmp_path / "a"), weight_name="x.safetensors", adapter_name="style", load_into_transformer_2=True)
    other = ours(folder)
    add_loras(other, [(str(tmp_path / "a" / "x.safetensors"), 1.0)], second=True)
    same(other.transformer_2, pipe.transformer_2)
    with pytest.raises(UserError, match="there is an adapter 'style' already"):
        pipe.load_lora_weights(tmp_path / "a", adapter_name="style", load_into_transformer_2=True)
    for given, says in (
        ({"lora": tmp_path / "a", "weight_name": "y.safetensors"}, "holds no y.safetensors"), ({"lora": tmp_path / "none"}, "do not exist"),
        ({"lora": tmp_path / "a", "revision": "main"}, "revision is for what comes from the hub"),
        ({"lora": "nobody/nothing", "weight_name": "x.safetensors"}, "cannot be had from the hub"), ({"lora": "a/x.pt"}, "pickle"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says) as error:
            pipe.load_lora_weights(**given)
        assert "\n" not in str(error.value)


def test_a_file_that_is_no_lora_is_refused(folder: Path, tmp_path: Path) -> None:
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
