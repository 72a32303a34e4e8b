"""Loading and exporting published weights: names, shapes, layouts, prompts, single files, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_wan
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from kling import KlingPipeline, KlingTransformer3DModel, Request
from kling.errors import UserError
from kling.hub.detect import build_of, transformer_config
from kling.hub.files import read_shapes, read_tensors, weight_files
from kling.hub.keys import original_transformer_name, original_vae_name, transformer_name, vae_name
from kling.hub.load import find_folder, load_transformer, read_index
from kling.hub.registry import CHECKPOINTS, Build, by_build, by_name
from kling.text.umt5 import UMT5TextEncoder, clean_prompt

FP32 = {"torch_dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.saved("t2v", tmp_path_factory.mktemp("t2v"))


def original(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + original_transformer_name(name): t for name, t in state.items()}


# ---- names ----


def made_names() -> set[str]:
    """The original repository's names, from its source (wan/modules/model.py), for one block of every kind of model."""
    pairs = [
        "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2", "time_projection.1",
        "head.head", *(f"img_emb.proj.{i}" for i in (0, 1, 3, 4)), "blocks.0.norm3", "blocks.0.ffn.0", "blocks.0.ffn.2",
        *(f"blocks.0.{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"),
        "blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img",
    ]  # fmt: skip
    norms = [f"blocks.0.{kind}_attn.norm_{part}.weight" for kind in ("self", "cross") for part in "qk"]
    lone = ["head.modulation", "blocks.0.modulation", "blocks.0.cross_attn.norm_k_img.weight", *norms]
    return {f"{pair}.{kind}" for pair in pairs for kind in ("weight", "bias")} | set(lone)


def test_transformer_names_are_those_of_diffusers_converter() -> None:
    state = {name: torch.full((1,), float(i)) for i, name in enumerate(sorted(made_names()))}
    theirs = convert_wan_transformer_to_diffusers(dict(state))
    ours = {transformer_name(name): t for name, t in state.items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {original_transformer_name(name) for name in ours} == state.keys(), "and back"
    model = tiny_wan.transformer(in_channels=36, num_layers=1, **tiny_wan.IMAGE)
    assert model.state_dict().keys() == ours.keys(), "nothing is left over"


@pytest.mark.parametrize("config", [tiny_wan.VAE21, tiny_wan.VAE22], ids=["2.1", "2.2"])
@pytest.mark.parametrize("depth", [1, 2])
def test_vae_names_survive_a_round_trip(config: dict, depth: int) -> None:
    state = AutoencoderKLWan(**config | {"num_res_blocks": depth, "dim_mult": [1, 2, 4, 4]}).state_dict()
    nested = bool(config.get("is_residual"))
    names = {name: original_vae_name(name, depth, nested) for name in state}
    assert len(set(names.values())) == len(state)
    assert {name: vae_name(other, depth) for name, other in names.items()} == {name: name for name in state}
    assert not any("block" in name or "quant" in name for name in names.values())
    if not nested and depth == 2:  # diffusers' converter knows the published Wan 2.1 type
        theirs = convert_wan_vae_to_diffusers({names[name]: t for name, t in state.items()})
        assert theirs.keys() == state.keys() and all(theirs[name] is state[name] for name in state)
    if nested and depth == 2:  # as in the published Wan2.2_VAE
        published = ["encoder.downsamples.0.downsamples.2.resample.1.weight", "decoder.upsamples.0.upsamples.3.time_conv.weight"]
        published += ["encoder.downsamples.1.downsamples.0.shortcut.weight", "decoder.upsamples.3.upsamples.2.residual.6.bias"]
        assert set(published) <= set(names.values())


# ---- shapes ----

LAYOUTS = {
    "t2v": ({}, Build(128, 2)),
    "ti2v": ({"in_channels": 48, "out_channels": 48}, Build(128, 2, z=48)),
    "i2v": ({"in_channels": 36, **tiny_wan.IMAGE}, Build(128, 2, extra=20, image=True)),
    "flf2v": ({"in_channels": 36, **tiny_wan.IMAGE, "pos_embed_seq_len": 10}, Build(128, 2, extra=20, image=True, ends=True)),
    "no norm2": ({"cross_attn_norm": False}, Build(128, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_config_follows_from_the_shapes(layout: str) -> None:
    config, build = LAYOUTS[layout]
    model = tiny_wan.transformer(**config)
    found = transformer_config({name: tuple(t.shape) for name, t in model.state_dict().items()}, "it")
    same = {key: model.config[key] for key in found if key in model.config}
    assert {key: tuple(v) if isinstance(v, list | tuple) else v for key, v in same.items()} == found
    assert build_of(found) == build


def test_a_camera_adapter_is_detected() -> None:
    with torch.device("meta"):
        model = KlingTransformer3DModel((1, 2, 2), 1, 128, 32, 16, 32, 32, 64, 1, camera_channels=24)
    found = transformer_config({name: tuple(t.shape) for name, t in model.state_dict().items()}, "it")
    assert found["camera_channels"] == 24 and found["camera_residual_blocks"] == 1 and build_of(found).camera


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"vace_blocks.0.after_proj.weight": torch.ones(1)}, "VACE weights, which are not supported yet"),
        (lambda s: s | {"motion_encoder.enc.fc.0.weight": torch.ones(1)}, "Animate"),
        (lambda s: s | {"ref_conv.weight": torch.ones(1)}, "V1.1"),
        (lambda s: {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(1)}, "a text encoder"),
        (lambda s: {"decoder.conv1.weight": torch.ones(1)}, "a VAE"),
        (lambda s: {"blocks.0.self_attn.q.lora_A.weight": torch.ones(1)}, "a LoRA"),
        (lambda s: {"unet.down.0.weight": torch.ones(1), "x": torch.ones(1)}, "no Wan transformer.*unet.down.0.weight"),
        (lambda s: s | {"blocks.0.gadget.weight": torch.ones(1)}, "unknown blocks.0.gadget.weight"),
        (lambda s: {k: v for k, v in s.items() if k != "blocks.1.ffn.2.bias"}, "missing blocks.1.ffn.net.2.bias"),
        (lambda s: s | {"blocks.1.self_attn.q.weight": torch.ones(3, 3)}, r"blocks.1.attn1.to_q.weight is \(3, 3\)"),
    ],
)
def test_unknown_files_are_refused_with_the_unexpected_names(change, message: str, tmp_path: Path) -> None:
    save_file(change(original(tiny_wan.transformer().state_dict())), tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=message) as error:
        load_transformer(tmp_path / "odd.safetensors")
    assert "\n" not in str(error.value) and "odd.safetensors" in str(error.value)


