"""`kling-export`: other tools load the result, and exporting back gives the same file."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import tiny_wan
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from kling_programs.sample.export import main
from safetensors.torch import load_file

from kling import KlingFlowScheduler, KlingPipeline, KlingTransformer3DModel
from kling.errors import UserError
from kling.hub.export import NAMINGS, export_weights
from kling.hub.load import load_transformer
from kling.sampling.pipeline import ASSETS
from kling.text.umt5 import UMT5TextEncoder

ROWS = {"t2v": "wan2.1-t2v-1.3b", "ti2v": "wan2.2-ti2v-5b", "i2v": "wan2.1-i2v-14b-480p", "t2v-a14b": "wan2.2-t2v-a14b"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("layout", ROWS)
def test_saved_folders_load_in_diffusers(layout: str, tmp_path: Path) -> None:
    """A Wan folder -> our pipeline -> our folder -> export -> diffusers' own classes, with the same tensors and settings."""
    theirs = tiny_wan.pipeline(layout)
    theirs.save_pretrained(tmp_path / "published")
    pipe = KlingPipeline.from_pretrained(tmp_path / "published", torch_dtype=torch.float32, checkpoint=ROWS[layout])
    pipe.save_pretrained(tmp_path / "ours")
    export_weights(tmp_path / "ours", tmp_path / "back")
    back = DiffusionPipeline.from_pretrained(tmp_path / "back")
    for name in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
        if (before := getattr(theirs, name, None)) is not None:
            after = getattr(back, name)
            assert type(after) is type(before) and same(after.state_dict(), before.state_dict()), name
    assert back.config.boundary_ratio == theirs.config.boundary_ratio
    assert back.config.expand_timesteps == theirs.config.expand_timesteps
    assert back.scheduler.config.flow_shift == 3.0
    assert layout == "ti2v" or type(back) is type(theirs)  # published as a text pipeline; either class loads it


@pytest.mark.parametrize("layout", ["t2v", "ti2v", "t2v-a14b"])
def test_original_naming_survives_a_round_trip(layout: str, tmp_path: Path) -> None:
    folder = tiny_wan.saved(layout, tmp_path / "published")
    export_weights(folder, tmp_path / "original", "original")
    experts = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"} if "a14b" in layout else {"transformer": "."}
    for part, place in experts.items():
        published, written = tensors(folder / part), load_file(tmp_path / "original" / place / "diffusion_pytorch_model.safetensors")
        assert "blocks.0.self_attn.q.weight" in written and same(convert_wan_transformer_to_diffusers(dict(written)), published)
        assert same(load_transformer(tmp_path / "original" / place).state_dict(), published)
        export_weights(tmp_path / "original" / place / "diffusion_pytorch_model.safetensors", tmp_path / f"back-{part}")
        assert same(WanTransformer3DModel.from_pretrained(tmp_path / f"back-{part}").state_dict(), published)
    pipe = KlingPipeline.from_pretrained(
        folder, vae=tmp_path / "original" / "Wan_VAE.safetensors", torch_dtype=torch.float32, checkpoint=ROWS[layout]
    )
    assert same(pipe.vae.state_dict(), AutoencoderKLWan.from_pretrained(folder / "vae").state_dict())


def test_half_precision_survives(tmp_path: Path) -> None:
    model = tiny_wan.transformer().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    export_weights(tmp_path / "bf16", tmp_path / "original", "original")
    export_weights(tmp_path / "original", tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(tmp_path / "bf16"))


@pytest.mark.parametrize(("solver", "stochastic"), [("renoise", True), ("euler", False)])
def test_our_scheduler_becomes_the_one_of_diffusers_that_does_the_same(solver: str, stochastic: bool, tmp_path: Path) -> None:
    pipe = KlingPipeline.from_pretrained(
        tiny_wan.saved("t2v", tmp_path / "published"), torch_dtype=torch.float32, checkpoint="wan2.1-t2v-1.3b"
    )
    pipe.scheduler = KlingFlowScheduler(shift=5.0, solver=solver)
    pipe.save_pretrained(tmp_path / "ours")
    export_weights(tmp_path / "ours", tmp_path / "back")
    config = DiffusionPipeline.from_pretrained(tmp_path / "back").scheduler.config
    assert config.shift == 5.0 and config.stochastic_sampling == stochastic


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_flow_map_is_refused(naming: str, tmp_path: Path) -> None:
    """No Wan pipeline tells its transformer where a step ends; without that the weights make something else."""
    tiny_wan.transformer().save_pretrained(tmp_path / "plain")
    KlingTransformer3DModel.from_pretrained(tmp_path / "plain", gate_value=0.25).save_pretrained(tmp_path / "map")
    with pytest.raises(UserError, match="map is a flow map"):
        export_weights(tmp_path / "map", tmp_path / "out", naming)
    assert not (tmp_path / "out").exists()


def test_a_save_that_fails_leaves_the_pipeline_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = KlingPipeline.from_pretrained(tiny_wan.saved("t2v", tmp_path / "published"), checkpoint=ROWS["t2v"])

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        pipe.save_pretrained(tmp_path / "ours")
    assert isinstance(pipe.text_encoder, UMT5TextEncoder)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([str(ASSETS), "out"], "text encoder of its own"),
        ([str(ASSETS / "transformer"), "out"], "control_adapter, kind_embedding, track_embedding, which diffusers"),
        (["nowhere", "out"], "nowhere.*do not exist"),
        ([str(ASSETS), "."], "exists already"),
        ([str(ASSETS), "out", "--naming", "orginal"], "did you mean 'original'"),
        ([str(ASSETS)], "FOLDER.*--help"),
        ([str(ASSETS), "out", "--naming", ""], "error: --naming is empty"),
        (["", "out"], "error: model is empty"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(argv: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


def test_the_program_reports_the_written_files(tmp_path: Path, capsys) -> None:
    model = tiny_wan.transformer()
    model.save_pretrained(tmp_path / "m")
    main([str(tmp_path / "m"), str(tmp_path / "o"), "--naming", "original"])
    assert "2 files" in capsys.readouterr().out


def test_the_shipped_weights_do_not_contain_paths_of_their_training() -> None:
    assert not [path for path in ASSETS.rglob("*.json") if "_name_or_path" in path.read_text()]
