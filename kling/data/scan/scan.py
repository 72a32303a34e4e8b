"""Scans many files: one process per core, a deadline per file, no file examined twice, and every refusal counted.

A scan writes three files. `manifest.jsonl` lists the clips that may be used for training; `quarantine.jsonl` every file and clip that may
not, with the reason; `manifest.scan.jsonl` all results so far: an interrupted scan continues from it, and a scan with other filters or
captions decodes nothing again.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cv2

from kling.data.manifest import Bad, Shot, as_line, quarantine_of, read_manifest, relative, shot_from, write_lines, write_manifest
from kling.data.scan.examine import CutDetector, examine, reason_of
from kling.data.scan.filters import Filters, sift
from kling.data.scan.listing import Candidate
from kling.errors import UserError
from kling.runtime.cluster import shared
from kling.runtime.files import file_of, member_of, stamp, writing

FINDS = 2  # version of the results of `examine`: when it is raised, files are examined again
CHUNK = 8  # files that a host of a cluster gets at once
GRACE = 10.0  # seconds after its deadline when a worker that does not answer is killed


@dataclass
class Summary:
    """The result of a scan. `bad` counts unusable files by reason, `dropped` the clips that a filter left out, by reason."""

    files: int = 0
    clips: int = 0
    images: int = 0
    hours: float = 0.0
    uncaptioned: int = 0
    reused: int = 0
    bad: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def bad_share(self) -> float:
        return sum(self.bad.values()) / max(1, self.files)

    def table(self) -> str:
        """A table with one line per figure, for people to read."""
        rows = [("files", self.files), ("  known from before", self.reused), ("unusable files", sum(self.bad.values()))]
        rows += [(f"  {reason}", n) for reason, n in self.bad.most_common()]
        rows += [("clips left out by filters", sum(self.dropped.values()))] if self.dropped else []
        rows += [(f"  {reason}", n) for reason, n in self.dropped.most_common()]
        rows += [("clips kept", self.clips), ("  of them pictures", self.images), ("  without a caption", self.uncaptioned)]
        return "\n".join([*(f"{name:<28}{n:>8}" for name, n in rows), f"{'hours of video kept':<28}{self.hours:>8.2f}"])


def scan(
    candidates: list[Candidate],
    manifest: str | Path,
    *,
    workers: int = 1,
    split: bool = False,
    filters: Filters | None = None,
    per_minute: float = 20.0,
    cluster: bool = False,
) -> Iterator[tuple[int, int] | Summary]:
    """Yields (files done, files in all) while it runs, and last the `Summary`, when the manifest and the quarantine are written.

    cluster: share the files over the Ray cluster that this process has joined (`kling.runtime.cluster`), not over processes here.
    Raises `UserError` before the first file if PySceneDetect is needed and missing, or if `manifest` is another kind of file.
    """
    manifest = Path(manifest)
    if split:
        CutDetector(1.0)
    # keeps what was added to an existing manifest, such as captions by a model and estimated cameras
    added = {_identity(shot): shot for shot in read_manifest(manifest).shots} if manifest.is_file() and manifest.stat().st_size else {}
    journal = ScanJournal(manifest.with_suffix(".scan.jsonl"), split)
    keys = [journal.key(c) for c in candidates]
    todo = [i for i, key in enumerate(keys) if key not in journal and not candidates[i].trouble]
    done = len(candidates) - len(todo)
    summary = Summary(files=len(candidates), reused=sum(key in journal for key in keys))
    yield done, len(candidates)
    jobs = [(candidates[i], relative(file_of(candidates[i].source), manifest.parent), split, per_minute) for i in todo]
    for place, answer in (run_jobs_on_cluster if cluster else run_jobs)(jobs, workers):
        journal.add(keys[todo[place]], answer)
        done += 1
        yield done, len(candidates)
    shots, bad = [], []
    for candidate, key in zip(candidates, keys, strict=True):
        found = {"error": candidate.trouble} if candidate.trouble else journal[key]
        path = relative(file_of(candidate.source), manifest.parent) + (f"/{member[0]}" if (member := member_of(candidate.source)) else "")
        if "error" in found:
            reason = found.get("reason") or reason_of(found["error"])
            bad.append(Bad(path, reason, found["error"]))
            summary.bad[reason] += 1
            continue
        camera = relative(candidate.camera, manifest.parent) if candidate.camera else None
        for shot in (shot_from(row, str(journal.path)) for row in found["shots"]):
            before = added.get(_identity(shot), shot)
            captions, measures = candidate.captions or before.captions, before.measures | shot.measures
            kept_too = {"tracks": before.tracks, "references": before.references}
            shots.append(dataclasses.replace(shot, captions=captions, camera=camera or before.camera, measures=measures, **kept_too))
    kept, dropped = sift(shots, filters or Filters())
    summary.dropped.update(one.reason for one in dropped)
    summary.clips, summary.images = len(kept), sum(shot.is_image for shot in kept)
    summary.uncaptioned = sum(not shot.captions for shot in kept)
    summary.hours = sum(shot.seconds for shot in kept) / 3600
    write_manifest(manifest, kept)
    write_lines(quarantine_of(manifest), (dataclasses.asdict(one) for one in [*bad, *dropped]))
    yield summary


def _identity(shot: Shot) -> tuple[str, float, float]:
    return shot.sha256, shot.start, shot.end


class ScanJournal:
    """The results of all scans, one line per file, appended as they come. A file that has changed since then has another key."""

    def __init__(self, path: Path, split: bool) -> None:
        self.path, self.split = path, split
        self._found: dict[str, dict[str, Any]] = {}
        whole = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                    self._found[entry.pop("key")] = entry
                except (ValueError, KeyError, TypeError, AttributeError):  # cut off when the process was killed
                    break
                whole += len(line)
            with path.open("r+b") as file:
                file.truncate(whole)

    def __contains__(self, key: str) -> bool:
        # a file that was too slow, or crashed its process, is tried again
        return key in self._found and self._found[key].get("reason") not in ("too slow", "crashed the decoder")

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._found[key]

    def add(self, key: str, found: dict[str, Any]) -> None:
        self._found[key] = found
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path), self.path.open("ab") as file:
            file.write(as_line({"key": key, **found}))

    def key(self, candidate: Candidate) -> str:
        try:
            now = stamp(candidate.source)
        except (OSError, ValueError):  # ValueError: a NUL in the name
            now = (0, 0)
        return json.dumps([str(candidate.source), *now, candidate.start, candidate.end, self.split, FINDS], ensure_ascii=False)


# ----------------------------------------------------------------------------------------------------------------- processes

Job = tuple[Candidate, str, bool, float]


def run_jobs(jobs: list[Job], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index of the job, {"shots": [...]} or {"error", "reason"}) in order of completion. A hanging or dead worker costs its file only."""
    pool = [_Worker() for _ in range(min(workers, len(jobs)))]
    waiting = iter(enumerate(jobs))
    try:
        busy = {}
        for worker in pool:
            if job := next(waiting, None):
                worker.give(*job)
                busy[worker.pipe] = worker
        while busy:
            ready = wait(list(busy), timeout=max(0.0, min(w.deadline for w in busy.values()) - time.monotonic()))
            for pipe in [pipe for pipe, w in busy.items() if pipe in ready or time.monotonic() > w.deadline]:
                worker = busy.pop(pipe)
                answer = worker.answer(late=pipe not in ready)
                if answer is not None:
                    yield worker.place, answer
                    if (job := next(waiting, None)) is None:
                        continue
                    worker.give(*job)
                busy[worker.pipe] = worker
    finally:
        for worker in pool:
            worker.kill()


