"""The one mechanism behind every task: a video is a set of latent frames, each with its own noise level, position and kind.

    symbol   shape                       meaning
    z, c     (b, c, G, h, w)             current latents; clean latents (0 where unknown)
    m        (b, 1, G, h, w) in [0, 1]   denoise mask: 1 generate, 0 given, between = soft (m = 1 - strength)
    p        (b, G) float                temporal position in latent frames
    kind     (b, G) int                  0 target, 1 keyframe, 2 first reference, 3 source video, 4 history, 5 to 7 later references
    P        (b, 24, G, ...) or None     packed camera rays
    tracks   (b, c + 1, G, h, w) or None map of where points move (`condition.tracks`)
    shot     (b, G) int or None          which shot the frame is of: its words are that shot's, and p jumps by `SHOT_GAP` at every cut

G = F target frames + K appended ones: keyframes, then references. The noise level of a token is  sigma_tok = m * sigma + [m = 0] * sigma_c.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kling.condition.tracks import Tracks, track_maps
from kling.nn.modulation import Levels
from kling.runtime.device import upload
from kling.shapes import frame_position, latent_of_frame, pixel_frames

TARGET, KEYFRAME, REFERENCE, SOURCE, HISTORY = range(5)
# Kinds of the first to the fourth reference. Words point at them by number, and their positions alone do not say it: attention sees only
# how far they are from the frame that reads them, which is another distance for every frame.
NUMBERED = (REFERENCE, 5, 6, 7)
MOST_REFERENCES = len(NUMBERED)  # of one clip
SHOT_GAP = 4.5  # latent frames that p jumps at a cut, in addition to 1; no whole number, so that no time within a shot is like a cut
TENSORS = ("clean", "mask", "position", "kind", "tracks", "shot")  # of a State, each with a row for every sample


@dataclass(frozen=True)
class Given:
    """What is known of a clip before it is generated. The task follows from this; it is never a flag.

    known: the number of first latent frames that are given (1 = a first image, 1 + j = a clip to continue).
    keyframes: (pixel frame, strength) of single frames, appended to the clip. Strength 1 keeps the frame exactly, 0 ignores it.
    space: (h, w) mask over all frames, 1 where to generate: in- and outpainting of a given clip.
    hold: how strongly a whole given clip is kept (restyling): every target has m = 1 - hold.
    references: pictures of things that the clip shows, appended after the keyframes. They are no frames of the clip: each is encoded alone,
    is given like a first frame, and lies before it, the k-th (from 0) at position -1 - k and of kind `NUMBERED[k]`.
    """

    known: int = 0
    keyframes: tuple[tuple[int, float], ...] = ()
    space: Tensor | None = None
    hold: float = 0.0
    references: int = 0

    @property
    def gives(self) -> bool:
        """Whether anything is given."""
        return bool(self.known or self.appended or self.space is not None or self.hold)

    @property
    def appended(self) -> int:
        """K, the number of frames after those of the clip."""
        return len(self.keyframes) + self.references

    @property
    def whole(self) -> bool:
        """Whether every element is either given or generated, with nothing kept in part."""
        return self.hold in (0, 1) and all(strength in (0, 1) for _, strength in self.keyframes)

    def task(self, frames: int) -> str:
        """The task's name, as a checkpoint lists it in its `capabilities`. References go with every task."""
        if self.space is not None:
            return "inpaint"
        if self.hold:
            return "restyle"
        if self.known > 1:
            return "continuation"
        last = pixel_frames(frames) - 1
        if not self.keyframes:
            return "image" if self.known else "text" if frames > 1 else "text_to_image"
        if [t for t, _ in self.keyframes] == [last]:
            return "first_last" if self.known else "last"
        return "keyframes"


