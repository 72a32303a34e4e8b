"""The second half of the VAE's training: the discriminator and its losses, perceptual features, and the paths of a clip."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import workers
from safetensors.torch import load_file, save_file

from kling.errors import UserError
from kling.runtime.checkpoint import load_latest
from kling.vae import AutoencoderKLKling, LossWeights, vae_loss
from kling.vae.discriminator import Adversary, PatchDiscriminator3d, Perceptual, frozen, generator_loss, hinge
from kling.vae.paths import Autoencoding, half, half_tiles

import train_vae  # isort: skip - train/, which `workers` puts on the path


def test_one_critic_scores_images_and_videos() -> None:
    critic = PatchDiscriminator3d(width=8)
    assert critic(torch.randn(2, 3, 1, 32, 48)).shape == (2, 1, 1, 4, 6)
    assert critic(torch.randn(1, 3, 17, 32, 48)).shape == (1, 1, 5, 4, 6)
    far = torch.randn(1, 3, 5, 64, 64, requires_grad=True)
    critic(far)[..., 0, 0].sum().backward()
    assert far.grad[..., :16, :16].abs().sum() > 0 and far.grad[..., 48:, 48:].abs().sum() == 0, "a score is of a patch"


def test_hinge() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge(real, fake) == 0.25 + 0.5 and generator_loss(fake) == 1.5


def test_a_frozen_critic_gives_gradients_without_learning() -> None:
    critic, video = PatchDiscriminator3d(width=8), torch.randn(1, 3, 1, 16, 16, requires_grad=True)
    with frozen(critic):
        generator_loss(critic(video)).backward()
    assert video.grad.abs().sum() > 0 and all(p.grad is None and p.requires_grad for p in critic.parameters())


def test_the_critic_warms_up_before_it_affects_the_generator() -> None:
    adversary = Adversary(weight=0.5, start=100, warmup=10)
    assert [adversary.weight_at(step) for step in (0, 100, 110, 115, 120, 1000)] == [0, 0, 0, 0.25, 0.5, 0.5]


def test_a_critic_learns_to_distinguish_noise_from_ramps() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator3d(width=8)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.5, 0.9))
    ramp = torch.linspace(-1, 1, 32).expand(4, 3, 5, 32, 32)
    losses = []
    for _ in range(25):
        loss = hinge(critic(ramp), critic(torch.randn(4, 3, 5, 32, 32)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with torchvision's names and shapes, and small random weights."""
    g = torch.Generator().manual_seed(0)
    tensors, channels, place = {"classifier.0.weight": torch.zeros(1)}, 3, 0
    for width in Perceptual.LAYERS:
        if width:
            tensors[f"features.{place}.weight"] = torch.randn(width, channels, 3, 3, generator=g) / (9 * channels) ** 0.5
            tensors[f"features.{place}.bias"] = torch.zeros(width)
            channels, place = width, place + 2
        else:
            place += 1
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(tensors, path)
    return path


def test_perceptual_distance(vgg: Path, tmp_path: Path) -> None:
    perceptual = Perceptual(vgg)
    assert [place for place, layer in enumerate(perceptual.features) if isinstance(layer, torch.nn.Conv2d)] == [
        0,
        2,
        5,
        7,
        10,
        12,
        14,
        17,
        19,
        21,
        24,
        26,
        28,
    ]  # fmt: skip - torchvision's places
    video = torch.rand(1, 3, 2, 32, 32) * 2 - 1
    assert perceptual(video, video) == 0
    near, far = (perceptual(video, video + s * torch.randn_like(video)) for s in (0.05, 0.5))
    assert 0 < near < far
    (tmp_path / "weights.pth").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="weights.pth' cannot be read"):
        Perceptual(tmp_path / "weights.pth")
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="are not VGG-16"):
        Perceptual(tmp_path / "other.safetensors")


