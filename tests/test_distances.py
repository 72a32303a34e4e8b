"""Distances in closed form; adapters with tiny random networks of the same interface; errors that say where to get weights."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from kling_programs.eval.evaluate import main
from torch import Tensor, nn

from kling.data.video import write_video
from kling.errors import UserError
from kling.metrics.distances import frechet, frechet_gaussians, mmd_polynomial
from kling.metrics.features import SOURCES, Weights, clip_network, clip_score, consistency, dino_network, lpips, video_features

CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------------- closed forms


def test_frechet_of_two_known_gaussians() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 9.0])  # variances that commute: sum of (σ₁ - σ₂)²
    assert frechet_gaussians(torch.zeros(3), a.diag(), torch.tensor([0.0, 3, 4]), b.diag()) == pytest.approx(25 + 1 + 1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    covariance = turn @ a.double().diag() @ turn.T
    values = np.linalg.eigvals(covariance.numpy() @ b.double().diag().numpy())  # tr (Σ₁Σ₂)^½, another way
    expected = 14 + 14 - 2 * np.sqrt(values.real).sum()
    assert frechet_gaussians(torch.zeros(3), covariance, torch.zeros(3), b.diag()) == pytest.approx(expected, abs=1e-6)


def test_frechet_of_samples() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 4, generator=g)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet(x, x + 2) == pytest.approx(16, abs=1e-6)  # same spread, means 2 apart in each of four
    assert frechet(x[:, :1], 3 * x[:, :1]) == pytest.approx(float(4 * (x[:, 0].mean() ** 2 + x[:, 0].var())), rel=1e-5)
    with pytest.raises(UserError, match="4 samples of 4 features each.*at least 5"):
        frechet(x[:4], x)


def test_mmd_by_hand() -> None:
    a, b = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[1.0, 1]])
    # γ = 1/2: k(a,a) is (.5)², 0, 0, 2²; k(b,b) is 1; k(a,b) is (.5)², 1
    assert mmd_polynomial(a, b) == pytest.approx((0.25 + 4) / 4 + 1 - 2 * (0.25 + 1) / 2)
    assert mmd_polynomial(a, a) == 0
    # the two values that JEDi's own code states for these sets (videojedi/mmd_polynomial.py)
    x, y = torch.arange(1.0, 10).view(3, 3), torch.tensor([[7.0, 6, 5], [4, 3, 2], [1, 1, 8], [0, 2, 5]])
    assert mmd_polynomial(x, y, gamma=1) == pytest.approx(2436.5)
    assert mmd_polynomial(x, y) == pytest.approx(270.7, abs=0.05)


def test_consistency_is_vbench_formula() -> None:
    turn = torch.tensor([[math.cos(t), math.sin(t)] for t in (0, math.pi / 3, 2 * math.pi / 3)])
    # to the first: ½ and max(-½, 0); to the one before: ½ and ½
    assert consistency(turn) == pytest.approx((0.5 + 0.5 + 0 + 0.5) / 4)
    assert consistency(turn[:1].expand(5, -1)) == pytest.approx(1)
    assert clip_score(turn, torch.tensor([[1.0, 0.0]])) == pytest.approx(100 * (1 + 0.5 + 0) / 3, abs=1e-4)
    with pytest.raises(UserError, match="at least 2 frames"):
        consistency(turn[:1])


# --------------------------------------------------------------------------------------------------------------- tiny networks


class TinyI3D(nn.Module):
    """The interface of StyleGAN-V's I3D: channel means, rescaled to [-1, 1] on request."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale and resize and return_features
        return (x * 2 / 255 - 1).mean([2, 3, 4])


