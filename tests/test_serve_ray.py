"""`kling-serve --ray`: the pool's workers as actors on a cluster of two nodes, started on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from kling_programs.sample.server.cluster import RayWorker, connect  # noqa: E402
from kling_programs.sample.server.pool import Pool  # noqa: E402
from kling_programs.sample.server.store import DONE, LIVE, New, Store  # noqa: E402
from kling_programs.sample.server.worker import Maker, Setup  # noqa: E402
from serve_stub import Stub  # noqa: E402

from kling.errors import UserError  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # the nodes know serve_stub too
        two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        two.other = two.add_node(num_cpus=1)
        connect(two.address)
        yield two
        ray.shutdown()
        two.shutdown()


def add(store: Store, first: int, last: int, **fields: Any) -> None:
    for i in range(first, last):
        store.add(New("anna", "text2video", {}, {"prompt": "a ball", "seed": i} | fields, str(i), external=str(i)))


def wait_for(store: Store, seconds: float = 250) -> None:
    end = time.monotonic() + seconds
    while any(store.counts()[status] for status in LIVE):
        assert time.monotonic() < end, store.counts()
        time.sleep(0.1)


def test_no_cluster_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="no cluster"):
        connect("127.0.0.1:1")


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
