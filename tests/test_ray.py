"""`--ray` of kling-serve, kling-data scan and kling-eval world, on a cluster of two nodes, started on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ray = pytest.importorskip("ray")

from kling_programs.sample.server.cluster import RayWorker  # noqa: E402
from kling_programs.sample.server.pool import Pool  # noqa: E402
from kling_programs.sample.server.store import DONE, LIVE, New, Store  # noqa: E402
from kling_programs.sample.server.worker import Maker, Setup  # noqa: E402
from serve_stub import Stub  # noqa: E402

from kling.errors import UserError  # noqa: E402
from kling.runtime.cluster import Room, connect, shared  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # loads of processes on few cores


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # the nodes know serve_stub too
        lean = {"num_cpus": 1, "include_log_monitor": False}
        two = Cluster(initialize_head=True, head_node_args=lean | {"include_dashboard": False, "no_monitor": True})
        two.other = two.add_node(**lean)
        assert connect(two.address) == Room(2, 0)
        yield two
        ray.shutdown()
        two.shutdown()


def add(store: Store, first: int, last: int, **fields: Any) -> None:
    for i in range(first, last):
        store.add(New("anna", "text2video", {}, {"prompt": "a ball", "seed": i} | fields, str(i), external=str(i)))


def wait_for(store: Store, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while any(store.counts()[status] for status in LIVE):
        assert time.monotonic() < end, store.counts()
        time.sleep(0.1)


def test_no_cluster_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="no cluster"):
        connect("127.0.0.1:1")


def test_jobs_run_on_all_hosts_and_a_dead_process_costs_nothing(cluster: Any, tmp_path: Path) -> None:
    def make() -> Any:
        loaded = f"{os.getpid()} {time.monotonic()}"

        def work(job: int) -> tuple[int, str, str, str]:
            mark = tmp_path / str(job)
            if job == 3 and not mark.exists():
                mark.touch()
                os._exit(9)
            time.sleep(0.3)
            return job, ray.get_runtime_context().get_node_id(), loaded, os.getcwd()

        return work

    jobs, nodes, loads, folders = zip(*shared(make, range(10), 2), strict=True)
    assert sorted(jobs) == list(range(10)) and len(set(nodes)) == 2 and set(folders) == {os.getcwd()}
    assert 2 <= len(set(loads)) <= 4, "one load for each process, and one for that in place of the dead one"


def test_a_mistake_on_a_host_is_told_here(cluster: Any) -> None:
    def refuse(job: int) -> None:
        raise UserError(f"there are no balls in {job}")

    with pytest.raises(UserError, match="^there are no balls in 0$"):
        list(shared(lambda: refuse, [0], 2))


def test_a_scan_finds_the_same(cluster: Any, tmp_path: Path) -> None:
    from kling.data.video import write_video

    folder = tmp_path / "in"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(10):
        write_video(folder / f"{i}.mp4", random.integers(0, 256, (9, 32, 48, 3), dtype=np.uint8), 8)
    (folder / "3.mp4").write_bytes((folder / "3.mp4").read_bytes()[:600])
    (folder / "5.mp4").write_text("no video")
    found = {}
    for name, more in (("here", ["--workers", "2"]), ("there", ["--ray", cluster.address])):
        words = [str(Path(sys.executable).with_name("kling-data")), "scan", "in", "--out", f"{name}.jsonl", "--allow-bad", "1", *more]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout + done.stderr
        files = [tmp_path / f"{name}.jsonl", *tmp_path.glob(f"{name}*quarantine*")]
        journal = sorted((tmp_path / f"{name}.scan.jsonl").read_text().splitlines())
        found[name] = done.stdout, journal, [path.read_text() for path in files]
    assert found["here"] == found["there"] and "clips kept                         8" in found["there"][0], found["there"][0]


def test_an_evaluation_measures_the_same(cluster: Any, tmp_path: Path) -> None:
    from kling_programs.eval.world import Options, evaluate, load

    from kling.sampling.pipeline import ASSETS

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a process has in the cluster
    try:
        rows = {}
        for name, more in (("here", {}), ("there", {"ray": True, "workers": 2})):
            out = tmp_path / name
            options = Options(str(out), n=2, steps=1, examples=24, tasks=("text-en",), **more)
            evaluate(load(ASSETS, options), options, {"sha256": {}}, ASSETS)
            told = [json.loads(line) for line in (out / "cases.jsonl").read_text().splitlines()]
            rows[name] = {line["k"]: line["rows"] for line in told}
            clips = sorted(out.rglob("*.npz"))
            rows[name] |= {str(path.relative_to(out)): np.load(path)["frames"].tobytes() for path in clips}
    finally:
        torch.set_num_threads(threads)
    assert rows["here"] == rows["there"] and len(rows["here"]) == 4


def test_actors_make_what_a_process_makes(cluster: Any, tmp_path: Path) -> None:
    from PIL import Image
    from test_generate import save_tiny

    from kling.sampling.record import read_record

    save_tiny(tmp_path / "model", ["text", "image"])
    Image.new("RGB", (320, 320), (200, 30, 30)).save(tmp_path / "first.png")
    setup, store = Setup(str(tmp_path / "model"), "cpu", 1), Store(tmp_path / "store")
    kept = store.put_input((tmp_path / "first.png").read_bytes(), ".png")
    add(store, 0, 1, num_frames=5, aspect="1:1", image=kept)
    crew = Pool(store, 1, lambda slot: RayWorker(store, setup), lambda what, seconds: None)
    crew.start()
    wait_for(store)
    crew.stop(5)
    task, here = store.get("anna", "0"), str((store.folder / kept).absolute())
    alone = Maker(setup).make(task.request | {"image": here}, tmp_path / "alone", lambda *_: None)
    record = read_record(store.folder / f"{task.file}.json")
    assert record["frames"]["sha256"] == alone["sha256"] and record["request"]["image"] == here and set(record["inputs"]) == {here}
    assert Path(record["output"]["path"]).read_bytes() == (tmp_path / "alone.mp4").read_bytes()


def test_two_nodes_share_the_tasks_and_a_lost_one_costs_nothing(cluster: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    crew = Pool(store, 2, lambda slot: RayWorker(store, Setup(), maker=Stub), lambda what, seconds: None)
    crew.start()
    while len(crew.ready) < 2:
        time.sleep(0.1)
    assert actors_at() == {node["NodeID"] for node in ray.nodes() if node["Alive"]}, "one on each node"
    add(store, 0, 12)
    while store.counts()[DONE] < 4:
        time.sleep(0.05)
    cluster.remove_node(cluster.other, allow_graceful=False)  # a host dies
    wait_for(store)
    assert all(store.get("anna", str(i)).status == DONE for i in range(12))
    assert len(list(store.made.glob("*.mp4"))) == 12 and len(actors_at()) == 1
    crew.stop(5)


def actors_at() -> set[str]:
    """The nodes on which actors live."""
    from ray._private.state import actors

    return {actor["Address"]["NodeID"] for actor in actors().values() if actor["State"] == "ALIVE"}
