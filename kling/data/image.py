"""Reading and writing images: files from cameras, editors and browsers become uint8 (H, W, 3)."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from kling.data.transforms import Frames, fit
from kling.errors import UserError
from kling.runtime.files import Member, Source, as_source, head, read_bytes, sniff, writing, written

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SEVERAL = ("GIF", "WEBP", "PNG")  # formats in which several frames are an animation; a phone's JPEG may contain a second picture


def read_image(path: str | Path | Member) -> Tensor:
    """uint8 (H, W, 3) in sRGB. EXIF rotation and an embedded colour profile are applied, transparency is put on white, 16-bit grey keeps
    its upper 8 bits.

    Raises `UserError` for a file that is not an image, is an animation (give it as a video), or is damaged.
    """
    return torch.from_numpy(np.array(_rgb(_open(as_source(path)))))


def read_mask(path: str | Path, H: int, W: int) -> Tensor:
    """(H, W) float32 in [0, 1]: white (1) and transparent areas are to be generated, black (0) is kept.

    Fitted to (H, W) as `transforms.fit` does with cover, so that a mask drawn on a picture stays aligned with it.
    """
    grey = np.array(_rgb(_open(Path(path))).convert("L"), dtype=np.float32) / 255
    return fit(grey, H, W).clamp_(0, 1)  # bicubic enlargement overshoots


def write_png(path: str | Path, image: Frames) -> None:
    """Write one picture, uint8 (H, W, 3), losslessly. Raises `UserError` if the path cannot be written."""
    with written(path) as temporary, writing(Path(path)):
        Image.fromarray(np.asarray(image)).save(temporary, format="PNG")


def write_png_frames(folder: str | Path, frames: Frames) -> list[Path]:
    """Write uint8 (T, H, W, 3) as frame_00000.png, frame_00001.png, … and return the paths.

    Raises `UserError` if the folder already holds such frames: those of a longer video would mix with these.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.glob("frame_*.png")):
        raise UserError(f"{folder} already holds frame_*.png: choose another folder, or empty it")
    paths = [folder / f"frame_{t:05d}.png" for t in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        write_png(path, frame)
    return paths


def _open(path: Source) -> Image.Image:
    """The decoded image, rotated upright."""
    demuxer, kind = sniff(head(path))
    try:
        image = Image.open(BytesIO(read_bytes(path)) if isinstance(path, Member) else path, formats=FORMATS)
        if image.format in SEVERAL and getattr(image, "n_frames", 1) > 1:
            line = f"{path} is an animation of {image.n_frames} frames: give it as a video, or export one frame as PNG"
            raise UserError(line, code="animation", file=path, n=image.n_frames)
        if image.mode == "F":
            line = f"{path} holds floating-point pixels, whose white is not stated: export it as 8- or 16-bit PNG"
            raise UserError(line, code="float_image", file=path)
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        remedy = "give it as a video, or export one frame as PNG" if demuxer else "export it as PNG or JPEG"
        line = f"{path} is not an image that can be read ({kind}): {remedy}"
        raise UserError(line, code="not_an_image", file=path, kind=kind) from None
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels: scale it down") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow raises any of these for damaged data
        line = f"{path} is a damaged image ({error}): export or download it again"
        raise UserError(line, code="damaged_image", file=path) from None


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB from an image of any mode."""
    image = _srgb(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow would clip it to white
        return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _srgb(image: Image.Image) -> Image.Image:
    """Convert colours from the embedded profile to sRGB: the same numbers are other colours in Display P3 (phones) or CMYK (print). An
    image without a profile, or with a damaged one, is taken as sRGB, as browsers do."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode.startswith("I"):
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = {"GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip(), "RGB")
        colours = image.convert("RGB").convert(mode) if image.mode != mode else image
        image = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    image.info.pop("icc_profile", None)
    if alpha is not None:
        image.putalpha(alpha)
    return image
