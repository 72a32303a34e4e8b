"""`kling-serve --ray`: the pool's workers as actors on a cluster of two nodes, started on this machine."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from kling_programs.sample.server.pool import Pool  # noqa: E402
from kling_programs.sample.server.store import DONE, LIVE, New, Store  # noqa: E402
from kling_programs.sample.server.worker import Maker, Setup  # noqa: E402
from PIL import Image  # noqa: E402
from test_generate import save_tiny  # noqa: E402

from kling.sampling.record import read_record  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    two.other = two.add_node(num_cpus=2)
    yield two
    ray.shutdown()
    two.shutdown()


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (320, 320), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def wait_for(store: Store, seconds: float = 250) -> None:
    end = time.monotonic() + seconds
    while any(store.counts()[status] for status in LIVE):
        assert time.monotonic() < end, store.counts()
        time.sleep(0.1)


def test_actors_on_two_nodes_make_what_one_process_makes_and_a_lost_node_costs_nothing(cluster, tmp_path: Path) -> None:
    from kling_programs.sample.server.cluster import RayWorker, connect

    save_tiny(tmp_path / "model", ["text", "image"])
    setup = Setup(str(tmp_path / "model"), "cpu", 1)
    connect(cluster.address)
    store = Store(tmp_path / "store")
    kept = store.put_input(picture(), ".png")
    base = {"num_frames": 5, "aspect": "1:1"}
    for i in range(6):
        more = {"image": kept} if i == 3 else {}
        store.add(New("anna", "text2video", {}, {"prompt": "a ball", "seed": i} | base | more, str(i), external=str(i)))
    crew = Pool(store, 2, lambda slot: RayWorker(store, setup), lambda what, seconds: None)
    crew.start()
    wait_for(store)
    tasks = [store.get("anna", str(i)) for i in range(6)]
    assert [task.status for task in tasks] == [DONE] * 6
    places = {node["NodeID"] for node in ray.nodes()}
    actors = {actor["NodeID"] for actor in map(dict, _actors())}
    assert len(places) == 2 and actors == places, "one actor on each node"
    alone = Maker(setup).make(
        {"prompt": "a ball", "seed": 3, "image": str(store.folder / kept)} | base, tmp_path / "alone", lambda *_: None
    )
    record = read_record(store.folder / f"{tasks[3].file}.json")
    assert record["frames"]["sha256"] == alone["sha256"] and record["request"]["image"] == str((store.folder / kept).absolute())
    assert Path(record["output"]["path"]).read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    cluster.remove_node(cluster.other, allow_graceful=False)  # a host dies
    for i in range(6, 9):
        store.add(New("anna", "text2video", {}, {"prompt": "a ball", "seed": i} | base, str(i), external=str(i)))
    wait_for(store)
    assert all(store.get("anna", str(i)).status == DONE for i in range(9))
    crew.stop(5)


def _actors() -> list[dict[str, Any]]:
    from ray._private.state import actors

    return [{"NodeID": actor["Address"]["NodeID"]} for actor in actors().values() if actor["State"] == "ALIVE"]


def test_no_cluster_is_told_in_one_line() -> None:
    from kling_programs.sample.server.cluster import connect

    from kling.errors import UserError

    if not ray.is_initialized():
        with pytest.raises(UserError, match="no cluster"):
            connect("127.0.0.1:1")
