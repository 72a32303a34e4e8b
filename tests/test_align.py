"""Alignment: groups are what the sampler makes, a run resumes to the bit, processes agree, and a reward is learned."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_wan
import torch
import workers
from kling_programs.train import align
from safetensors.torch import load_file
from test_distill import save_able, stopped_after
from test_generate import save_tiny
from test_rewards import save_clip
from test_saver import survives

from kling import KlingPipeline, Request
from kling.condition.tasks import TASKS
from kling.config import load_config
from kling.data.image import write_png
from kling.data.video import write_video
from kling.errors import UserError
from kling.flow.preferences import nft_loss, norm_hinge
from kling.metrics import motion
from kling.rewards.pixels import REWARDS
from kling.rewards.reward import Judge, Reward
from kling.rewards.world import TERMS
from kling.runtime.accelerator import EXIT_STOPPED
from kling.sampling.brush import Track
from kling.sampling.sampler import Sampler
from kling.sampling.shots import Shot
from kling.text.umt5 import UMT5TextEncoder
from kling.training.ema import EMA
from kling.training.model import Trained
from kling.training.rollout import (
    Group,
    belong,
    check_even,
    chunk,
    example_of,
    falls,
    forget,
    history,
    left_out,
    make_group,
    read_checks,
    write_checks,
)

SMALL = {"num_frames": 5, "size": "32x32"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, requests of several kinds, and pairs of clips."""
    folder = tmp_path_factory.mktemp("align")
    save_tiny(folder / "model", [*TASKS, "camera"])
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_video(folder / f"{name}.mp4", rng.integers(0, 256, (9, 32, 32, 3), np.uint8), 8)
    write_png(folder / "first.png", rng.integers(0, 256, (32, 32, 3), np.uint8))
    asked = [
        {"prompt": "a red ball"},
        {"prompt": "a blue cube", "camera": "pan=5"},
        {"prompt": "a cone", "image": "first.png"},
        {"prompt": "two", "last_image": "first.png"},
        {"prompt": "three"},
    ]
    (folder / "requests.jsonl").write_text("".join(json.dumps(row | SMALL) + "\n" for row in asked))
    pairs = [{"prompt": "a ball", "win": "a.mp4", "lose": "b.mp4"}, {"prompt": "a cube", "win": "a.mp4", "lose": "b.mp4"}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row | SMALL) + "\n" for row in pairs))
    return folder


def arguments(tiny: Path, out: Path, *settings: str) -> list[str]:
    given = [f"out={out}", f"model={tiny / 'model'}", f"requests={tiny / 'requests.jsonl'}", "request.num_inference_steps=2"]
    given += [
        "checker=[]",
        "check_every=0",
        "checks=1",
        "jitter=0.0001",
        "request.guidance_scale=1",
        "request.camera_guidance_scale=1",
        "mixed_precision=fp32",
        "threads=1",
        "lora.rank=0",
        "steps=4",
        "clips=4",
        "batch=2",
    ]
    given += [f"rewards.{term}=0" for term in TERMS] + ["rewards.magnitude=1", "groups=2", "updates=2", "save_every=2", "lr=0.001"]
    return ["configs/align/debug.yaml", *given, *settings]


def run(tiny: Path, out: Path, *settings: str) -> list[dict]:
    align.main(arguments(tiny, out, *settings))
    return lines(out)