def test_paths_through_the_vae() -> None:
    """Streaming is exact, including gradients; tiles are close, and use every weight."""
    torch.manual_seed(0)
    net = Autoencoding(AutoencoderKLKling(**workers.TINY_VAE))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    found = {}
    for path in ("whole", "streamed", "tiled"):
        net.zero_grad()
        recon, posterior, _ = net(video, path)
        assert recon.shape == video.shape and posterior.mean.shape == (1, 16, 3, 4, 6)
        recon.square().mean().backward()
        found[path] = recon.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["streamed"][0], found["whole"][0], atol=1e-5, rtol=1e-4)
    for name, grad in found["whole"][1].items():
        torch.testing.assert_close(found["streamed"][1][name], grad, atol=1e-5 * float(grad.abs().max() + 1e-6) + 1e-7, rtol=1e-3, msg=name)
    assert found["tiled"][1].keys() == found["whole"][1].keys() and not torch.equal(found["tiled"][0], found["whole"][0])
    assert half_tiles(6, 8).starts(48) == [0, 16], "two tiles, which overlap"


def test_a_draw_and_halved_latents() -> None:
    """The decoder gets mean plus deviation times the generator's noise; halved latents give the halved size and train the encoder."""
    torch.manual_seed(0)
    net = Autoencoding(AutoencoderKLKling(**workers.TINY_VAE))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    video = torch.rand(2, 3, 5, 32, 48) * 2 - 1
    drawn, posterior, small = net(video, draw=torch.Generator().manual_seed(3), halved=True)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, net.vae._decode(posterior.mean + posterior.std * noise))
    assert small.shape == half(video).shape == (2, 3, 5, 16, 24)
    loss, _ = vae_loss(video, drawn, posterior, LossWeights(1, 0, 0, 0, halved=0.25), (half(video), small))
    apart = [((a - b).square() + 1e-6).sqrt().mean() - 1e-3 for a, b in ((drawn, video), (small, half(video)))]
    torch.testing.assert_close(loss, apart[0] + 0.25 * apart[1])
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in net.named_parameters() if "encoder" in name and "weight" in name
    )
    torch.testing.assert_close(half(video)[0, 0, 0, 0, 0], video[0, 0, 0, :2, :2].mean())


WORDS = [
    "configs/vae/debug.yaml", "model.base_dim=4", "model.decoder_base_dim=4", "model.dim_mult=[1,1,1]", "schedule=constant", "batch=1",
    "data.frames=[1,5]", "data.aspects=['16:9']", "eval_clips=1", "workers=0", "threads=1", "log_every=1", "save_every=2", "eval_every=100",
    "mixed_precision=fp32",
]  # fmt: skip