# ---- files ----


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model.", "model._fsdp_wrapped_module."])
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_single_files_load_in_both_namings(naming: str, prefix: str, tmp_path: Path) -> None:
    model = tiny_wan.transformer()
    state = original(model.state_dict(), prefix) if naming == "original" else {prefix + k: v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    ours = load_transformer(tmp_path / "w.safetensors", torch.bfloat16)
    assert ours.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16 and ours.scale_shift_table.dtype == torch.float32
    exact = load_transformer(tmp_path / "w.safetensors")
    assert all(torch.equal(t, exact.state_dict()[name]) for name, t in model.state_dict().items())


def test_shards_load_and_a_missing_one_is_named(tmp_path: Path) -> None:
    model = tiny_wan.transformer()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert load_transformer(tmp_path).state_dict().keys() == model.state_dict().keys()
    assert read_shapes(tmp_path) == {name: tuple(t.shape) for name, t in model.state_dict().items()}
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of its {len(shards)} shards, '{shards[1].name}'"):
        read_tensors(tmp_path)


def test_pickles_and_damage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle.*safetensors"):
        read_shapes(tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(UserError, match="0 safetensors files.*Wan2.1_VAE.pth"):
        read_shapes(tmp_path)
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(UserError, match="half.safetensors is damaged"):
        read_shapes(tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="do not exist"):
        read_shapes(tmp_path / "none.safetensors")


def test_single_files_replace_parts_of_a_folder(folder: Path, tmp_path: Path) -> None:
    other = tiny_wan.transformer(seed=5)
    save_file(original(other.state_dict()), tmp_path / "dit.safetensors")
    vae = tiny_wan.vae(tiny_wan.VAE21).state_dict()
    save_file({original_vae_name(name, 1): t + 1 for name, t in vae.items()}, tmp_path / "vae.safetensors")
    pipe = KlingPipeline.from_pretrained(
        folder, transformer=tmp_path / "dit.safetensors", vae=tmp_path / "vae.safetensors", checkpoint="self-forcing-1.3b", **FP32
    )
    assert torch.equal(pipe.transformer.proj_out.weight, other.proj_out.weight)
    assert torch.equal(pipe.vae.quant_conv.weight, vae["quant_conv.weight"] + 1)
    assert (pipe.setting("shift"), pipe.setting("solver"), pipe.setting("num_inference_steps")) == (5.0, "renoise", 4)
    with pytest.raises(UserError, match="no published checkpoint is built like this"):
        KlingPipeline.from_pretrained(folder, transformer=tmp_path / "dit.safetensors", **FP32)


def test_a_transformer_that_needs_clip_says_so(folder: Path, tmp_path: Path) -> None:
    save_file(tiny_wan.transformer(in_channels=36, **tiny_wan.IMAGE).state_dict(), tmp_path / "inp.safetensors")
    with pytest.raises(UserError, match="no image_encoder: give the folder of a Wan 2.1 I2V model"):
        KlingPipeline.from_pretrained(folder, transformer=tmp_path / "inp.safetensors", checkpoint="wan2.1-fun-inp-1.3b", **FP32)


# ---- folders ----


def test_a_folder_keeps_its_own_shift_and_takes_the_rest_from_its_row(folder: Path) -> None:
    pipe = KlingPipeline.from_pretrained(folder, checkpoint="wan2.1-t2v-1.3b", **FP32)
    assert pipe.setting("shift") == 3.0 and pipe.setting("solver") == "UniPCMultistepScheduler"
    assert pipe.config.fps == 16 and pipe.config.max_frames == 81 and pipe.setting("guidance_scale") == [6.0, 6.0]
    plan = pipe.plan(_request())
    assert (plan.frames, plan.height, plan.width, plan.num_inference_steps) == (81, 480, 832, 50)
    with pytest.raises(UserError, match="not trained for 'image'"):
        pipe.plan(_request(image=torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()))
    with pytest.raises(UserError, match="did you mean 'wan2.1-t2v-14b'"):
        KlingPipeline.from_pretrained(folder, checkpoint="wan2.1-t2v-14", **FP32)


def test_the_row_follows_from_the_repository_s_name(folder: Path, tmp_path: Path) -> None:
    named = tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers" / "snapshots" / "0"
    named.parent.mkdir(parents=True)
    named.symlink_to(folder)
    assert KlingPipeline.from_pretrained(named, **FP32).setting("guidance_scale") == [6.0, 6.0]


def test_other_pipelines_and_schedulers_are_refused(tmp_path: Path) -> None:
    folder = tiny_wan.saved("t2v", tmp_path)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    kept = scheduler.read_text()
    scheduler.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(UserError, match="DDIMScheduler.*UniPC"):
        KlingPipeline.from_pretrained(folder, checkpoint="wan2.1-t2v-1.3b")
    scheduler.write_text(kept)
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"half")
    pipe = KlingPipeline.from_pretrained(folder, checkpoint="wan2.1-t2v-1.3b")
    with pytest.raises(UserError, match="text encoder"):
        pipe("a", num_frames=1, size="32x32")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "WanVACEPipeline"}))
    with pytest.raises(UserError, match="WanVACEPipeline, which is not supported"):
        KlingPipeline.from_pretrained(folder)