def lines(out: Path) -> list[dict]:
    """The lines of updates in the log."""
    return [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def weights(folder: Path) -> bytes:
    return next(folder.glob("export/transformer/*.safetensors")).read_bytes()


# ----------------------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("given", [{}, {"camera": "pan=5"}, {"image": "first.png"}, {"last_image": "first.png"}])
def test_a_group_is_what_calls_with_its_seeds_make(tiny: Path, given: dict[str, str]) -> None:
    given = {key: str(tiny / value) if value.endswith(".png") else value for key, value in given.items()}
    pipe = KlingPipeline.from_pretrained(tiny / "model", torch.float32)
    request = Request("a red ball", **SMALL, num_inference_steps=3, **given)
    group = pipe.sample_group(pipe.ask(request), [7, 8, 9])
    for i, seed in enumerate((7, 8, 9)):
        torch.testing.assert_close(group[i : i + 1].cpu(), pipe(request, seed=seed).latents.cpu(), rtol=1e-4, atol=1e-5)


def test_every_clip_is_used_once_before_one_is_used_again() -> None:
    groups = [Group(None, torch.zeros(4, 1), torch.tensor([0.0, 3.0, 1.0, 2.0]) + g) for g in range(3)]
    drawn = [chunk(groups, 2, 0, 5, turn, pairs=False) for turn in range(12)]
    for epoch in (drawn[:6], drawn[6:]):
        assert sorted((float(group.rewards[0]), i) for group, rows in epoch for i in rows) == [(g, i) for g in range(3) for i in range(4)]
    pairs = [chunk(groups, 4, 0, 5, turn, pairs=True) for turn in range(3)]
    assert {float(group.rewards[0]) for group, _ in pairs} == {0, 1, 2} and all(rows == [1, 0, 3, 2] for _, rows in pairs)


def test_three_falls_in_a_row_are_a_hacked_reward() -> None:
    """However slow, from where all three are clearly below the start."""
    steady = [1 - 0.02 * i for i in range(13)]  # ends at 0.76
    assert falls(steady) and not falls(steady[:10]) and falls([0.8, 0.9, 0.67, 0.66, 0.65])
    assert not falls([0.8, 0.9, 0.66, 0.67, 0.65]) and not falls([0.8, 0.9, 0.7, 0.66, 0.65])


def test_two_checks_far_below_the_start_are_a_hacked_reward() -> None:
    assert falls([0.9, 0.3, 0.31]) and falls([0.7, 0.9, 0.5, 0.4])
    assert not falls([0.9, 0.3]) and not falls([0.9, 0.8, 0.3]) and not falls([0.9, 0.3, 0.7, 0.3]) and not falls([0.5, 0.9, 0.8, 0.7, 0.6])


def test_jitter_of_the_checker_ends_no_run() -> None:
    """13 checks of about the same 16 requests: 0.75 ± 0.06, and no drift."""
    rng = np.random.default_rng(0)
    runs = [(0.75 + 0.06 * rng.standard_normal(13)).tolist() for _ in range(2000)]
    assert np.mean([any(falls(run[: n + 1]) for n in range(13)) for run in runs]) < 0.015


def test_a_term_that_no_request_has_survives_its_file(tmp_path: Path) -> None:
    """Such as the motion, where every held-out request moves the camera: it stopped the run at the second check."""
    path, row = tmp_path / "checks.json", {"check/motion": math.nan, "check/checker": 0.5}
    write_checks(path, {0: row})
    write_checks(path, read_checks(path, 1) | {1: row | {"check/checker": math.nan}})
    found = read_checks(path, 1)
    assert (
        "NaN" not in path.read_text() and math.isnan(found[0]["check/motion"]) and history(found) == {0: 0.5} and not read_checks(path, -1)
    )


def test_rounds_are_kept_for_the_checkpoints_that_a_run_goes_back_to(tmp_path: Path) -> None:
    """Not for the one of step 4, which keep_every holds for ever."""
    for name in ("step-00000004", "step-00000040", "step-00000044", "rollouts/000000-0", "rollouts/000010-80", "rollouts/000011-88"):
        (tmp_path / name).mkdir(parents=True)
    forget(tmp_path, updates=4, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["000010-80", "000011-88"]


def test_clips_of_other_weights_or_settings_are_deleted(tmp_path: Path) -> None:
    def belongs(config: dict[str, float]) -> bool:
        clip = tmp_path / "run" / "rollouts" / "000000-0" / "000.safetensors"
        there = clip.is_file()
        belong(tmp_path / "run", config, [tmp_path / "model"])
        kept = there and clip.is_file()
        clip.parent.mkdir(exist_ok=True)
        clip.write_bytes(b"")
        return kept

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"one")
    assert not belongs({"lr": 1, "steps": 5}) and belongs({"lr": 1, "steps": 6}) and not belongs({"lr": 2, "steps": 6})
    (tmp_path / "model" / "weights").write_bytes(b"two")
    assert not belongs({"lr": 2, "steps": 6}) and belongs({"lr": 2, "steps": 6})


def test_the_speed_is_measured_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the term if there is one; otherwise of two clips."""
    calls: list[int] = []
    measure = motion.magnitude
    monkeypatch.setattr(motion, "magnitude", lambda video: calls.append(1) or measure(video))
    pipe = KlingPipeline.from_pretrained(tiny / "model", torch.float32)
    request = Request("a red ball", **SMALL, num_inference_steps=1, guidance_scale=1.0)
    bright = Reward(("model",), lambda videos, requests, truths: videos.float().mean(dim=(1, 2, 3, 4))[:, None] / 255)
    for judge, count in ((Judge(REWARDS, {"magnitude": 1.0}), 4), (Judge([bright], {"model": 1.0}), 2)):
        calls.clear()
        stored, videos = make_group(pipe, pipe.ask(request), request, None, judge, [1, 2, 3, 4])
        assert len(calls) == count
        assert stored["speed"].tolist() == pytest.approx([measure(video) / 32 for video in videos[:count]], rel=1e-4)


def test_what_guidance_leaves_out_is_what_the_sampler_leaves_out(tiny: Path, tmp_path: Path) -> None:
    """All clips are left out once: those without text answer as the sampler's pass with the negative prompt, the others as its pass without
    a camera, tracks or references."""
    save_able(tmp_path, [*TASKS, "camera"])
    pipe = KlingPipeline.from_pretrained(tmp_path, torch.float32)
    given = {"camera": "pan=5", "tracks": [Track(None, ((5.0, 5.0), (20.0, 9.0)))], "references": [str(tiny / "first.png")]}
    asked = pipe.ask(Request("a red ball", **SMALL, **given, guidance_scale=3.0, camera_guidance_scale=2.0))
    n, g = 24, torch.Generator().manual_seed(0)
    latents = torch.randn(n, *asked.state.clean[:, :, : asked.state.frames].shape[1:], generator=g)
    with torch.no_grad():
        plain, words = example_of(asked, latents, pipe.transformer, pipe)
        example, text, bare = left_out(plain, words, asked, 0.999, g, list(range(n)))
        noise, t = torch.randn(plain.state.clean.shape, generator=g), torch.full((n,), 0.6)
        z = plain.state.noised(t, noise)
        found = Trained(pipe.transformer, None)(example, example.state.noised(t, noise), t, (text,))
        lacks = {"negative": (text != words).flatten(1).any(1), "camera": ~example.has_camera}
        lacks |= {
            "no tracks": (example.state.tracks == 0).flatten(1).all(1),
            "no references": (example.state.clean[:, :, example.state.frames :] == 0).flatten(1).all(1),
        }
        assert bool(bare.all()) and bool((sum(rows.long() for rows in lacks.values()) == 1).all())
        assert all(int(rows.sum()) > 1 for rows in lacks.values())
        for i in range(n):
            which, camera = next(name for name, rows in lacks.items() if rows[i]), not lacks["camera"][i]
            which, level = which if camera else "prompt", asked.state.levels(t[:1])
            one = Sampler._velocity(pipe.transformer, asked.state, asked.signals, which, camera, z[i : i + 1], level, None)
            torch.testing.assert_close(found[i : i + 1], one, rtol=1e-4, atol=1e-5)
    unguided = pipe.ask(Request("a red ball", **SMALL, **given, guidance_scale=1.0, brush_guidance_scale=1.0, reference_guidance_scale=1.0))
    assert not left_out(plain, words, unguided, 0.999, g, list(range(n)))[2].any()
    half = left_out(plain, words, asked, 0.5, g, [i // 2 for i in range(n)])[2]
    assert torch.equal(half[::2], half[1::2])


def test_sharded_weights_need_the_same_passes_at_once(tiny: Path) -> None:
    pipe = KlingPipeline.from_pretrained(tiny / "model", torch.float32)
    pipe.register_to_config(capabilities=[*pipe.config.capabilities, "shots"])
    ball, pan = ({"prompt": "a ball", **SMALL}, {"prompt": "a cube", "camera": "pan=5", **SMALL})
    story, panned = ({"shots": [Shot("a ball", 1.0), Shot("a cube", 1.0, camera)], "size": "32x32"} for camera in (None, "pan=5"))

    def even(*rows: dict, ranks: int = 2, guidance: float = 3.0) -> None:
        check_even(pipe, [Request(**row, guidance_scale=guidance, camera_guidance_scale=guidance) for row in rows], ranks)

    even(ball, ball, pan, pan)
    even(story, story, panned, panned)
    even(ball, pan, guidance=1.0)
    even(ball, pan, ranks=1)
    for rows in ((ball, ball, ball, pan), (ball, ball | {"num_inference_steps": 7}), (story, panned)):
        with pytest.raises(UserError, match="sampled at once, with different steps or guidance"):
            even(*rows)


# ------------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "settings",
    [
        ("method=nft",),
        ("method=dpo", "lora.rank=2", "lora.merge=true"),
        pytest.param(("method=awm", "gradient_accumulation=2"), marks=pytest.mark.slow),
    ],
    ids=lambda s: s[0],
)
def test_a_run_resumes_to_the_bit(tiny: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Stopped in the middle of the second round: its clips are read again, not made again."""
    settings = (*settings, "steps=5", "updates=3", "save_every=100")
    straight = run(tiny, tmp_path / "a", *settings)
    assert ("log_ratio" in straight[0]) == ("method=awm" in settings)
    with pytest.raises(SystemExit), stopped_after(4):
        run(tiny, tmp_path / "b", *settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b" / "rollouts").rglob("*.safetensors")}
    again = run(tiny, tmp_path / "b", *settings)
    assert len(straight) == 5 and all(path.stat().st_mtime_ns == time for path, time in before.items() if path.is_file())
    for key in ("loss", "kl", "norm_ratio", "grad_norm"):
        assert [line[key] for line in again] == [line[key] for line in straight]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_repeatedly_killed_run_ends_as_if_uninterrupted(tiny: Path, tmp_path: Path) -> None:
    """Also where it dies among the clips of a round: those that were made stay what they are."""
    survives(3, arguments(tiny, tmp_path, "steps=8", "updates=2", "save_every=2"), tmp_path)


@pytest.mark.parametrize("settings", [("lora.rank=0",), ("lora.rank=2", "lora.merge=true")], ids=lambda s: s[0])
def test_the_policy_begins_as_the_model(tiny: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    first = run(tiny, tmp_path, "steps=1", *settings)[0]
    assert first["kl"] == 0 and first["norm_ratio"] == 1 and first["hinge"] == 0 and first["grad_norm"] > 0
    rounds = [line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "rollout/reward" in line]
    assert 0 < rounds[0]["rollout/magnitude"] < 1 and rounds[0]["rollout/diversity"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_old_policy_is_the_policy_where_a_round_begins(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """With follow=0 the old policy becomes the policy after each round; the reference stays the start."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def loss(v: torch.Tensor, v_old: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append((v.detach(), v_old))
        return nft_loss(v, v_old, *rest)

    def hinge(v: torch.Tensor, v_ref: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen[-1] = (*seen[-1], v_ref)
        return norm_hinge(v, v_ref, mask)

    monkeypatch.setattr(align, "nft_loss", loss)
    monkeypatch.setattr(align, "norm_hinge", hinge)
    run(tiny, tmp_path, "steps=3", "follow=0", f"mixed_precision={precision}", "warmup=0", "lr=0.01")
    v, v_old, v_ref = seen[2]  # the first update of the second round
    torch.testing.assert_close(v_old, v)
    assert float((v - v_ref).abs().max()) > 0.01


def test_given_pairs_begin_at_log_2(tiny: Path, tmp_path: Path) -> None:
    asked = (
        "method=dpo",
        f"pairs={tiny / 'pairs.jsonl'}",
        "requests=world",
        "clips=2",
        "rewards.magnitude=0",
        "beta=50",
        "null=0",
        "kl=0",
        "hinge=0",
        "lr=0.003",
        "warmup=0",
    )
    losses = [line["loss"] for line in run(tiny, tmp_path, *asked, "steps=12")]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5) and np.mean(losses[-4:]) < losses[0]


def test_clips_without_text_are_only_held_to_the_start(tiny: Path, tmp_path: Path) -> None:
    """With nearly all of them left out, the first update has nothing to learn."""
    guided = ("request.guidance_scale=3", "request.camera_guidance_scale=3")
    first = run(tiny, tmp_path / "a", "steps=1", "null=0.9999", *guided)[0]
    assert first["loss"] == 0 and first["grad_norm"] == 0
    assert run(tiny, tmp_path / "b", "steps=1", "null=0", *guided)[0]["grad_norm"] > 0


def test_pairs_that_differ_by_jitter_teach_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = Reward(("magnitude",), lambda videos, requests, truths: 0.5 + torch.arange(len(videos)).view(-1, 1) / 1000)
    monkeypatch.setattr(align, "rewards", lambda cfg, device: [alike])
    words = ("steps=1", "method=dpo", "beta=50")
    assert run(tiny, tmp_path / "a", *words, "jitter=0.05")[0]["grad_norm"] == 0
    assert run(tiny, tmp_path / "b", *words, "jitter=0.001")[0]["grad_norm"] > 0


def test_a_signal_stops_a_run_between_two_groups(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second round; the first group's clips are there, and the run goes on as if it had not stopped."""
    straight = run(tiny, tmp_path / "a")
    made, make = [], align.make_group

    def then_stop(*args: object) -> object:
        made.append(make(*args))
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(align, "make_group", then_stop)
        run(tiny, tmp_path / "b")
    assert end.value.code == EXIT_STOPPED and len(made) == 3
    assert len(list((tmp_path / "b" / "rollouts" / "000001-00000002").iterdir())) == 1
    again = run(tiny, tmp_path / "b")
    assert [line["loss"] for line in again] == [line["loss"] for line in straight] and weights(tmp_path / "a") == weights(tmp_path / "b")


def test_a_reward_model_is_on_the_run_s_device(tmp_path: Path) -> None:
    """It scores every clip, and took a CPU's time on a machine with a GPU."""
    save_clip(tmp_path)
    cfg = load_config(align.AlignConfig, "configs/align/wan-1.3b.yaml", [f"reward_model={tmp_path}"])
    reward = align.rewards(cfg, torch.device("meta"))[-1]
    with pytest.raises(RuntimeError, match="meta"):  # which computes nothing
        reward.score(torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8), [Request("red ball")], [None])


@pytest.mark.parametrize(("config", "sizes"), [pytest.param("ddp", {}, marks=pytest.mark.slow), ("fsdp2", {"dp_shard": 2})])
def test_two_processes_are_one_with_twice_the_micro_steps(tiny: Path, tmp_path: Path, config: str, sizes: dict[str, int]) -> None:
    """Real ones, over gloo; in shards too."""
    alone = run(tiny, tmp_path / "one", "gradient_accumulation=2")
    words = arguments(tiny, tmp_path / "two")
    assert workers.run(words, workers.environment(config, 2, **sizes)) == [0, 0]
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("kl", 1e-2)):
        assert [line[key] for line in lines(tmp_path / "two")] == pytest.approx([line[key] for line in alone], rel=tolerance, abs=1e-7)
    KlingPipeline.from_pretrained(tmp_path / "two" / "export")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nft", "awm", "dpo"])
def test_a_reward_is_learned(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Brighter clips are rewarded, and the clips of the last rounds are brighter than those of the first."""
    bright = Reward(("magnitude",), lambda videos, requests, truths: videos.float().mean(dim=(1, 2, 3, 4))[:, None] / 255)
    monkeypatch.setattr(align, "rewards", lambda cfg, device: [bright])
    settings = (
        "steps=40",
        "updates=4",
        "clips=8",
        "batch=8",
        "lr=0.003",
        "follow=0",
        "warmup=0",
        "kl=0",
        "hinge=0",
        "save_every=100",
        *(["beta=200"] if method == "dpo" else []),
    )
    run(tiny, tmp_path, f"method={method}", *settings)
    rounds = [line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "rollout/reward" in line]
    means = [line["rollout/magnitude"] for line in rounds]
    assert len(means) == 10 and np.mean(means[-2:]) > np.mean(means[:2]) + 0.01


def test_checks_are_kept_and_a_hacked_reward_stops_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The weights of the last check that passed are exported, and running again does not go on."""
    out, averages = tmp_path / "out", {}
    worth = {0: 0.9, 1: 0.8, 2: 0.3, 3: 0.31}
    still = Reward(("model",), lambda videos, requests, truths: torch.full((len(videos), 1), worth[len(averages)]))
    monkeypatch.setattr(align, "rewards", lambda cfg, device: [*REWARDS, still])
    update = EMA.update

    def remembered(self: EMA, model: torch.nn.Module, step: int, *args: object, **kwargs: object) -> None:
        update(self, model, step, *args, **kwargs)
        if type(self) is EMA:
            averages[step + 1] = {name: average.clone() for name, average in self.average.items()}

    monkeypatch.setattr(EMA, "update", remembered)
    words = ("checker=[model]", "check_every=1", f"reward_model={tmp_path}", "steps=6", "checks=2", "save_every=3")
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            run(tiny, out, *words)
        said = capsys.readouterr().err
        assert end.value.code == 2 and "0.300 and 0.310" in said and "update 1, the last that passed" in said and "Traceback" not in said
    checks = json.loads((out / "checks.json").read_text())
    assert list(checks) == ["0", "1", "2", "3"] and {"check/model", "check/speed", "check/diversity", "check/checker"} <= set(checks["3"])
    assert (out / "strips" / "00000003.png").is_file() and len(averages) == 3
    exported = load_file(next(out.glob("export/transformer/*.safetensors")))
    same = {
        step: all(torch.equal(exported[key := name.removeprefix("transformer.")], t.to(exported[key].dtype)) for name, t in found.items())
        for step, found in averages.items()
    }
    assert same == {1: True, 2: False, 3: False}


@pytest.mark.parametrize("pairs", [False, True], ids=["requests", "pairs"])
def test_published_weights_are_aligned_as_a_lora(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: bool) -> None:
    """umT5 reads all prompts before the transformer takes the device's memory."""
    loads: list[str] = []
    build, load = align.build, UMT5TextEncoder._load
    monkeypatch.setattr(align, "build", lambda *args: loads.append("transformer") or build(*args))
    monkeypatch.setattr(UMT5TextEncoder, "_load", lambda *args: loads.append("umT5") or load(*args))
    tiny_wan.saved("t2v", tmp_path / "wan")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p} | SMALL) + "\n" for p in ("a ball", "a cube", "a cone")))
    words = [f"model={tmp_path / 'wan'}", f"requests={tmp_path / 'p.jsonl'}", f"out={tmp_path / 'run'}", "mixed_precision=fp32"]
    words += ["request={num_inference_steps: 2, num_frames: 5, size: 32x32, guidance_scale: 3, negative_prompt: ugly}"]
    words += ["rewards={magnitude: 1, model: 0}"]
    words += ["checker=[]", "check_every=0", "steps=2", "checkpoint=wan2.1-t2v-1.3b", "groups=1", "clips=2", "gradient_accumulation=2"]
    if pairs:
        words += ["method=dpo", f"pairs={tiny / 'pairs.jsonl'}", "requests=world", "rewards.magnitude=0", "batch=2"]
    align.main(["configs/align/wan-1.3b.yaml", *words])
    assert "umT5" in loads and "umT5" not in loads[loads.index("transformer") :]
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [("method=ppo", "unknown method"), ("rewards.colur=1", "did you mean 'colour'"), ("rewards.colour=1", "needs the small world's truth"),
     ("rewards.magnitude=-1", "give 0 or more"), ("batch=3", "do not divide into micro-steps"), ("method=dpo batch=3", "even number"),
     ("clips=1 batch=1", "at least 2"), ("rewards.model=1", "needs reward_model"), ("check_every=1", "not checker"),
     ("checker=[magnitude] check_every=1", "must not be rewarded"), ("pairs=x.jsonl", "pairs are for dpo"), ("b=0", "b 0: give"),
     ("method=dpo pairs=x.jsonl clips=2", "are both set: each line of pairs is a request too"),
     ("method=dpo pairs=x.jsonl clips=2 requests=world rewards.magnitude=0 checker=[motion] check_every=1", "the term motion needs"),
     ("world.examples=3", "at least 20"),
     ("requests=nowhere.jsonl", "cannot be read"), ("requests=README.md", "line 1"), ("model=nowhere", "nowhere"), ("kl=-1", "kl -1"),
     ("null=1", "null 1: give"), ("jitter=0", "jitter 0: give"),
     ("request.steps=4", "unknown field 'steps'"), ("request.seed=4", "seed is set in a request"),
     ("checks=9 checker=[model] reward_model=x check_every=1", "held out")],
)  # fmt: skip
def test_mistakes_get_one_line(tiny: Path, tmp_path: Path, settings: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        align.main(arguments(tiny, tmp_path, *settings.split()))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and said in line
