"""Real mistakes in the settings of the programs for training and data: each gives one clear line and exit code 2, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from kling_programs.sample import export
from kling_programs.train import align, data, distill, encode, plan, train_dit

ALIGN = "configs/align/debug.yaml"
DIT, CACHE, DISTILL = "configs/dit/debug.yaml", "configs/cache/debug.yaml", "configs/distill/debug.yaml"
PROGRAMS = {"train": train_dit, "encode": encode, "data": data, "plan": plan, "export": export, "distill": distill, "align": align}

MISTAKES = [  # program and words, and what the line says; {tmp} is a folder with the file `file` and the folders `empty` and `films`
    (f"train {DIT} betas=[0.5]", "betas [0.5]: give two numbers"),
    (f"train {DIT} betas=[0.9,2]", "betas = 2.0"),
    (f"distill {DISTILL} betas=[0.9]", "betas [0.9]: give two numbers"),
    (f"distill {DISTILL} schedule=linear", "unknown schedule 'linear'"),
    (f"distill {DISTILL} optimizer=sgd", "unknown optimizer 'sgd'"),
    (f"distill {DIT}", "configs/dit/debug.yaml is a preset of kling-train: kling-distill takes"),
    (f"align {DISTILL}", "configs/distill/debug.yaml is a preset of kling-distill: kling-align takes"),
    (f"distill {DISTILL} guidance_scale=-1", "guidance_scale = -1.0"),
    (f"distill {DISTILL} num_inference_steps=0", "num_inference_steps = 0"),
    (f"distill {DISTILL} flow_map.counts=[1000000000]", "flow_map.counts = 1000000000"),
    (f"distill {DISTILL} flow_map.to_clean=0.3", "flow_map.to_clean 0.3 is for freely drawn steps"),
    (f"distill {DISTILL} flow_map.delta=0.01", "flow_map.delta 0.01 is for a derivative"),
    (f"distill {DISTILL} method=dmd dmd.critic_updates=1000000000", "dmd.critic_updates = 1000000000"),
    (f"distill {DISTILL} samples=[] sample_every=3", "nothing to draw"),
    (f"distill {DISTILL} lora.rank=1000000000", "lora.rank = 1000000000"),
    (f"distill {DISTILL} out={{tmp}}/run vae={{tmp}}/vae", "vae cannot be loaded"),
    (f"align {ALIGN} groups=0", "groups = 0"),
    (f"align {ALIGN} updates=1000000000", "updates = 1000000000"),
    (f"align {ALIGN} checks=0", "checks = 0"),
    (f"align {ALIGN} world.frames=1000001", "world.frames = 1000001"),
    (f"align {ALIGN} world.examples=1000000000", "world.examples = 1000000000"),
    (f"align {ALIGN} beta=5", "beta 5 belongs to method dpo, and this run's is nft"),
    (f"align {ALIGN} reward_model={{tmp}}/empty", "would not be asked"),
    (f"align {ALIGN} out={{tmp}}/run request.prompt=x", "request.prompt would be ignored"),
    (f"train {DIT} tasks={{}}", "would change nothing"),
    (f"train {DIT} tasks.text=-1", "tasks.text = -1: give 0"),
    (f"train {DIT} frames=[]", "frames is empty"),
    (f"train {DIT} model.num_layers=0", "model.num_layers = 0"),
    (f"train {DIT} model.num_layers=1000000000", "model.num_layers = 1000000000"),
    (f"train {DIT} out={{tmp}}/run model.num_layer=2", "(did you mean 'model.num_layers'?)"),
    (f"train {DIT} out={{tmp}}/run model.num_layers=two", "model.num_layers = 'two': expected int"),
    (f"train {DIT} out={{tmp}}/run model.ffn_dim=1000000000000", "model.ffn_dim = 1000000000000: give 1 to"),
    (f"train {DIT} out={{tmp}}/run model.attention_head_dim=31", "attention_head_dim 31"),
    (f"train {DIT} out={{tmp}}/run model.patch_size=[1,2]", "patch_size [1, 2]: give three numbers"),
    (f"train {DIT} out={{tmp}}/run text.byte_dim=31", "byte_dim 31: give a multiple of head_dim 32"),
    (f"train {DIT} out={{tmp}}/run text.bytes=31", "unknown key 'text.bytes'"),
    (f"train {DIT} threads=100000", "threads = 100000"),
    (f"train {DIT} workers=100000", "workers = 100000"),
    (f"train {DIT} seed=-1", "seed = -1"),
    (f"train {DIT} lr_of.transformer=-1", "lr_of.transformer = -1"),
    (f"train {DIT} lr_of.transformer=.inf", "lr_of.transformer = inf"),
    (f"train {DIT} out={{tmp}}/run lr_of.transformers=0", "lr_of transformers 0: name a part of the model"),
    (f"train {DIT} out={{tmp}}/run lr_of.transformer=0 lr_of.text_encoder=0", "leave one part above 0"),
    (f"train {DIT} max_frames=18", "18 frames"),
    (f"train {DIT} scheduler.shift=-1", "scheduler.shift = -1"),
    (f"train {DIT} out=", "out is empty"),
    (f"train {DIT} out={{tmp}}/file", "is a file, where a folder is needed"),
    (f"train {DIT} out=/proc/none", "cannot be written"),
    (f"train {DIT} out={{tmp}}/run text_drop=2", "give 0 to 1"),
    (f"encode {CACHE} out={{tmp}}/cache shares=[0,0,0]", "not all 0"),
    (f"encode {CACHE} out={{tmp}}/cache shares=[-1,1,1]", "shares = -1"),
    (f"encode {CACHE} out={{tmp}}/file", "is a file, where a folder is needed"),
    ("plan configs/dit/1.3b.yaml spatial_factor=0", "spatial_factor = 0"),
    ("plan configs/dit/wan.yaml", "has no model and frames"),
    ("data scan {tmp}/empty --out {tmp}/m.jsonl", "no video or picture"),
    ("data report {tmp}/empty", "cannot be read"),
    ("data scan {tmp}/films --root {tmp} --out {tmp}/m.jsonl", "is for tables"),
    ("data scan {tmp}/films --map path=video --out {tmp}/m.jsonl", "a mapping of columns is for tables"),
    ("data scan {tmp}/rows.csv --root {tmp}/none --out {tmp}/m.jsonl", "none is no folder"),
    ("data camera {tmp}/good.jsonl --video {tmp}/file", "--video is for a camera file"),
    ("data camera {tmp}/good.jsonl --png {tmp}/x.png", "--png is for a camera file"),
    ("data camera {tmp}/file --method colmap", "--method is for a manifest"),
    ("export {tmp}/empty {tmp}/out", "holds 0 safetensors files"),
    ("export kling/assets {tmp}/file", "exists already"),
    ("export kling/assets --measure-bf16 --naming original", "leave out --naming original"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_gets_one_line(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    (tmp_path / "file").write_text("x")
    (tmp_path / "good.jsonl").write_text("{}")
    (tmp_path / "rows.csv").write_text("video\na.mp4\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80\x04K\x01.")  # a pickle
    (tmp_path / "films").mkdir()
    name, *given = words.replace("{tmp}", str(tmp_path)).split()
    with pytest.raises(SystemExit) as end:
        PROGRAMS[name].main(given)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and said in line
