"""CLIP tokens of given frames: a second image input of the image models of Wan 2.1 and Fun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kling.errors import UserError


def load_image_encoder(folder: Path) -> dict[str, Any]:
    """CLIP's vision model and its preprocessing; the image models of Wan 2.1 take its tokens as a second input."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    try:
        return {
            "image_encoder": CLIPVisionModel.from_pretrained(folder / "image_encoder", dtype=torch.float32, use_safetensors=True).eval(),
            "image_processor": CLIPImageProcessor.from_pretrained(folder / "image_processor"),
        }
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {folder} is incomplete: its image encoder cannot be loaded ({str(error).strip().splitlines()[0]})"
        ) from None


@torch.no_grad()
def clip_tokens(encoder: Any, processor: Any, pictures: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """Pictures uint8 (H, W, 3) -> tokens (b, i, image_dim) of the last layer but one, on `device`."""
    pixels = processor(images=[picture.numpy() for picture in pictures], return_tensors="pt").pixel_values
    return encoder(pixels.to(device, encoder.dtype), output_hidden_states=True).hidden_states[-2].to(device)
