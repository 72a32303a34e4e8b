"""What outlives a kill: the store of `kling-serve`, its workers, and kills of all of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("jwt")
pytest.importorskip("prometheus_client")

from kling_programs.sample.server.pool import Pool, ProcessWorker
from kling_programs.sample.server.store import DONE, FAILED, RUNNING, WAITING, Limits, New, Refused, Store
from kling_programs.sample.server.worker import Setup
from serving import SHORT, new, png

from kling.errors import UserError

HERE = Path(__file__).parent

pytest_plugins = ["serving"]


def test_a_late_result_of_an_old_lease_is_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(new())
    first = store.claim(60)
    assert store.claim(60) is None
    store.release(first, died=True)
    second = store.claim(60)
    assert (second.id, second.lease) == (first.id, first.lease + 1)
    names = [f"made/{task.id}-{task.lease}.mp4" for task in (first, second)]
    for name in names:
        (tmp_path / name).write_bytes(b"video")
    assert not store.extend(first, 1, 2, 60) and store.extend(second, 1, 2, 60)
    assert not store.finish(first, names[0], {"seconds": 1}) and not (tmp_path / names[0]).exists()
    assert not store.fail(first, "late")
    assert store.finish(second, names[1], {"seconds": 1}) and (tmp_path / names[1]).exists()
    assert not store.finish(second, names[1], {"seconds": 1})
    assert store.get("anna", first.id).file == names[1]


def test_a_task_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(new())
    for _ in range(3):
        store.release(store.claim(60), died=True)
    (task,) = store.list("anna", ["text2video"], 0, 10)
    assert task.status == FAILED and "died 3 times" in task.message and store.claim(60) is None


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for i in range(3):
        store.add(new(external=str(i)))
    done, lost = store.claim(60), store.claim(60)
    for task in (done, lost):
        (tmp_path / f"made/{task.id}-1.mp4").write_bytes(b"video")
    store.finish(done, f"made/{done.id}-1.mp4", {"seconds": 1})
    store._db.close()  # as a kill does
    again = Store(tmp_path)
    assert again.recover() == 1
    assert [path.name for path in again.made.iterdir()] == [f"{done.id}-1.mp4"]
    assert again.counts() == {WAITING: 2, RUNNING: 0, DONE: 1, FAILED: 0}
    assert again.claim(60).id == lost.id and again.get("anna", "0").token == again.by_token(again.get("anna", "0").token).token
    assert not again.finish(lost, f"made/{lost.id}-1.mp4", {}), "the lease of before"


def test_keys_take_turns(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key, count in (("anna", 50), ("ben", 3), ("cleo", 1)):
        for _ in range(count):
            store.add(new(key))
    order = []
    for _ in range(10):
        task = store.claim(60)
        order.append(task.key)
        store.finish(task, "made/none", {})
    assert order[:3] == ["anna", "ben", "cleo"] and Counter(order[:7]) == {"anna": 3, "ben": 3, "cleo": 1}
    busy = [store.claim(60) for _ in range(2)]
    store.add(new("ben"))
    assert {task.key for task in busy} == {"anna"} and store.claim(60).key == "ben", "whoever has least running comes first"


def test_a_key_has_its_share(tmp_path: Path) -> None:
    store = Store(tmp_path, Limits(places=2, rate=5))
    for _ in range(2):
        store.add(new())
    with pytest.raises(Refused, match="2 tasks of this key are unfinished") as full:
        store.add(new())
    assert full.value.code == "too_many"
    store.add(new("ben"))
    for _ in range(3):
        assert store.cancel(store.list("anna", ["text2video"], 0, 10)[0], "")
        store.add(new())
    with pytest.raises(Refused, match="5 tasks were added") as fast:
        store.add(new())
    assert fast.value.code == "too_fast"


def test_a_look_at_a_share_loses_no_task_that_is_added_meanwhile(tmp_path: Path) -> None:
    store = Store(tmp_path, Limits(places=9, rate=2))
    store.add(new())
    other = threading.Thread(target=store.add, args=(new(),))

    class Read(list):
        """Times that another thread adds to while they are read."""

        def __iter__(self):
            yield from super().__iter__()
            if other.ident is None:
                other.start()
                other.join(0.5)  # it waits for the lock

    store._recent["anna"] = Read(store._recent["anna"])
    store.check_share("anna")
    other.join()
    with pytest.raises(Refused, match="2 tasks were added"):
        store.check_share("anna")


def test_shares_over_the_wire(start) -> None:
    held = threading.Event()
    held.set()
    client = start(held=held, limits=Limits(places=1, rate=2))
    name = client.make("text2video", SHORT)["task_id"]
    assert client("POST", "/v1/videos/text2video", SHORT)[1]["code"] == 1303
    client("DELETE", f"/v1/videos/text2video/{name}")
    held.clear()
    client.make("text2video", SHORT)
    status, said = client("POST", "/v1/videos/text2video", SHORT)
    assert (status, said["code"]) == (429, 1302) and "try again in" in said["message"]


def test_results_go_when_their_time_is_over(start) -> None:
    client = start(limits=Limits(days=1))
    made = client.wait("image2video", client.make("image2video", SHORT | {"image": png(), "external_task_id": "old"})["task_id"])
    client.store._db.execute("UPDATE tasks SET finished = finished - 90000")
    assert client.store.expire() == 1 and client.store.expire() == 0
    status, said = client("GET", f"/v1/videos/image2video/{made['task_id']}")
    assert (status, said["code"]) == (404, 1203) and "kept for 1 days" in said["message"]
    assert list(client.store.made.iterdir()) == []
    status, said = client("POST", "/v1/videos/image2video", SHORT | {"image": png(), "external_task_id": "old"})
    assert (status, said["code"]) == (404, 1203) and "'old' is the name of a task whose result is gone" in said["message"]
    (picture,) = client.store.inputs.iterdir()
    os.utime(picture)
    client.store.tidy()
    assert picture.exists(), "new ones may belong to a task that is being added"


def test_a_store_of_another_version_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    store._db.execute("PRAGMA user_version=9")
    store.close()
    with pytest.raises(UserError, match="version 9"):
        Store(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tasks.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path / "b")


# -------------------------------------------------------------------------------------------------------------------------------- kills


def run_killed(folder: Path, tasks: int, kills: int, program: list[str], gap: float) -> Path:
    """Make `tasks` tasks in a store, whose server is killed `kills` times on the way."""
    store = Store(folder)
    for i in range(tasks):
        store.add(New("anna", "text2video", {}, {"prompt": "x", "seed": i}, str(i), external=str(i)))
    store.close()
    random = np.random.default_rng(tasks)
    for _ in range(kills):
        process = subprocess.Popen(program + [str(folder)], stdout=subprocess.PIPE)
        process.stdout.readline()  # it has begun
        time.sleep(gap * (0.2 + random.random()))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(program + [str(folder)], check=True, timeout=200, stdout=subprocess.DEVNULL)
    return folder


def test_no_kill_loses_a_task_or_makes_one_twice(tmp_path: Path) -> None:
    program = [sys.executable, str(HERE / "serve_stub.py")]
    killed = Store(run_killed(tmp_path / "killed", 12, 3, program, 0.4))
    alone = Store(run_killed(tmp_path / "alone", 12, 0, program, 0))
    leases = 0
    for i in range(12):
        task, same = killed.get("anna", str(i)), alone.get("anna", str(i))
        assert task.status == same.status == DONE
        assert (killed.folder / task.file).read_bytes() == (alone.folder / same.file).read_bytes()
        leases += task.lease
    files = {path.name for path in killed.made.iterdir()}
    assert len(files) == 24 and leases > 12, "every video and its record once, and some were begun twice"


def test_a_worker_ends_with_its_server(tmp_path: Path) -> None:
    program = [sys.executable, str(HERE / "serve_stub.py"), str(tmp_path)]
    store = Store(tmp_path)
    for i in range(50):
        store.add(New("anna", "text2video", {}, {"prompt": "x", "seed": i}, str(i)))
    store.close()
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert all(Path(f"/proc/{pid}").exists() for pid in workers)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in workers):
        assert time.monotonic() < end, "a worker outlives its server"
        time.sleep(0.05)


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(New("anna", "text2video", {}, {"prompt": "kill", "seed": 1}, "a", external="a"))
    store.add(New("anna", "text2video", {}, {"prompt": "error", "seed": 1}, "b", external="b"))
    store.add(New("anna", "text2video", {}, {"prompt": "x", "seed": 2}, "c", external="c"))
    program = (sys.executable, str(HERE / "serve_stub.py"), "worker")
    crew = Pool(store, 1, lambda slot: ProcessWorker(store, Setup(), program=program), lambda what, seconds: None)
    crew.start()
    end = time.monotonic() + 60
    while store.counts()[WAITING] + store.counts()[RUNNING] and time.monotonic() < end:
        time.sleep(0.05)
    crew.stop(5)
    told = {name: store.get("anna", name) for name in "abc"}
    assert told["a"].status == FAILED and "died 3 times" in told["a"].message
    assert told["b"].status == FAILED and "no balls" in told["b"].message
    assert told["c"].status == DONE


def test_a_cancelled_task_stops_and_the_next_does_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, _ = store.add(New("anna", "text2video", {}, {"prompt": "long", "seed": 1}, "a", external="a"))
    program = (sys.executable, str(HERE / "serve_stub.py"), "worker")
    crew = Pool(store, 1, lambda slot: ProcessWorker(store, Setup(), program=program), lambda what, seconds: None)
    crew.start()
    while not store.get("anna", "a").step:
        time.sleep(0.01)
    began = time.monotonic()
    assert store.cancel(first, "cancelled by the client")
    store.add(New("anna", "text2video", {}, {"prompt": "x", "seed": 2}, "b", external="b"))
    while store.counts()[DONE] == 0:
        assert time.monotonic() - began < 20, "a long task goes on after it was cancelled"
        time.sleep(0.01)
    crew.stop(5)
    assert store.get("anna", "a").message == "cancelled by the client" and len(list(store.made.glob("*.mp4"))) == 2
    assert store.recover() == 0 and [path.stem for path in store.made.glob("*.mp4")] == [store.get("anna", "b").claim]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_of_the_real_program(tiny: Path, tmp_path: Path) -> None:
    """kill -9 of the server or of its worker at random instants, while a client repeats what is not answered: every video
    once, and bit-equal to a run left alone. The tiny model at 17 frames. KLING_KILLS=200,20 is 200 tasks and 20 kills;
    KLING_KILLS_MODEL=kling/assets takes the shipped model.
    """
    import httpx
    import psutil

    tasks, kills = map(int, os.environ.get("KLING_KILLS", "40,6").split(","))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, http = f"http://127.0.0.1:{port}", httpx.Client(timeout=30)
    model = Path(os.environ.get("KLING_KILLS_MODEL", tiny)).absolute()

    def program(folder: Path) -> subprocess.Popen:
        words = ["--model", str(model), "--store", str(folder), "--port", str(port), "--device", "cpu", "--threads", "1"]
        return subprocess.Popen([str(Path(sys.executable).with_name("kling-serve")), *words, "--places", "1000", "--rate", "10000"])

    def ask(method: str, path: str, **more: Any) -> Any:
        end = time.monotonic() + 900  # a start takes minutes on a crowded core
        while time.monotonic() < end:
            try:
                return http.request(method, url + path, **more).json()
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError("no server")

    def made() -> list[dict]:
        listed = ask("GET", "/v1/videos/text2video?pageSize=500")["data"]
        assert not [task for task in listed if task["task_status"] == "failed"]
        return [task for task in listed if task["task_status"] == "succeed"]

    def submit() -> None:
        for i in range(tasks):
            said = ask("POST", "/v1/videos/text2video", json=SHORT | {"seed": i, "external_task_id": str(i)})
            assert said["code"] == 0, said

    def run(folder: Path, kills: int) -> dict[str, bytes]:
        random, process = np.random.default_rng(0), program(folder)
        client = threading.Thread(target=submit)
        client.start()
        try:
            for k in range(1, kills + 1):
                while len(made()) < k * tasks // (kills + 1):
                    time.sleep(0.2)
                time.sleep(random.random())
                workers = psutil.Process(process.pid).children()
                if workers and random.random() < 0.5:
                    random.choice(workers).kill()
                    killed["worker"] += 1
                else:
                    process.kill()
                    process.wait()
                    process = program(folder)
                    killed["server"] += 1
            client.join()
            while len(found := made()) < tasks:
                time.sleep(0.2)
            return {t["task_info"]["external_task_id"]: http.get(t["task_result"]["videos"][0]["url"]).content for t in found}
        finally:
            process.terminate()
            process.wait()

    killed: Counter[str] = Counter()
    disturbed, alone = run(tmp_path / "killed", kills), run(tmp_path / "alone", 0)
    assert disturbed == alone and len(disturbed) == tasks
    store = Store(tmp_path / "killed")
    assert store.recover() == 0 and len(list(store.made.glob("*.mp4"))) == tasks
    leases = sum(store.get("local", str(i)).lease for i in range(tasks))
    print(f"{tasks} tasks, {dict(killed)} killed, {leases - tasks} tasks begun again")
    assert killed.total() == kills and leases > tasks