def run_jobs_on_cluster(jobs: list[Job], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `run_jobs`, over the hosts of a Ray cluster: each gets a few files at a time, and gives them to a worker process of its own."""
    numbered = list(enumerate(jobs))
    for answers in shared(lambda: _some_jobs, [numbered[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)], workers):
        yield from answers


def _some_jobs(numbered: list[tuple[int, Job]]) -> list[tuple[int, dict[str, Any]]]:
    return [(numbered[place][0], answer) for place, answer in run_jobs([job for _, job in numbered], 1)]


class _Worker:
    """One process that examines files, and our end of its pipe."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        # forked if possible: a new interpreter would import everything again
        cv2.setNumThreads(1)  # in the parent: a pool's threads do not survive a fork, and a child that waits for them hangs
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, place: int, job: Job) -> None:
        self.place, self.job = place, job
        self.deadline = time.monotonic() + job[3] + GRACE
        self.pipe.send(job)

    def answer(self, late: bool) -> dict[str, Any] | None:
        """The worker's result; None if it only reported its time limit. A late or dead worker is replaced."""
        source = self.job[0].source
        if late:
            found = {"error": f"{source} took longer to decode than it may, and hung", "reason": "too slow"}
        else:
            try:
                found = self.pipe.recv()
            except EOFError:
                self.process.join(timeout=GRACE)
                found = {"error": f"{source} crashed its decoder (exit {self.process.exitcode})", "reason": "crashed the decoder"}
            else:
                if isinstance(found, float):
                    self.deadline = time.monotonic() + found + GRACE
                    return None
                return found
        self.kill()
        self._start()
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection) -> None:
    """The main loop of a worker: it takes jobs and returns shots or errors, until it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    cv2.setNumThreads(1)
    while True:
        try:
            candidate, path, split, per_minute = pipe.recv()
        except EOFError:
            return
        pipe.send(_examined(candidate, path, split, per_minute, pipe))


def _examined(candidate: Candidate, path: str, split: bool, per_minute: float, pipe: Connection) -> dict[str, Any]:
    stretch: dict[str, Any] = {"start": candidate.start, "end": candidate.end}
    try:
        shots: Iterable[Shot] = examine(candidate.source, path, split=split, per_minute=per_minute, announce=pipe.send, **stretch)
        return {"shots": [dataclasses.asdict(shot) for shot in shots]}
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # an unexpected error must cost this file only; it is counted by its type
        return {"error": f"{candidate.source}: {type(error).__name__}: {error}", "reason": "unreadable"}
