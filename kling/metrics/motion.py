"""Motion in any video, from dense optical flow (DIS): warp error, dynamic degree, and VBench's camera classes.

Kroeger, Timofte, Dai, Van Gool, "Fast Optical Flow using Dense Inverse Search", 2016 (OpenCV's implementation, medium preset).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

SHORT_SIDE = 256  # pixels; smaller pictures are enlarged for the flow, which uses patches of 8 pixels
GRID = 10  # tracked points along each side
MIN_VISIBLE = 0.1  # of the pixels; if fewer can be matched, there is no flow, and no error
VBENCH_CLASSES = ("pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "static")
SHIMMER = 1.0  # pixels per frame
STILL = 0.005  # of the short side over the whole clip: VBench's bound below which a point is static

# VBench-I2V: the camera class for each pair of directions of two opposite picture edges. The picture moves against the camera.
_SAME = {"left_left": "pan_right", "right_right": "pan_left", "down_down": "tilt_up", "up_up": "tilt_down", "static_static": "static"}
_TOP_BOTTOM = {**_SAME, "up_down": "zoom_in", "down_up": "zoom_out"}
_LEFT_RIGHT = {**_SAME, "left_right": "zoom_in", "right_left": "zoom_out"}


@dataclass(frozen=True)
class Flow:
    """Motion between consecutive frames, in pixels: entry t leads from frame t to t + 1, `backward` from t + 1 to t."""

    forward: np.ndarray  # (T-1, H, W, 2)
    backward: np.ndarray  # (T-1, H, W, 2)

    def speed(self) -> np.ndarray:
        """Median length of the motion of every pair (T-1,), in pixels per frame."""
        return np.median(np.linalg.norm(self.forward, axis=-1), axis=(1, 2))


def optical_flow(video: Tensor) -> Flow:
    """The flow of a clip (T, H, W, 3) uint8 in both directions."""
    return Flow(*flows(video, back=True))


def magnitude(video: Tensor) -> float:
    """How much moves in a clip (T, H, W, 3) uint8: the length of the motion over all pixels and frames, in pixels per frame, where it is
    more than `SHIMMER`; a VAE moves still textures by less."""
    (forward,) = flows(video, back=False)
    length = np.linalg.norm(forward, axis=-1)  # (T-1, H, W)
    return float(np.where(length > SHIMMER, length, 0).mean()) if len(length) else 0.0


def flows(video: Tensor, back: bool) -> list[np.ndarray]:
    """(T-1, H, W, 2) from each frame to the next, and with `back` also from the next to it."""
    H, W = video.shape[1:3]
    scale = max(1, round(SHORT_SIDE / min(H, W)))
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video.numpy()]
    greys = [cv2.resize(grey, (W * scale, H * scale), interpolation=cv2.INTER_CUBIC) if scale > 1 else grey for grey in greys]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        flow = dis.calc(a, b, None)
        return cv2.resize(flow, (W, H), interpolation=cv2.INTER_AREA) / scale if scale > 1 else flow

    pairs = list(zip(greys[:-1], greys[1:], strict=True))
    none = [np.zeros((0, H, W, 2), np.float32)]
    ways = (pairs, [(b, a) for a, b in pairs]) if back else (pairs,)
    return [np.concatenate([between(*pair)[None] for pair in way] or none) for way in ways]


def visible(there: np.ndarray, back: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels whose flow there and back returns to the start, so that both frames show them. Flows (H, W, 2).

    Sundaram, Brox, Keutzer, "Dense point trajectories by GPU-accelerated large displacement optical flow", 2010, equation 5.
    """
    returned, inside = fetch(back, there)
    gap = np.square(there + returned).sum(-1)
    return inside & (gap < 0.01 * (np.square(there).sum(-1) + np.square(returned).sum(-1)) + 0.5)


def matched(flow: Flow) -> float | None:
    """Share of the pairs of frames that have enough pixels in common; None without a pair."""
    seen = [visible(there, back).mean() >= MIN_VISIBLE for there, back in zip(flow.forward, flow.backward, strict=True)]
    return float(np.mean(seen)) if seen else None


