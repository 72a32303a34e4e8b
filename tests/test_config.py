from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from kling_programs.train.train_dit import TrainDiTConfig
from kling_programs.train.train_vae import TrainVAEConfig

from kling import config
from kling.config import flatten, load_config, save_config, to_dict
from kling.errors import UserError


@dataclass
class Optim:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["constant", "cosine"] = "constant"


@dataclass
class Settings:
    data: str
    steps: int = 100
    ema: float | None = None
    optim: Optim = field(default_factory=Optim)
    model: dict[str, Any] = field(default_factory=lambda: {"dim": 8, "rope": {"theta": 10.0}})
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    on: bool = False


def load(*words: str, path: Path | None = None) -> Settings:
    return load_config(Settings, path, ["data=x", *words])


def test_overrides_reach_every_kind_of_field() -> None:
    cfg = load("steps=7", "ema=0.99", "optim.lr=1e-5", "optim.betas=[0.8,0.9]", "model.rope.theta=5", "sizes=[3]", "on=true")
    assert (cfg.steps, cfg.ema, cfg.optim.lr, cfg.optim.betas) == (7, 0.99, 1e-5, (0.8, 0.9))
    assert cfg.model == {"dim": 8, "rope": {"theta": 5}}, "free-form settings merge key by key"
    assert cfg.sizes == [3], "lists are replaced"
    assert load("ema=0.5", "ema=null").ema is None


@pytest.mark.parametrize("text", ["16:9", "a dog: #1", "#1", "1984-01-01", "no", "007", "", "[unclosed", '"quoted" 狗', "~x", "*star"])
def test_texts_that_yaml_1_1_would_turn_into_something_else(text: str, tmp_path: Path) -> None:
    cfg = load(f"data={text}")
    assert cfg.data == text
    save_config(cfg, tmp_path / "c.yaml")
    assert load_config(Settings, tmp_path / "c.yaml") == cfg


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("stepz=3", ["'stepz'", "did you mean 'steps'", "override 'stepz=3'"]),
        ("optim.lrr=3", ["'optim.lrr'", "did you mean 'optim.lr'"]),
        ("steps=many", ["steps = 'many'", "expected int"]),
        ("steps=1.5", ["steps = 1.5", "expected int"]),
        ("steps=true", ["steps = True", "expected int"]),
        ("steps=null", ["steps = None", "expected int"]),
        ("optim=3", ["optim = 3", "expected Optim"]),
        ("optim.schedule=linear", ["optim.schedule = 'linear'", "constant", "cosine"]),
        ("optim.betas=[1]", ["optim.betas = [1]", "tuple[float, float]"]),
        ("sizes=[1,a]", ["sizes = [1, 'a']", "expected list[int]"]),
        ("model=3", ["model = 3", "expected dict[str, Any]"]),
        ("steps", ["'steps'", "key=value"]),
        ("learning_rate=1", ["'learning_rate'", "did you mean 'optim.lr'"]),
        ("optim.learning_rate=1", ["'optim.learning_rate'", "did you mean 'optim.lr'"]),
        ("max_train_steps=1", ["did you mean 'steps'"]),
        ("steps=" + "9" * 400, ["cannot be used", "beyond 64 bits"]),
        ("steps=" + "9" * 5000, ["cannot be used"]),
        ("model=" + "[" * 100_000, ["cannot be used"]),
        ("model.x=" + "[" * 60 + "]" * 60, ["is nested more than 50 levels deep"]),
        ("data=${nothing}", ["nothing"]),
    ],
)
def test_mistakes_name_key_value_and_place(word: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(word)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_dashes_before_a_key_are_ignored() -> None:
    assert load("--optim.lr=0.5", "steps=3") == load("optim.lr=0.5", "--steps=3")


def test_a_required_key_must_be_given() -> None:
    with pytest.raises(UserError, match="'data' has no value"):
        load_config(Settings)


def test_base_chain(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "grand.yaml").write_text("data: g\nsteps: 1\noptim: {lr: 1}\nmodel: {dim: 1, heads: 2}")
    (tmp_path / "parts" / "parent.yaml").write_text("base: ../grand.yaml\nsteps: 2\nsizes: [9]")
    child = tmp_path / "child.yaml"
    child.write_text("base: parts/parent.yaml\nmodel: {dim: 3}")
    cfg = load_config(Settings, child, ["steps=4"])
    assert (cfg.data, cfg.steps, cfg.sizes, cfg.optim.lr) == ("g", 4, [9], 1.0)
    assert cfg.model == {"dim": 3, "heads": 2, "rope": {"theta": 10.0}}

    (tmp_path / "grand.yaml").write_text("base: child.yaml")
    with pytest.raises(UserError, match="its own base"):
        load(path=child)
    child.write_text("base: nowhere.yaml")
    with pytest.raises(UserError, match="nowhere.yaml.*does not exist"):
        load(path=child)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2", "line 2.*'steps' is given twice"),
        ("a: [1", "is not yaml"),
        ("- 1", "holds a list"),
        ("stps: 1", "c.yaml.*did you mean 'steps'"),
        ("steps: x", "steps = 'x' in .*c.yaml: expected int"),
        ("model: {x: " + "[" * 100_000, "c.yaml' cannot be used: it is nested thousands of levels deep"),
        ("model:" + "".join(f"\n{' ' * i}a:" for i in range(1, 300)), "cannot be used"),
        ("".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(40)), "more than 100000 values"),
        ("a: &a [*a]", "cannot be used"),
        ("steps: " + "9" * 5000, "cannot be used"),
        ("data: ${oc.env:HOME}", "reads more than this file"),
        ("sizes: [1]\nmodel: {x: [{y: 'a${oc.decode:${oc.env:HOME}}'}]}", "reads more than this file"),
        ("data: '${${on}:HOME}'", "reads more than this file"),
    ],
)
def test_a_bad_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    before = time.process_time()
    with pytest.raises(UserError, match=message) as error:
        load(path=path)
    assert time.process_time() - before < 5 and "\n" not in str(error.value)


