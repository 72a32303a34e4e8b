"""VMAF (Netflix) with the static ffmpeg of the package imageio-ffmpeg: one number for a clip against its reference."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

from kling.errors import UserError


def vmaf(video: Tensor, reference: Tensor) -> float:
    """Mean VMAF (model v0.6.1, 0 to 100) of frames (T, H, W, 3) uint8 against a reference of the same shape.

    Raises `UserError` if imageio-ffmpeg is missing or its ffmpeg has no libvmaf.
    """
    try:
        import imageio_ffmpeg
    except ImportError:
        raise UserError("VMAF needs the package imageio-ffmpeg: pip install 'kling[eval]'") from None
    _, H, W, _ = video.shape
    with tempfile.TemporaryDirectory() as folder:
        for name, frames in (("a.rgb", video), ("b.rgb", reference)):
            (Path(folder) / name).write_bytes(frames.contiguous().numpy().tobytes())
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{W}x{H}", "-r", "25", "-i"]
        graph = "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]libvmaf=log_fmt=json:log_path=log.json:n_threads=1"
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, "a.rgb", *source, "b.rgb", "-lavfi", graph, "-f", "null", "-"]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            reason = result.stderr.strip().splitlines()[-1:] or ["no message"]
            raise UserError(f"ffmpeg could not measure VMAF ({reason[0]}): use imageio-ffmpeg's own binary, which has libvmaf")
        return float(json.loads((Path(folder) / "log.json").read_text())["pooled_metrics"]["vmaf"]["mean"])
