"""Alignment: groups are what the sampler makes, a run resumes to the bit, processes agree, and a reward is learned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_wan
import torch
import workers
from kling_programs.train import align
from test_distill import stopped_after
from test_generate import save_tiny

from kling import KlingPipeline, Request
from kling.condition.tasks import TASKS
from kling.data.image import write_png
from kling.data.video import write_video
from kling.flow.preferences import nft_loss, norm_hinge
from kling.rewards.pixels import REWARDS
from kling.rewards.reward import Reward
from kling.rewards.world import TERMS
from kling.training.rollout import Group, chunk, falls

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


def test_three_falls_in_a_row_below_the_start_are_a_hacked_reward() -> None:
    assert falls([0.9, 0.8, 0.7, 0.6]) and falls([0.7, 0.9, 0.6, 0.5, 0.4])
    assert not falls([0.9, 0.8, 0.7]) and not falls([0.9, 0.8, 0.85, 0.7]) and not falls([0.5, 0.9, 0.8, 0.7, 0.6])


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
    with pytest.raises(SystemExit), stopped_after(4):
        run(tiny, tmp_path / "b", *settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b" / "rollouts").rglob("*.safetensors")}
    again = run(tiny, tmp_path / "b", *settings)
    assert len(straight) == 5 and all(path.stat().st_mtime_ns == time for path, time in before.items() if path.is_file())
    for key in ("loss", "kl", "norm_ratio", "grad_norm"):
        assert [line[key] for line in again] == [line[key] for line in straight]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


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
        "clips=2",
        "rewards.magnitude=0",
        "beta=50",
        "kl=0",
        "hinge=0",
        "lr=0.003",
        "warmup=0",
    )
    losses = [line["loss"] for line in run(tiny, tmp_path, *asked, "steps=12")]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5) and np.mean(losses[-4:]) < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "sizes"), [("ddp", {}), ("fsdp2", {"dp_shard": 2})])
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
    monkeypatch.setattr(align, "rewards", lambda cfg: [bright])
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
    count = iter(range(100))
    still = Reward(("model",), lambda videos, requests, truths: torch.full((len(videos), 1), 0.9 - next(count) / 100))
    monkeypatch.setattr(align, "rewards", lambda cfg: [*REWARDS, still])
    with pytest.raises(SystemExit) as end:
        run(tiny, tmp_path, "checker=[model]", "check_every=1", f"reward_model={tmp_path}", "steps=6", "checks=2")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "fell in three checks in a row" in said and "Traceback" not in said
    checks = json.loads((tmp_path / "checks.json").read_text())
    assert list(checks) == ["0", "1", "2", "3"] and {"check/model", "check/speed", "check/diversity", "check/checker"} <= set(checks["3"])
    assert (tmp_path / "strips" / "00000003.png").is_file()


def test_published_weights_are_aligned_as_a_lora(tmp_path: Path) -> None:
    tiny_wan.saved("t2v", tmp_path / "wan")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p} | SMALL) + "\n" for p in ("a ball", "a cube", "a cone")))
    words = [f"model={tmp_path / 'wan'}", f"requests={tmp_path / 'p.jsonl'}", f"out={tmp_path / 'run'}", "mixed_precision=fp32"]
    words += ["request={num_inference_steps: 2, num_frames: 5, size: 32x32, guidance_scale: 1}", "rewards={magnitude: 1, model: 0}"]
    words += ["checker=[]", "check_every=0", "steps=2", "checkpoint=wan2.1-t2v-1.3b", "groups=1", "clips=2", "gradient_accumulation=2"]
    align.main(["configs/align/wan-1.3b.yaml", *words])
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [("method=ppo", "unknown method"), ("rewards.colur=1", "did you mean 'colour'"), ("rewards.colour=1", "needs the small world's truth"),
     ("rewards.magnitude=-1", "give 0 or more"), ("batch=3", "do not divide into micro-steps"), ("method=dpo batch=3", "even number"),
     ("clips=1 batch=1", "at least 2"), ("rewards.model=1", "needs reward_model"), ("check_every=1", "not checker"),
     ("checker=[magnitude] check_every=1", "must not be rewarded"), ("pairs=x.jsonl", "pairs are for dpo"), ("b=0", "b 0: give"),
     ("world.examples=3", "at least 20"),
     ("requests=nowhere.jsonl", "cannot be read"), ("requests=README.md", "line 1"), ("model=nowhere", "nowhere"), ("kl=-1", "kl -1"),
     ("request.steps=4", "unknown field 'steps'"), ("request.seed=4", "seed is set in a request"),
     ("checks=9 checker=[model] reward_model=x check_every=1", "held out")],
)  # fmt: skip
def test_mistakes_get_one_line(tiny: Path, tmp_path: Path, settings: str, said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        align.main(arguments(tiny, tmp_path, *settings.split()))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and said in line