def test_the_environment_is_read_only_if_the_user_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "here")
    path = tmp_path / "c.yaml"
    path.write_text("data: ${oc.env:PLACE}\nsteps: 4\nsizes: ['${steps}']")
    monkeypatch.setenv("KLING_ALLOW_ENV", "1")
    assert load_config(Settings, path).data == "here"
    monkeypatch.delenv("KLING_ALLOW_ENV")
    with pytest.raises(UserError, match="KLING_ALLOW_ENV"):
        load_config(Settings, path)
    path.write_text("data: x\nsteps: 4\nsizes: ['${steps}']")
    cfg = load_config(Settings, path, ["data=${oc.env:PLACE}"])  # the user's own words
    assert (cfg.data, cfg.sizes) == ("here", [4])


def test_names_of_other_trainers_lead_to_our_keys() -> None:
    """For the real programs: every hint names an existing key, and none of our names is taken for another tool's."""
    from kling_programs.train import command

    for asked in command.PROGRAMS.values():
        names = {key.name for key in command.keys_of(Path(command.__file__).with_name(f"{asked.module}.py"), asked.settings)}
        assert names, asked
    assert len({name for theirs in config.MEANT.values() for name in theirs}) > 100


def test_presets_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "dit").mkdir(parents=True)
    (tmp_path / "configs" / "dit" / "small.yaml").write_text("data: preset")
    monkeypatch.setattr(config, "PRESETS", (tmp_path / "configs",))
    for name in ("dit/small.yaml", "configs/dit/small.yaml"):
        assert load_config(Settings, name).data == "preset"
    with pytest.raises(UserError, match="did you mean 'dit/small.yaml'"):
        load_config(Settings, "dit/smal.yaml")


def test_round_trip_and_flatten(tmp_path: Path) -> None:
    cfg = load("optim.lr=1e-7", "ema=0.1", "model.names=['1e3','true']")
    save_config(cfg, tmp_path / "a" / "c.yaml")
    assert load_config(Settings, tmp_path / "a" / "c.yaml") == cfg
    assert to_dict(cfg)["optim"]["betas"] == [0.9, 0.95]
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


WRONG = {
    "save_every=0": "give 1 or more", "log_every=-2": "give 1 or more", "batch=0": "give 1 to 100000", "steps=0": "give 1 or more",
    "ema=1": "give 0 to below 1", "ema=-0.1": "give 0 to below 1", "text_drop=1.5": "give 0 to 1", "warmup=-1": "give 0 or more",
    **dict.fromkeys(("lr=0", "lr=-1e-3", "lr=.nan", "lr=.inf", "lr=1e30"), "give a number above 0, at most 1000"),
    "validation.every=-5": "give 0 or more", "workers=-1": "give 0 to 1000", "threads=0": "give 1 to 1000",
    "scheduler.shift=1e-320": "give 0.001 to 1000", "lr_of.dit=-1": "give 0 or more", "lr_of={dit: .inf}": "give 0 or more",
    "seed=-1": "give 0 or more", "validation.quantiles=100000": "give 1 to 1000",
    "lora.alpha=.nan": "give a number",
    "clip_grad=0": "give a number above 0",
}  # fmt: skip


@pytest.mark.parametrize("word", WRONG)
def test_a_number_that_no_run_can_use_is_refused_by_name(word):
    """save_every=0 divides by zero after the first step, ema=1 exports the first weights, lr=-1e-3 climbs."""
    key = word.partition("=")[0] + (".dit" if "{" in word else "")
    with pytest.raises(UserError, match=rf"^{re.escape(key)} = \S+ in override .*: {WRONG[word]}$"):
        load_config(TrainDiTConfig, None, [word])


def test_what_a_run_can_use_is_taken():
    load_config(
        TrainDiTConfig, None, ["ema=0", "ema=0.9999", "warmup=0", "workers=0", "threads=null", "text_drop=1", "lr=1e-7", "keep_last=0"]
    )
    load_config(TrainVAEConfig, None, ["eval_every=1", "watchdog=0", "weight_decay=0", "floor=0"])
