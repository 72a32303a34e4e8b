"""The clips of a manifest at a model's lengths, aspects and frame rate. For a folder of videos, a manifest is made on the fly.

A shot goes to the bucket of its nearest aspect and of the longest length that it fills, and is divided into as many consecutive clips as
it holds; the clips are shifted within the remaining frames in every epoch, so that all frames are used. Pictures are clips of one frame.
A row of several shots is one clip from its start: of each shot as many frames as fill whole latents, so that cuts lie where latents begin.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from kling.cameras.files import load_window
from kling.cameras.trajectory import Trajectory
from kling.condition.tracks import Tracks
from kling.data.buckets import Bucket
from kling.data.image import read_image
from kling.data.info import VideoInfo
from kling.data.manifest import IMAGE, Manifest, MissingClip, Shot, read_manifest, relative
from kling.data.reader import open_reader
from kling.data.scan.listing import Listing
from kling.data.tracks import load_tracks
from kling.data.transforms import contain, fit
from kling.errors import UserError
from kling.runtime.files import Source, file_of, head, member_of, sha256, sniff, stamp
from kling.shapes import TEMPORAL, aspect_size, latent_frames, latent_of_frame, nearest_frames

NAMED = 3  # number of unusable files that an error message names


@dataclass(frozen=True)
class ClipSample:
    """One clip: video (T, H, W, 3) uint8, captions with their weights, and the camera and tracks where they are known."""

    video: Tensor
    captions: list[str]
    trajectory: Trajectory | None
    name: str
    weights: list[float] | None = None  # None: all equal
    tracks: Tracks | None = None
    shots: list[tuple[int, int]] | None = None  # of each shot the latent frame where it begins, and how many of the captions are its own
    references: tuple[Tensor, ...] = ()  # pictures (H, W, 3) uint8 of its things


@dataclass(frozen=True)
class Piece:
    """The k-th clip of a shot; `slack` frames of the shot remain."""

    shot: Shot
    k: int
    slack: int


class ManifestClips:
    """Clips of `manifest` by bucket. Raises `UserError` for clips that cannot be used (unless skip_bad) or have no caption.

    lengths: pixel frames to cut; aspects: names to sort into; fps: of the clips; scale: times the small world's size.
    """

    def __init__(
        self,
        manifest: Manifest,
        lengths: list[int],
        aspects: list[str],
        fps: float,
        *,
        scale: int = 1,
        reader: str = "auto",
        seed: int = 0,
        unconditional: bool = False,
        skip_bad: bool = False,
    ) -> None:
        self.manifest, self.fps, self.scale, self.reader, self.seed = manifest, fps, scale, reader, seed
        self.buckets: dict[Bucket, list[Piece]] = {}
        self.unused: list[str] = []  # clips that are too short for every length
        for shot in manifest.shots:
            count = sum(n for _, n in story(shot, fps)) if shot.shots else shot.count(fps)
            fitting = [T for T in lengths if count >= T and (T == 1 or not shot.is_image)]
            if not fitting:
                what = "is a picture" if shot.is_image else f"is {shot.seconds:.2f} s long"
                self.unused.append(f"{shot.name} {what}, which gives {count} frames at {fps:g} fps")
                continue
            T, aspect = max(fitting), min(aspects, key=lambda a: _off(shot, a))
            pieces = [Piece(shot, 0, 0)] if shot.shots else [Piece(shot, k, count % T) for k in range(count // T)]
            self.buckets.setdefault(Bucket(aspect, T), []).extend(pieces)
        self.buckets = dict(sorted(self.buckets.items()))
        if self.unused and (not skip_bad or not self.buckets):
            named = "; ".join(self.unused[:NAMED]) + ("; ..." if len(self.unused) > NAMED else "")
            raise UserError(
                f"{len(self.unused)} of {len(manifest)} clips are too short for data.frames {lengths} ({named}): "
                "add a shorter length (1 for pictures), or leave them out with data.skip_bad=true"
            )
        bare = [shot.name for shot in manifest.shots if not shot.captions]
        if bare and not unconditional:
            raise UserError(
                f"{len(bare)} of {len(manifest)} clips have no caption ({', '.join(bare[:NAMED])}): write .txt files beside them and scan "
                "again, run kling-data caption, or train without captions with data.unconditional=true"
            )

    def clip(self, bucket: Bucket, number: int, epoch: int | None = None) -> ClipSample:
        """Clip `number` of a bucket, shifted for `epoch` (None: not shifted). Raises `UserError` if its file has changed."""
        piece = self.buckets[bucket][number]
        slack = 0 if epoch is None else random.Random(f"shift/{self.seed}/{epoch}/{piece.shot.name}").randint(0, piece.slack)
        return self.cut(piece.shot, (piece.k * bucket.frames + slack) / self.fps, bucket.frames, bucket.aspect)

    def identity(self, bucket: Bucket, number: int) -> list[object]:
        """Everything that determines clip `number`: contents, time range, captions, camera and tracks (`missing` if a file is gone)."""
        shot, k = self.buckets[bucket][number].shot, self.buckets[bucket][number].k
        camera, tracks = (self._hash(file) for file in (shot.camera, shot.tracks))
        more = [] if tracks is None else [tracks]  # clips without tracks, or of one shot, stay what they were to older caches
        more += [[self._hash(file) for file in shot.references]] if self.has_references else []
        more += [shot.shots] if shot.shots else []
        return [shot.sha256, shot.start, shot.end, k, [asdict(caption) for caption in shot.captions], camera, *more]

    @property
    def has_references(self) -> bool:
        """Whether a clip has some; then a cache has room for those of each."""
        return any(shot.references for shot in self.manifest.shots)

    def _hash(self, file: str | None) -> str | None:
        try:
            return sha256(self.manifest.folder / file) if file else None
        except OSError:
            return "missing"  # reading the clip later raises an error that names it

    def any(self, index: int, frames: int, aspect: str) -> ClipSample:
        """Clip `index` of those that are long enough, fitted to an aspect whatever its own: for evaluation and statistics."""
        enough = [piece for bucket, pieces in self.buckets.items() if bucket.frames >= frames for piece in pieces]
        if not enough:
            raise UserError(f"no clip of the manifest has {frames} frames at {self.fps:g} fps: ask for fewer in data.frames")
        order = random.Random(f"any/{self.seed}").sample(range(len(enough)), len(enough))
        piece = enough[order[index % len(enough)]]
        return self.cut(piece.shot, piece.k * frames / self.fps, frames, aspect)

    def cut(self, shot: Shot, offset: float, frames: int, aspect: str) -> ClipSample:
        """`frames` frames of a shot from `offset` seconds into it, at an aspect's size."""
        source, start, size = self.manifest.check(shot), shot.start + offset, aspect_size(aspect, self.scale)
        if shot.is_image:
            video = fit(read_image(source), *size)[None]
        else:
            times = [start + i / self.fps for i in range(frames)]
            if shot.shots:
                times = [begin + i / self.fps for begin, count in story(shot, self.fps) for i in range(count)][:frames]
            threads = 1 if torch.utils.data.get_worker_info() else 0
            video = open_reader(source, self.reader, shot.video, threads).at(times, size)
        when = torch.arange(frames, dtype=torch.float64) / self.fps + start
        for kind, file in (("camera", shot.camera), ("tracks", shot.tracks), *(("reference", file) for file in shot.references)):
            if file and not (self.manifest.folder / file).is_file():
                raise MissingClip(f"{kind} {file} of clip {shot.name} does not exist: restore it, or scan again")
        camera = tracks = None
        if shot.tracks:
            tracks = load_tracks(self.manifest.folder / shot.tracks, when, size)
        if shot.camera:
            camera = load_window(self.manifest.folder / shot.camera, when, size, shot.video.duration)
        texts = [c.text for c in shot.captions] or [""]
        weights = [c.weight for c in shot.captions] or [1.0]
        pictures = tuple(contain(read_image(self.manifest.folder / file), *size)[0] for file in shot.references)
        shots = self._shots(shot, frames)
        return ClipSample(video, texts, camera, f"{shot.name}+{offset:.3f}", weights, tracks, references=pictures, shots=shots)

    def _shots(self, shot: Shot, frames: int) -> list[tuple[int, int]] | None:
        """`ClipSample.shots` of the first `frames` frames."""
        if not shot.shots:
            return None
        lengths = [count for _, count in story(shot, self.fps)]
        starts = [latent_of_frame(first) for first in accumulate([0, *lengths[:-1]])]
        return [(j, count) for j, (_, count) in zip(starts, shot.shots, strict=True) if j < latent_frames(frames)]

    def report(self) -> str:
        """One line: what is used, and what is not and why."""
        pieces = sum(len(pieces) for pieces in self.buckets.values())
        line = f"{self.manifest.folder}: {pieces} clips from {len(self.manifest) - len(self.unused)} shots"
        return line + (f", {len(self.unused)} too short ({'; '.join(self.unused[:NAMED])})" if self.unused else "")


