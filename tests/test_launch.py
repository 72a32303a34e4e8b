"""Launcher files: every accelerate config starts a run, and the SLURM script passes the right arguments and requeues the right jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import workers
import yaml

from kling.runtime.accelerator import make_accelerator
from kling.runtime.parallel import lay_out

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))

WHAT_IT_IS = """
import json, os, sys
with open(f"{sys.argv[1]}/environment-{os.environ.get('RANK', '0')}.json", "w") as file:
    json.dump(dict(os.environ), file)
"""


def launch(folder: Path) -> None:
    """`accelerate launch --config_file config.yaml program.py FOLDER`, in a process that has imported it already."""
    from accelerate.commands.launch import main

    sys.argv = ["accelerate-launch", "--config_file", str(folder / "config.yaml"), str(folder / "program.py"), str(folder)]
    main()


def set_up(folder: Path, rank: int) -> None:
    """Set up as a program started by the launcher with this environment."""
    os.environ.clear()
    os.environ.update(json.loads((folder / f"environment-{rank}.json").read_text()))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # the launcher that kept the store has ended: process 0 keeps one
    accelerator = make_accelerator(folder, mixed_precision="fp32")
    layout = lay_out(accelerator)
    names = list(accelerator.torch_device_mesh.mesh_dim_names) if layout.sharded else []
    (folder / str(rank)).write_text(json.dumps([layout.rank, layout.ranks, layout.split, layout.sharded, names]))
    accelerator.wait_for_everyone()


EXPECTED = {
    "cpu": [[0, 1, 1, False, []]],
    "ddp": [[0, 2, 1, False, []], [1, 2, 1, False, []]],
    "fsdp2": [[0, 2, 1, True, ["dp_shard"]], [1, 2, 1, True, ["dp_shard"]]],
    "hsdp": [[r, 4, 1, True, ["dp_replicate", "dp_shard"]] for r in range(4)],
    "fsdp2_cp": [[r // 2, 2, 2, True, ["dp_shard", "cp"]] for r in range(4)],
}
SIZES = {"fsdp2": {"dp_shard": 2}, "hsdp": {"dp_replicate": 2, "dp_shard": 2}, "fsdp2_cp": {"dp_shard": 2, "cp": 2}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_layout_is_as_large_as_its_processes(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    sizes = values.get("parallelism_config", {})
    product = 1
    for size in sizes.values():
        product *= size
    assert product in (1, values["num_processes"]) and f"configs/accelerate/{path.name}" in path.read_text().splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_launches_it(path: Path, tmp_path: Path) -> None:
    """The real launcher on each file, made smaller and for CPUs; then that many processes with the environments that it sets."""
    values, expected = yaml.safe_load(path.read_text()), EXPECTED[path.stem]
    values |= {"use_cpu": True, "num_processes": len(expected), "num_machines": 1, "mixed_precision": "no"}
    for name, size in SIZES.get(path.stem, {}).items():
        values["parallelism_config"][f"parallelism_config_{name}_size"] = size
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "program.py").write_text(WHAT_IT_IS)
    together(launch, [(tmp_path,)])
    together(set_up, [(tmp_path, rank) for rank in range(len(expected))])
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(len(expected))] == expected


def together(what: Callable[..., None], arguments: list[tuple]) -> None:
    processes = [workers.PROCESSES.Process(target=what, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> "$LOG.requeue"; fi',
    "srun": 'shift; export SLURM_NODEID=1; exec "$@"',
    # a launcher with one training process, which on SIGUSR1 saves and exits with 143; the launcher itself exits with 1
    "accelerate": """printf '%s\\n' "$@" > "$LOG"
python3 -c 'import os, pathlib, signal, sys, time
out = pathlib.Path(os.environ["OUT"]); out.mkdir(exist_ok=True)
def leave(*_): (out / "latest").write_text("step-1"); sys.exit(143)
signal.signal(signal.SIGUSR1, leave); (out / "ready").touch()
time.sleep(30)' || exit 1""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "OUT": str(tmp_path / "out"), "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("ddp", []),
        ("fsdp2", ["--parallelism_config_dp_shard_size", "8"]),
        ("hsdp", ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "4"]),
        ("fsdp2_cp", ["--parallelism_config_cp_size", "2", "--parallelism_config_dp_shard_size", "4"]),
    ],
)
def test_slurm(layout: str, sizes: list[str], slurm: dict[str, str], tmp_path: Path) -> None:
    """Every node starts its part; a signal reaches the training, which saves; the job is queued again."""
    words = ["configs/dit/14b.yaml", f"out={tmp_path / 'out'}", "samples=[{prompt: a red ball}]"]
    job = subprocess.Popen(["bash", str(ROOT / "configs" / "slurm.sh"), layout, *words], env=slurm, cwd=ROOT, start_new_session=True)
    while not (tmp_path / "out" / "ready").exists():
        assert job.poll() is None
        time.sleep(0.01)
    (wrapper,) = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(job.pid)], text=True).split()]
    os.kill(wrapper, signal.SIGUSR1)
    assert job.wait(20) == 1
    assert (tmp_path / "log.requeue").read_text() == "requeue 7\n"
    started = (tmp_path / "log").read_text().splitlines()
    common = ["launch", "--config_file", f"configs/accelerate/{layout}.yaml", "--num_machines", "2", "--num_processes", "8",
              "--main_process_ip", "node1", "--main_process_port", "29500"]  # fmt: skip
    assert started == [*common, *sizes, "--machine_rank", "1", "train/train_dit.py", *words]


def test_a_job_that_fails_is_not_queued_again(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "accelerate").write_text("#!/usr/bin/env bash\nexit 3\n")
    assert (
        subprocess.run(["bash", str(ROOT / "configs" / "slurm.sh"), "ddp", "x.yaml", f"out={tmp_path}"], env=slurm, cwd=ROOT).returncode
        == 3
    )
    assert not (tmp_path / "log.requeue").exists()