@dataclass(frozen=True)
class State:
    """A batch of clips with the same F and K: everything that the network and the sampler need to know about the given content.

    Facts that steer the sampling (is anything given, are there soft elements, which levels do tokens have) are computed from the mask on
    the host, where it was built: asking the device at every step would make the host wait for it.
    """

    clean: Tensor  # c (b, c, G, h, w)
    mask: Tensor  # m (b, 1, G, h, w), constant within a token
    position: Tensor  # p (b, G)
    kind: Tensor  # (b, G)
    frames: int  # F, the target frames; the rest are appended
    patch: tuple[int, int, int]
    sigma_c: float = 0.0  # conditioning noise of given tokens
    tracks: Tensor | None = None  # (b, c + 1, G, h, w)
    shot: Tensor | None = None  # (b, G), from 0; None: one shot
    host: tuple[Tensor, Tensor, Tensor] | None = None  # mask, position and kind on the CPU; None: those tensors themselves

    def __post_init__(self) -> None:
        if self.host is None:
            object.__setattr__(self, "host", (self.mask.cpu(), self.position.cpu(), self.kind.cpu()))

    def sigma(self, level: Tensor) -> Tensor:
        """Noise level of every latent element, (b, 1, G, h, w), for a schedule level (b,) or one per frame (b, G) in [0, 1]."""
        level = _over_frames(level)  # (b, 1, G or 1, 1, 1)
        return torch.where(self.mask > 0, self.mask * level, self.sigma_c)

    def spread_sigma(self, level: Tensor) -> Tensor:
        """As `sigma`, but if nothing is given (b, 1, 1 or G, 1, 1), which broadcasts over all elements."""
        return _over_frames(level) if self.free else self.sigma(level)

    def noised(self, level: Tensor, noise: Tensor) -> Tensor:
        """z = (1 - sigma_tok) c + sigma_tok eps. At level 1 this is where sampling starts; in training c is the true clip everywhere."""
        sigma = self.sigma(level)  # (b, 1, G, h, w)
        return (1 - sigma) * self.clean + sigma * noise

    def levels(self, level: Tensor, end: Tensor | None = None) -> Levels:
        """The network's noise input: the distinct levels of the tokens, and the level of each, for a schedule level (b,) or (b, 1 or G).

        end: for a flow map, the schedule level where the step ends, of the same shape.
        The table has a row for each distinct m of every sample (of every frame, where frames have their own level), given ones included.
        """
        values, index = self._runs  # (b, k), (b, g)
        b, k = values.shape
        frames = level.view(len(level), -1).shape[1]  # 1 or G

        def of_tokens(level: Tensor) -> Tensor:  # (b | 1, 1 or G) -> (b · frames · k)
            level = level.view(len(level), -1)[:, :, None]
            return torch.where(values[:, None] > 0, values[:, None].to(level.dtype) * level, self.sigma_c).flatten()

        first = torch.arange(b * frames, device=values.device).view(b, frames) * k  # row of each sample's, or frame's, smallest m
        if frames > 1:
            index = index if index.shape[1] > 1 else index.expand(b, frames)  # runs no longer than a frame
            first = first[:, :, None].expand(b, frames, index.shape[1] // frames).flatten(1)  # (b, g)
        return Levels(of_tokens(level), first + index, None if end is None else of_tokens(end))

    def finish(self, z: Tensor) -> Tensor:
        """The clip: given elements restored exactly, appended frames cut off. (b, c, F, h, w)"""
        return torch.where(self.mask > 0, z, self.clean)[:, :, : self.frames]

    def without_references(self, z: Tensor) -> Tensor:
        """The same latents (b, c, G, h, w) with references that show nothing: clean latents of 0, as in training (`reference_drop`)."""
        shown = z.shape[2] - self.references
        noise = z[:, :, shown:] - (1 - self.sigma_c) * self.clean[:, :, shown:]  # sigma_c eps: references are given
        return torch.cat([z[:, :, :shown], noise], dim=2)

    def without_tracks(self) -> State:
        """The same, with nothing that says where points move."""
        still = replace(self, tracks=None if self.tracks is None else torch.zeros_like(self.tracks))
        still.__dict__["_runs"] = self._runs
        return still

    @cached_property
    def references(self) -> int:
        """Number of the references of a clip, its last frames."""
        return int(is_reference(self.host[2][0]).sum())

    @cached_property
    def lies_at(self) -> Tensor:
        """The target frame at which each frame lies, (b, G) on the CPU: a target's own, a keyframe's nearest, a reference's first."""
        position = self.host[1]
        return (position[:, :, None] - position[:, None, : self.frames]).abs().argmin(dim=2)

    @property
    def tokens(self) -> int:
        """Number of tokens of one clip."""
        _, _, G, h, w = self.mask.shape
        return G * (h // self.patch[1]) * (w // self.patch[2])

    @cached_property
    def free(self) -> bool:
        """Whether nothing is given, so that every element is at the schedule's level."""
        return bool((self.host[0] == 1).all())

    @cached_property
    def gives(self) -> bool:
        """Whether any element is given."""
        return bool((self.host[0] == 0).any())

    @cached_property
    def plain(self) -> bool:
        """Whether every element is either given and clean, or at the schedule's level: any flow scheduler can sample that."""
        return (self.sigma_c == 0 or not self.gives) and bool(((self.host[0] == 0) | (self.host[0] == 1)).all())

    def part(self, start: int, end: int) -> State:
        """Target frames start … end - 1 only, at the positions that they have in the clip."""
        cut = {name: t[:, :, start:end] for name in ("clean", "mask", "tracks") if (t := getattr(self, name)) is not None}
        cut |= {name: t[:, start:end] for name in ("position", "kind", "shot") if (t := getattr(self, name)) is not None}
        mask, *rest = self.host
        return replace(self, **cut, frames=end - start, host=(mask[:, :, start:end], *(t[:, start:end] for t in rest)))

    def rows(self, start: int) -> State:
        """The samples from `start` on."""
        cut = {name: t[start:] for name in TENSORS if (t := getattr(self, name)) is not None}
        part = replace(self, **cut, host=tuple(t[start:] for t in self.host))
        part.__dict__["_runs"] = tuple(t[start:] for t in self._runs)
        return part

    def repeated(self, k: int) -> State:
        """One sample as k equal ones."""
        wide = {name: t.expand(k, *t.shape[1:]) for name in TENSORS if (t := getattr(self, name)) is not None}
        whole = replace(self, **wide, host=tuple(t.expand(k, *t.shape[1:]) for t in self.host))
        whole.__dict__["_runs"] = tuple(t.expand(k, *t.shape[1:]) for t in self._runs)
        return whole

    @staticmethod
    def joined(parts: Sequence[State]) -> State:
        """Samples of several as one batch. They have the same F, K, patch and sigma_c, and either all or none have tracks, and shots."""
        first = parts[0]
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in TENSORS if getattr(first, name) is not None}
        return replace(first, **whole, host=tuple(torch.cat(both) for both in zip(*(part.host for part in parts), strict=True)))

    def to(self, device: torch.device | str) -> State:
        """Copy to another device without waiting for it."""
        return self.each(partial(upload, device=device))

    def each(self, change: Callable[[Tensor], Tensor]) -> State:
        """The same with every tensor changed that the network reads, those that are found on demand included."""
        changed = replace(self, **{name: change(t) for name in TENSORS if (t := getattr(self, name)) is not None})
        changed.__dict__["_runs"] = tuple(change(t) for t in self._runs)
        return changed

    @cached_property
    def _runs(self) -> tuple[Tensor, Tensor]:
        """The distinct values of m of each sample, ascending, (b, k), padded by repeating the last one; and for each run of equal tokens
        which of them it has, (b, g) with the fewest runs: 1, G or n."""
        tokens = self.host[0][:, 0, :, :: self.patch[1], :: self.patch[2]].flatten(1)  # (b, n)
        frames = tokens.unflatten(1, (self.mask.shape[2], -1))  # (b, G, n / G)
        level = frames.flatten(1) if bool((frames != frames[..., :1]).any()) else frames[..., 0]  # (b, n), or (b, G) if that tells all
        ordered, order = level.sort(dim=1)
        rank = F.pad((ordered[:, 1:] != ordered[:, :-1]).cumsum(dim=1), (1, 0))  # (b, g) the number of the value of each
        k = int(rank[:, -1].max()) + 1
        values = ordered[:, -1:].repeat(1, k).scatter_(1, rank, ordered)  # (b, k)
        index = torch.empty_like(rank).scatter_(1, order, rank)  # (b, g)
        if k == 1 or bool((index == index[:, :1]).all()):
            index = index[:, :1]
        return upload(values, self.mask.device), upload(index, self.mask.device)


def is_reference(kind: Tensor) -> Tensor:
    """Which frames are references, of any number, by their kinds."""
    return torch.isin(kind, torch.tensor(NUMBERED))


def _over_frames(level: Tensor) -> Tensor:
    """(b,) or (b, G) -> (b, 1, 1 or G, 1, 1)."""
    return level.view(*level.shape, *(1,) * (2 - level.ndim))[:, None, :, None, None]


def build_state(
    given: list[Given], clean: Tensor, appended: Tensor | None, patch: tuple[int, int, int] = (1, 2, 2), sigma_c: float = 0.0,
    tracks: Sequence[Tracks | None] | None = None, shots: Sequence[Sequence[int]] | None = None,
) -> State:  # fmt: skip
    """Masks, positions, kinds and shots of the given content, and the map of its tracks. Training and sampling both use this function.

    Args:
        given: one per sample; all must have the same number of keyframes, and of references.
        clean: (b, c, F, h, w) clean latents: the true clip in training, zeros where unknown in sampling.
        appended: (b, c, K, h, w) latents of the single frames, the keyframes before the references, or None when K = 0.
        tracks: of each sample, over its pixel frames; None for a sample without any, or for all.
        shots: of each sample, the latent frames at which its shots begin, 0 first. None, or one shot in each sample: no shots.
            Positions jump by `SHOT_GAP` at every cut (the phase shift of MultiShotMaster, arXiv 2512.03041).
    """
    b, _, frames, h, w = clean.shape
    K = 0 if appended is None else appended.shape[2]
    R = given[0].references if given else 0
    if len(given) != b or any((g.appended, g.references) != (K, R) for g in given):
        counts = [(len(g.keyframes), g.references) for g in given]
        raise ValueError(f"{len(given)} conditions with {counts} keyframes and references for a batch of {b} with {K} appended frames")
    there, at = range(frames), [[frame_position(t) for t, _ in g.keyframes] + [-1.0 - k for k in range(R)] for g in given]
    level = [[1 - g.hold if j >= g.known else 0 for j in there] + [1 - strength for _, strength in g.keyframes] + [0] * R for g in given]
    mask = torch.tensor(level, dtype=clean.dtype)[:, None, :, None, None].repeat(1, 1, 1, h, w)  # (b, 1, G, h, w)
    for i, g in enumerate(given):
        if g.space is not None:
            mask[i, :, :frames] *= g.space.to(mask)
    mask = mask.to(clean.device)
    position = torch.tensor([[*there, *mine] for mine in at], dtype=torch.float32, device=clean.device)  # (b, G)
    kind = [TARGET] * frames + [KEYFRAME] * (K - R) + list(NUMBERED[:R])
    kind = torch.tensor(kind, device=clean.device).repeat(b, 1)  # (b, G)
    shot = None
    if shots is not None and any(len(starts) > 1 for starts in shots):
        # the latent frame of each; references lie before the clip, and read the words of its first shot
        holds = [[*range(frames), *(latent_of_frame(t) for t, _ in g.keyframes), *[0] * R] for g in given]
        of = [[bisect_right(starts, j) - 1 for j in mine] for starts, mine in zip(shots, holds, strict=True)]
        shot = torch.tensor(of, device=clean.device)  # (b, G)
        position += SHOT_GAP * shot
    maps: Tensor | None = None
    if tracks is not None:
        maps = track_maps(tracks, clean, [g.known for g in given], [[t for t, _ in g.keyframes] for g in given])
        maps = F.pad(maps, (0, 0, 0, 0, 0, R)) if R else maps  # nothing moves to or from a reference
    if K:
        clean = torch.cat([clean, appended], dim=2)  # (b, c, G, h, w)
    return State(clean, _whole_tokens(mask, patch), position, kind, frames, patch, sigma_c, maps, shot)


def _whole_tokens(mask: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Max-pool the mask to tokens and expand it again: a token with one element to generate is generated whole."""
    if patch[1] == patch[2] == 1:
        return mask
    pooled = F.max_pool3d(mask, (1, *patch[1:]))  # (b, 1, G, h', w')
    return pooled.repeat_interleave(patch[1], dim=-2).repeat_interleave(patch[2], dim=-1)