def test_training_with_a_critic_resumes_bit_for_bit(vgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_vae, "latent_statistics", lambda model, cfg: (torch.zeros(16), torch.ones(16)))  # 32 clips, not needed here
    extra = ["adversary.weight=0.1", "adversary.start=1", "adversary.warmup=1", "adversary.width=4", "perceptual=0.1",
             f"perceptual_weights={vgg}", "paths={whole: 1, streamed: 1, tiled: 1}"]  # fmt: skip
    train_vae.main([*WORDS, *extra, "steps=4", f"out={tmp_path / 'straight'}"])
    train_vae.main([*WORDS, *extra, "steps=2", f"out={tmp_path / 'resumed'}"])
    train_vae.main([*WORDS, *extra, "steps=4", f"out={tmp_path / 'resumed'}"])
    a, b = (load_latest(tmp_path / name) for name in ("straight", "resumed"))
    assert a is not None and b is not None and set(a.tensors) == {"model", "optimizer", "ema", "critic_model", "critic_optimizer"}
    for name, rows in a.tensors.items():
        assert all(torch.equal(rows[key], b.tensors[name][key]) for key in rows), name
    steps = [line for line in lines(tmp_path / "straight") if "loss" in line]
    assert ["critic" in line for line in steps] == [False, True, True, True], "it joins at its start"
    assert ["fooled" in line for line in steps] == [False, False, False, True], "and steers after its warm-up"
    assert all(line["perceptual"] > 0 for line in steps)
    assert load_file(tmp_path / "straight" / "export" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_two_processes_train_a_vae_and_its_critic(tmp_path: Path) -> None:
    """Single frames, which use no convolution over time, and clips; one checkpoint, the same on both processes."""
    extra = ["adversary.weight=0.1", "adversary.start=1", "adversary.warmup=1", "adversary.width=4", "steps=4", f"out={tmp_path}"]
    assert workers.run([*WORDS, *extra], workers.environment("ddp", 2)) == [0, 0]
    saved = load_latest(tmp_path)
    assert saved is not None and saved.step == 4 and "critic_model" in saved.tensors


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training without the 32 clips that measure the latents at its end."""
    monkeypatch.setattr(train_vae, "latent_statistics", lambda model, cfg: (torch.zeros(16), torch.ones(16)))
    return [*WORDS, "data.aspects=['16:9', '9:16']", "adversary.weight=0.1", "adversary.start=1", "adversary.width=4"]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_two_micro_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single frame on one process and a clip on the other, on different paths: losses, gradients and held-out PSNR are the same.

    There is no discriminator here: its spectral norms are updated in every pass, and the numbers of passes differ.
    """
    monkeypatch.setattr(train_vae, "latent_statistics", lambda model, cfg: (torch.zeros(16), torch.ones(16)))
    words = [*WORDS, "paths={whole: 1, streamed: 1}", "eval_clips=2", "eval_every=3", "steps=3"]
    train_vae.main([*words, "gradient_accumulation=2", f"out={tmp_path / 'alone'}"])
    assert workers.run([*words, f"out={tmp_path / 'two'}"], workers.environment("ddp", 2)) == [0, 0]
    for ours, theirs in zip(lines(tmp_path / "two"), lines(tmp_path / "alone"), strict=True):
        for name in {"loss", "grad_norm", "eval/psnr"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (ours["step"], name)
    a, b = (load_latest(tmp_path / name) for name in ("two", "alone"))
    assert a is not None and b is not None and a.meta["places"] == b.meta["places"] == 6
    for key, moment in ((key, rows) for rows in [b.tensors["optimizer"]] for key in rows if key.endswith("exp_avg")):
        assert (a.tensors["optimizer"][key] - moment[key]).norm() <= 1e-5 * moment[key].norm() + 1e-12, key


def test_a_critic_that_is_not_finite_damages_nothing(plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five bad updates leave nothing but the file with their clips, which are not drawn again; if it happens again, the run ends and names
    the clips."""
    real, calls, last = train_vae.hinge, iter(range(1, 1000)), 6
    monkeypatch.setattr(train_vae, "hinge", lambda *scores: real(*scores) * (math.nan if 2 <= next(calls) <= last else 1.0))
    train_vae.main([*plain, "steps=8", f"out={tmp_path / 'back'}"])
    saved = load_latest(tmp_path / "back")
    assert saved is not None and saved.step == 8 and saved.meta["places"] == 8 + 5
    assert all(torch.isfinite(rows[key]).all() for rows in saved.tensors.values() for key in rows)
    assert lines(tmp_path / "back")[-2]["skipped"] == 5

    calls, last = iter(range(1, 1000)), 1000
    with pytest.raises(SystemExit) as stopped:
        train_vae.main([*plain, "steps=60", f"out={tmp_path / 'stopped'}"])
    (bad,) = json.loads((tmp_path / "stopped" / "bad-batch-00000.json").read_text())
    assert stopped.value.code == 2 and bad["clips"][0].startswith("world/0/train/")


def test_a_signal_ends_training_after_a_step_with_a_checkpoint(tmp_path: Path) -> None:
    process = workers.start([*WORDS, "steps=100000", "save_every=100000", f"out={tmp_path}"])
    while not (tmp_path / "metrics.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(200)
    saved = load_latest(tmp_path)
    assert process.exitcode == 143 and saved is not None and saved.step == lines(tmp_path)[-1]["step"]


def test_mistakes(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for words, message in (
        (["paths={hole: 1}"], "did you mean 'whole'"),
        (["perceptual=0.1"], "perceptual and perceptual_weights belong together"),
    ):
        with pytest.raises(SystemExit):
            train_vae.main([*WORDS, *words, f"out={tmp_path}"])
        assert message in capsys.readouterr().err