def warp_error(video: Tensor, flow: Flow) -> float | None:
    """Mean squared difference of each frame (T, H, W, 3) uint8 from the next one fetched along the flow, over visible pixels; 0 to 1.

    Lai et al., "Learning blind video temporal consistency", 2018, equation 8. A pair with hardly a pixel in common is in no mean
    (`matched` counts them); None if no pair is left.
    """
    errors = []
    for t, (there, back) in enumerate(zip(flow.forward, flow.backward, strict=True)):
        seen = visible(there, back)
        if seen.mean() < MIN_VISIBLE:
            continue
        fetched, _ = fetch(video[t + 1].numpy().astype(np.float32), there)
        errors.append(float(np.square((fetched - video[t].numpy()) / 255)[seen].mean()))
    return float(np.mean(errors)) if errors else None


def dynamic_degree(flow: Flow, fps: float) -> bool:
    """Whether enough frames have enough motion, by VBench's rule: the fastest 5 % of a pair's pixels exceed 6 pixels at 256 and 8 fps.

    VBench reads every `round(fps / 8)`th frame and uses RAFT; here the DIS flows of consecutive frames are summed over that step.
    """
    step = max(1, round(fps / 8))
    T, H, W = flow.forward.shape[:3]
    threshold = max(1.0, 8 / fps) * 6 * min(H, W) / 256
    lengths = [np.linalg.norm(flow.forward[t : t + step].sum(0), axis=-1) for t in range(0, T, step)]
    fast = [np.sort(length, axis=None)[-max(1, int(H * W * 0.05)) :].mean() for length in lengths]
    return sum(bool(speed > threshold) for speed in fast) >= max(1, round(4 * (len(fast) + 1) / 16))


def follow_grid(flow: Flow) -> np.ndarray:
    """Points of a regular grid on frame 0, tracked to the end: (T, GRID, GRID, 2) x, y in pixels.

    A point outside the picture moves like the pixel nearest to it.
    """
    H, W = flow.forward.shape[1:3]
    margin = W / 64
    x, y = np.meshgrid(np.linspace(margin, W - 1 - margin, GRID), np.linspace(margin, H - 1 - margin, GRID))
    path = [np.stack([x, y], axis=-1).astype(np.float32)]
    for step in flow.forward:
        at = path[-1].clip(0, [W - 1, H - 1]).astype(np.float32)
        path.append(path[-1] + cv2.remap(step, at[..., 0], at[..., 1], cv2.INTER_LINEAR))
    return np.stack(path)


def camera_classes(flow: Flow) -> set[str]:
    """The classes of `VBENCH_CLASSES` that VBench-I2V would find, possibly none: from the midpoints of the picture's four edges.

    VBench's rule on DIS tracks instead of CoTracker's. Several may apply (a pan that also zooms); the requested one must be among them.
    """
    path = follow_grid(flow)
    still, middle = STILL * min(flow.forward.shape[1:3]), GRID // 2
    travel = path[-1] - path[0]  # (GRID, GRID, 2)

    def ways(x: float, y: float) -> list[str]:
        ways = {"right": x > still, "left": x < -still, "down": y > still, "up": y < -still}
        return [name for name, holds in ways.items() if holds] or ["static"]

    top, bottom, left, right = (ways(*travel[i]) for i in ((0, middle), (-1, middle), (middle, 0), (middle, -1)))
    found = {_TOP_BOTTOM[f"{a}_{b}"] for a in top for b in bottom if f"{a}_{b}" in _TOP_BOTTOM}
    found |= {_LEFT_RIGHT[f"{a}_{b}"] for a in left for b in right if f"{a}_{b}" in _LEFT_RIGHT}
    return found - {"static"} or found


def fetch(values: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`values` (H, W, c) at the flow's (H, W, 2) targets, and whether these are inside the picture (H, W)."""
    H, W = there.shape[:2]
    x, y = np.meshgrid(np.arange(W, dtype=np.float32), np.arange(H, dtype=np.float32))
    x, y = x + there[..., 0], y + there[..., 1]
    return cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), (x >= 0) & (x <= W - 1) & (y >= 0) & (y <= H - 1)
