"""Networks trained by others, loaded from local files, for FVD, FID, LPIPS, JEDi, CLIPScore and the consistencies.

A torchscript file can run code, so it is opened only if its SHA-256 is the given one; folders are in transformers' format with
safetensors. Nothing is downloaded: the error for a missing file names its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from kling.errors import UserError, unknown
from kling.runtime.files import sha256 as file_hash

FVD_FRAMES = 16  # StyleGAN-V's FVD_16; I3D halves time four times
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """The network of a metric and where to get it."""

    what: str
    where: str
    script: bool  # a torchscript file; otherwise a transformers folder


_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
_HUB = "https://huggingface.co"
SOURCES = {
    "fvd": Source("i3d_torchscript.pt (I3D, Kinetics-400)", "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1", True),
    "jedi": Source("V-JEPA ViT-L/16 (SSv2), traced to torchscript", "https://github.com/oooolga/JEDi", True),
    "fid": Source("inception-2015-12-05.pt", f"{_NVIDIA}/inception-2015-12-05.pt", True),
    "lpips": Source("vgg16.pt (VGG-16 with LPIPS weights)", f"{_NVIDIA}/vgg16.pt", True),
    "clipscore": Source("CLIP ViT-B/32 as a transformers folder", f"{_HUB}/openai/clip-vit-base-patch32", False),
    "clip": Source("CLIP ViT-B/32 as a transformers folder", f"{_HUB}/openai/clip-vit-base-patch32", False),
    "dino": Source("DINO ViT-B/16 as a transformers folder", f"{_HUB}/facebook/dino-vitb16", False),
}


@dataclass(frozen=True)
class Weights:
    """A metric's weights on disk, given as NAME=PATH, or as NAME=PATH#SHA256 for a torchscript file."""

    name: str
    path: Path
    sha256: str  # of the file, or of the folder's safetensors

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Raises `UserError` for an unknown name, a missing file, a missing or wrong hash; each says where to get the weights."""
        name, _, rest = text.partition("=")
        if name not in SOURCES:
            raise unknown("metric", name, SOURCES)
        source = SOURCES[name]
        form = f"{name}=FILE#SHA256" if source.script else f"{name}=FOLDER"
        place, _, digest = rest.partition("#")
        path = Path(place)
        if source.script and path.is_dir():
            raise UserError(f"{path} is a folder: give {source.what}, a file, as --with {form}")
        if not place or not path.exists():
            lacks = f"{path} does not exist" if place else "none were given"
            raise UserError(f"{name} needs weights, {source.what}, and {lacks}: get them from {source.where} and give --with {form}")
        if source.script:
            actual = file_hash(path)
            if not digest:
                raise UserError(
                    f"{path} can run code: give --with {form}, with the hash that {source.where} states (this file's is {actual})"
                )
            if digest.lower() != actual:
                raise UserError(f"{path} has SHA-256 {actual}, not {digest}: it is not the file you mean, get it from {source.where}")
            return cls(name, path, actual)
        safe = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if not safe:
            raise UserError(f"{name}: {path} holds no safetensors: get {source.what} from {source.where}")
        return cls(name, path, file_hash(safe[0]))

    def script(self, device: torch.device) -> torch.jit.ScriptModule:
        """The torchscript network; its hash was checked by `parse`."""
        try:
            return torch.jit.load(str(self.path), map_location=device).eval()
        except RuntimeError as error:
            raise UserError(f"{self.path} is no torchscript file ({str(error).splitlines()[0]}): get {SOURCES[self.name].what}") from None


def video_features(weights: Weights, videos: Iterable[Tensor], device: torch.device) -> Tensor:
    """(n, d) features of clips (T, H, W, 3) uint8, from I3D or V-JEPA.

    I3D by StyleGAN-V's protocol (pixels 0 to 255, rescaled and resized to 224 by the network, features before the softmax);
    V-JEPA by JEDi's (pixels 0 to 1, 224 by 224 bilinear).
    """
    network, rows = weights.script(device), []
    with torch.inference_mode():
        for video in videos:
            if len(video) < FVD_FRAMES:
                raise UserError(
                    f"a clip has {len(video)} frames, {weights.name} needs {FVD_FRAMES}: give longer videos or a smaller --stride"
                )
            x = video.permute(3, 0, 1, 2)[None].float().to(device)  # (1, 3, T, H, W)
            if weights.name == "fvd":
                rows.append(network(x, rescale=True, resize=True, return_features=True).flatten(1))
            else:
                frames = F.interpolate(x[0].transpose(0, 1) / 255, size=(224, 224), mode="bilinear")  # (T, 3, 224, 224)
                rows.append(network(frames.transpose(0, 1)[None]).flatten(1))
    return torch.cat(rows).cpu()


def inception_features(weights: Weights, videos: Iterable[Tensor], device: torch.device) -> Tensor:
    """(frames, d) features of every frame of clips (T, H, W, 3) uint8, from the FID Inception network, which resizes them itself."""
    network = weights.script(device)
    with torch.inference_mode():
        return torch.cat([network(video.permute(0, 3, 1, 2).to(device), return_features=True).flatten(1).cpu() for video in videos])


def lpips(weights: Weights, device: torch.device) -> Callable[[Tensor, Tensor], float]:
    """Mean LPIPS (VGG; Zhang et al. 2018) over the frames of two clips (T, H, W, 3) uint8."""
    network, options = weights.script(device), {"resize_images": False, "return_lpips": True}

    def distance(a: Tensor, b: Tensor) -> float:
        with torch.inference_mode():
            fa, fb = (network(x.permute(0, 3, 1, 2).float().to(device), **options) for x in (a, b))
            return float((fa - fb).square().flatten(1).sum(1).mean())

    return distance


def opened(kind: Any, weights: Weights, device: torch.device, **more: Any) -> Any:
    """The model of transformers in a folder. Raises `UserError` for another one, of which transformers would draw layers."""
    where = f"get {SOURCES[weights.name].what} from {SOURCES[weights.name].where}"
    try:
        model, found = kind.from_pretrained(weights.path, local_files_only=True, use_safetensors=True, output_loading_info=True, **more)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{weights.name}: {weights.path} cannot be opened ({reason}): {where}") from None
    if lacks := sorted(found["missing_keys"]):
        raise UserError(f"{weights.name}: {weights.path} has no {lacks[0]}, so it is another model: {where}")
    return model.to(device).eval()


def clip_network(weights: Weights, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Callable[[str], Tensor]]:
    """CLIP's two encoders, with unit-length outputs: frames (T, H, W, 3) uint8 -> (T, d), and a sentence -> (1, d)."""
    from transformers import AutoTokenizer, CLIPModel

    model = opened(CLIPModel, weights, device)
    side = model.config.vision_config.image_size

    def pictures(frames: Tensor) -> Tensor:
        x = _prepared(frames, side, CLIP_MEAN, CLIP_STD, "bicubic")
        top, left = (x.shape[2] - side) // 2, (x.shape[3] - side) // 2
        with torch.inference_mode():
            seen = model.vision_model(x[:, :, top : top + side, left : left + side].to(device)).pooler_output
            return F.normalize(model.visual_projection(seen), dim=1).cpu()

    def words(text: str) -> Tensor:
        tokens = AutoTokenizer.from_pretrained(weights.path, local_files_only=True)([text], return_tensors="pt", truncation=True)
        with torch.inference_mode():
            said = model.text_model(**{name: x.to(device) for name, x in tokens.items()}).pooler_output
            return F.normalize(model.text_projection(said), dim=1).cpu()

    return pictures, words