def story(shot: Shot, fps: float) -> list[tuple[float, int]]:
    """Of each shot of a row where it begins, seconds, and how many frames it gives at `fps`: whole latents, 1 + 4k of the first and 4k of
    the others. Up to three frames at the end of a shot are left out."""
    begins = [start for start, _ in shot.shots]
    counts = [int((end - start) * fps + 1e-6) for start, end in pairwise([*begins, shot.end])]
    first, *others = counts
    if first < 1 or any(n < TEMPORAL for n in others):
        raise UserError(f"clip {shot.name} has a shot that is too short for a latent frame at {fps:g} fps: leave it out of its shots")
    return list(zip(begins, [nearest_frames(first)[0], *(n - n % TEMPORAL for n in others)], strict=True))


def open_manifest(path: str | Path, skip_bad: bool = False) -> Manifest:
    """The manifest in a .jsonl file, or one made by probing a folder's videos (without decoding them whole, as a scan would)."""
    path = Path(path)
    return folder_manifest(path, skip_bad) if path.is_dir() else read_manifest(path)


def folder_manifest(root: Path, skip_bad: bool) -> Manifest:
    """The videos and pictures below a folder, probed. Raises `UserError` that names the unusable ones, unless skip_bad."""
    shots, bad = [], []
    for candidate in Listing().find([root]):
        source, path = candidate.source, relative(file_of(candidate.source), root)
        try:
            if candidate.trouble:
                raise UserError(candidate.trouble)
            info, (mtime_ns, size) = _facts(source), stamp(source)
            camera = relative(candidate.camera, root) if candidate.camera else None
            shot = Shot(path, info, size, mtime_ns, sha256(source), 0.0, info.duration, captions=candidate.captions, camera=camera)
            shots.append(replace(shot, member=member_of(source)))
        except UserError as error:
            bad.append(str(error))
    if bad and not (skip_bad and shots):
        named = "; ".join(bad[:NAMED]) + (f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
        raise UserError(f"{root}: {len(bad)} files are unusable ({named}): repair or move them, or leave them out with data.skip_bad=true")
    return Manifest(shots, root)


def held_out(manifest: Manifest, share: float, evaluation: bool) -> Manifest:
    """One side of a manifest's split: files whose hash falls below `share` are for evaluation. Adding files moves no other file."""
    if not share:
        return manifest
    kept = [shot for shot in manifest.shots if (int(shot.sha256[:8], 16) / 2**32 < share) == evaluation]
    if not kept:
        side = "evaluation" if evaluation else "training"
        raise UserError(f"data.holdout {share:g} leaves no clip for {side} ({len(manifest)} clips in all): choose another share")
    return Manifest(kept, manifest.folder)


def _facts(source: Source) -> VideoInfo:
    from kling.data.decode import probe  # imported here because the small world needs no decoder

    _, kind = sniff(head(source))
    if not kind.endswith("image"):
        return probe(source)
    H, W = read_image(source).shape[:2]
    return VideoInfo(W, H, 1, 1.0, 0.0, 0, kind.split()[1].lower(), "rgb24", container=IMAGE)


def _off(shot: Shot, aspect: str) -> float:
    """Distance between a shot's aspect ratio and a named one, in octaves."""
    H, W = aspect_size(aspect)
    return abs(math.log2((W / H) / (shot.video.width / shot.video.height)))