def test_a_hub_id_is_fetched_without_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot(repo: str, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert find_folder("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == folder
    assert asked["repo"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" and not any("pth" in p or "bin" in p for p in asked["patterns"])
    find_folder("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", weights=False)
    assert "*.safetensors" not in asked["patterns"] and "*.json" in asked["patterns"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be had from the hub"):
        find_folder("Wan-AI/No-Such-Thing")


def test_saved_and_loaded_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    pipe = KlingPipeline.from_pretrained(folder, checkpoint="wan2.1-t2v-1.3b", **FP32)
    pipe.save_pretrained(tmp_path / "ours")
    again = KlingPipeline.from_pretrained(tmp_path / "ours", **FP32)
    assert again.config.capabilities == pipe.config.capabilities and again.setting("shift") == 3.0
    fields = {"size": "48x32", "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(pipe("a ball", **fields).latents, again("a ball", **fields).latents)


# ---- the registry ----


def test_rows_are_identified_by_name_and_repository() -> None:
    assert len({row.name for row in CHECKPOINTS}) == len({row.repo for row in CHECKPOINTS}) == len(CHECKPOINTS)
    for row in CHECKPOINTS:
        assert by_name(row.name) is by_name(row.repo) is row
        assert all(h % 16 == w % 16 == 0 for h, w in row.sizes.values()) and row.frames % 4 == 1
    assert by_build(Build(5120, 40), experts=True).name == "wan2.2-t2v-a14b"
    assert by_build(Build(1536, 30), experts=False, plain=True).name == "wan2.1-t2v-1.3b"
    with pytest.raises(UserError, match="wan2.1-i2v-14b-480p, wan2.1-i2v-14b-720p"):
        by_build(Build(5120, 40, extra=20, image=True), experts=False)


# ---- prompts ----


@pytest.mark.parametrize(
    "prompt", ["  a  red\n ball &amp;amp; cube ", "一个红色的球，在草地上　滚动。", "Ã©tÃ© ﬁne “quoted”", "", "a" * 700]
)
def test_prompts_are_encoded_as_the_wan_pipelines_do(prompt: str, folder: Path) -> None:
    theirs = _pipeline(folder)
    expected, _ = theirs.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    ours = UMT5TextEncoder(folder, torch.float32, cut=True).encode([prompt])
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)
    assert "\n" not in clean_prompt(prompt) and "  " not in clean_prompt(prompt)


def test_a_plan_without_weights_has_the_real_dtypes_and_no_warnings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", lambda line, *args: warned.append(line))
    for path, more in ((folder, {"checkpoint": "wan2.1-t2v-1.3b"}), (None, {})):
        pipes = [KlingPipeline.from_pretrained(path, torch_dtype=torch.bfloat16, weights=weights, **more) for weights in (False, True)]
        for part in ("transformer", "vae"):
            planned, real = ({name: p.dtype for name, p in getattr(pipe, part).named_parameters()} for pipe in pipes)
            assert planned == real and (part == "vae" or set(planned.values()) == {torch.float32, torch.bfloat16})
    assert warned == []


def test_a_prompt_too_long_for_umt5_is_refused_or_cut_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here each letter is one token, plus an end token: 511 letters fit."""
    text, longest = UMT5TextEncoder(folder, torch.float32), "b" * 511
    assert text.encode([longest]).shape[1] == 512
    with pytest.raises(UserError, match="has 520 tokens, and umT5 reads 512: shorten it; from '(c ?){8}…' on it would be lost") as error:
        text.encode([longest + "c" * 8])
    assert "\n" not in str(error.value)
    monkeypatch.setattr(text, "_load", lambda device: pytest.fail("the prompt is refused before gigabytes are loaded"))
    with pytest.raises(UserError, match="has 1001 tokens"):
        text.encode(["d" * 1000])
    monkeypatch.undo()
    pipe = KlingPipeline.from_pretrained(folder, checkpoint="wan2.1-t2v-1.3b", **FP32)
    with pytest.raises(UserError, match="umT5 reads 512"):
        pipe("b" * 600, size="32x32", num_frames=1, num_inference_steps=1)
    cut = UMT5TextEncoder(folder, torch.float32, cut=True)
    assert torch.equal(cut.encode([longest + "c" * 8]), text.encode([longest])) and "has 520 tokens" in caplog.text


def test_the_encoder_is_loaded_for_new_prompts_only_and_freed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = UMT5TextEncoder(folder, torch.float32, cache=tmp_path)
    loads = []
    load = text._load
    monkeypatch.setattr(text, "_load", lambda device: loads.append(device) or load(device))
    first = text.encode(["a ball", "", "a ball"])
    assert not text.loaded and len(loads) == 2 and torch.equal(first[0], first[2])
    assert torch.equal(text.encode([" a ball "]), first[:1]) and len(loads) == 2
    fresh = UMT5TextEncoder(folder, torch.float32, cache=tmp_path)
    monkeypatch.setattr(fresh, "_load", lambda device: pytest.fail("the embedding is on disk"))
    assert torch.equal(fresh.encode(["a ball"]), first[:1])


def test_the_encoder_is_freed_before_the_transformer_runs(folder: Path) -> None:
    pipe = KlingPipeline.from_pretrained(folder, checkpoint="wan2.1-t2v-1.3b", **FP32)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(pipe.text_encoder.loaded))
    pipe("a ball", size="32x32", num_frames=1, num_inference_steps=1, output_type="latent")
    assert seen == [False, False]


def _pipeline(folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(folder)


def _request(**fields: object) -> Request:
    return Request("a ball", **fields)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", "", '{"a": '])
def test_an_index_that_is_none_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(UserError, match="is damaged: model_index.json is not readable") as error:
        read_index(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="is not readable"):
        weight_files(tmp_path)