def dino_network(weights: Weights, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Frames (T, H, W, 3) uint8 -> unit vectors (T, d): the class token of DINO's last layer, with a short side of 224 as in VBench."""
    from transformers import ViTModel

    model = opened(ViTModel, weights, device, add_pooling_layer=False)
    side = model.config.image_size

    def pictures(frames: Tensor) -> Tensor:
        x = _prepared(frames, side, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
        with torch.inference_mode():
            seen = model(x.to(device), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return F.normalize(seen, dim=1).cpu()

    return pictures


def clip_score(pictures: Tensor, words: Tensor) -> float:
    """100 max(cos, 0), mean over frames (T, d) against a sentence (1, d), all of unit length. Hessel et al., "CLIPScore", 2021."""
    return float(100 * (pictures @ words.T).clamp(min=0).mean())


def consistency(pictures: Tensor) -> float:
    """VBench's subject (DINO) and background (CLIP) consistency of unit vectors (T, d).

    Mean over the frames after the first of ½ (max(cos to the first, 0) + max(cos to the one before, 0)).
    """
    if len(pictures) < 2:
        raise UserError("a clip of 1 frame has no consistency: give videos of at least 2 frames")
    first = (pictures[1:] @ pictures[0]).clamp(min=0)
    before = (pictures[1:] * pictures[:-1]).sum(1).clamp(min=0)
    return float((first + before).mean() / 2)


def _prepared(frames: Tensor, side: int, mean: tuple[float, ...], std: tuple[float, ...], mode: str) -> Tensor:
    """(T, 3, h, w) float with its short side at `side`, without antialiasing (as VBench), normalised."""
    T, H, W, _ = frames.shape
    scale = side / min(H, W)
    size = (max(side, int(H * scale)), max(side, int(W * scale)))
    x = F.interpolate(frames.permute(0, 3, 1, 2).float(), size=size, mode=mode, align_corners=False).round().clamp(0, 255) / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