class TinyVGG(nn.Module):
    """The interface of NVIDIA's LPIPS network: its features are the pixels over 255, each frame scaled so that distances are means."""

    def forward(self, x: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        assert not resize_images and return_lpips
        return x.flatten(1) / 255 / float(x[0].numel()) ** 0.5


def scripted(module: nn.Module, path: Path) -> str:
    """Save as torchscript; returns "PATH#SHA256"."""
    torch.jit.script(module).save(str(path))
    return f"{path}#{hashlib.sha256(path.read_bytes()).hexdigest()}"


def clips(*levels: int, frames: int = 16) -> list[Tensor]:
    return [torch.full((frames, 16, 24, 3), level, dtype=torch.uint8) for level in levels]


def test_fvd_features_follow_the_protocol(tmp_path: Path) -> None:
    weights = Weights.parse(f"fvd={scripted(TinyI3D(), tmp_path / 'i3d.pt')}")
    features = video_features(weights, clips(0, 255, 51), CPU)
    assert torch.allclose(features, torch.tensor([[-1.0] * 3, [1.0] * 3, [-0.6] * 3]))
    with pytest.raises(UserError, match="a clip has 9 frames, fvd needs 16"):
        video_features(weights, clips(0, frames=9), CPU)


def test_lpips_of_constant_pictures(tmp_path: Path) -> None:
    distance = lpips(Weights.parse(f"lpips={scripted(TinyVGG(), tmp_path / 'vgg.pt')}"), CPU)
    black, grey = clips(0, 51)
    assert distance(black, black) == 0 and distance(black, grey) == pytest.approx(0.04, abs=1e-6)


@pytest.mark.slow  # the import of CLIP alone takes a minute on a busy core
def test_tiny_clip_and_dino_folders(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**shape, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(tmp_path / "dino")
    vision = shape | {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=shape | {"vocab_size": 64}, projection_dim=8)).save_pretrained(tmp_path / "clip")
    frames = torch.randint(0, 256, (3, 40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, network in (("dino", dino_network), ("clip", lambda w, d: clip_network(w, d)[0])):
        weights = Weights.parse(f"{name}={tmp_path / name}")
        assert weights.sha256 == hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()
        seen = network(weights, CPU)(frames)
        assert torch.allclose(seen.norm(dim=1), torch.ones(3), atol=1e-5)
        assert consistency(network(weights, CPU)(frames[:1].expand(3, -1, -1, -1))) == pytest.approx(1, abs=1e-5)


# -------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", SOURCES)
def test_the_error_for_missing_weights_says_where_to_get_them(name: str) -> None:
    with pytest.raises(UserError) as error:
        Weights.parse(f"{name}=nowhere")
    assert str(error.value).startswith(f"{name} needs weights") and SOURCES[name].where in str(error.value)


def test_a_script_is_opened_only_with_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "i3d.pt"
    scripted(TinyI3D(), path)
    with pytest.raises(UserError, match="can run code"):
        Weights.parse(f"fvd={path}")
    with pytest.raises(UserError, match="has SHA-256 .*, not abc"):
        Weights.parse(f"fvd={path}#abc")
    path.write_bytes(b"no script")
    with pytest.raises(UserError, match="is no torchscript file"):
        Weights.parse(f"fvd={path}#{hashlib.sha256(b'no script').hexdigest()}").script(CPU)
    with pytest.raises(UserError, match="unknown metric 'fdv'.*'fvd'"):
        Weights.parse("fdv=x")
    with pytest.raises(UserError, match="holds no safetensors"):
        Weights.parse(f"dino={tmp_path}")


# ----------------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_protocol_and_controls(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    g = torch.Generator().manual_seed(0)
    for folder in ("made", "true"):
        for k in range(5):
            colour = torch.randint(40, 215, (1, 1, 1, 3), generator=g)
            write_video(tmp_path / folder / f"{k}.mp4", colour.expand(16, 32, 32, -1).to(torch.uint8), 8)
    options = ["--reference", str(tmp_path / "true"), "--out", str(tmp_path / "out")]
    fvd, vgg = scripted(TinyI3D(), tmp_path / "i3d.pt"), scripted(TinyVGG(), tmp_path / "vgg.pt")
    main(["features", str(tmp_path / "made"), *options, "--with", f"fvd={fvd}", "--with", f"lpips={vgg}"])
    out = capsys.readouterr().out
    assert "FVD: N 5, frames 16, stride 1, size 32x32, resize inside, 224, sha256 " + fvd.rpartition("#")[2] in out
    assert "| truth | noise |" in out
    with pytest.raises(SystemExit) as stop:
        main(["features", str(tmp_path / "made"), "--out", str(tmp_path / "out"), "--with", f"fvd={fvd}"])
    assert stop.value.code == 2 and "give --reference" in capsys.readouterr().err
