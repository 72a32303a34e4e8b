"""Low-rank training: settings, layers, and export of the low-rank weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kling.dit import KlingTransformer3DModel
from kling.errors import UserError
from kling.runtime.files import written_folder
from kling.training.model import Trained


@dataclass
class Lora:
    """Low-rank training: the model's weights are frozen, and W becomes W + alpha / rank · B A in layers whose names end in `targets`.

    rank: of the low-rank weights A and B; 0 trains the model itself. alpha: the change is multiplied by alpha / rank.
    targets: ends of layer names.
    merge: export the whole model with the low-rank weights added, besides the small file of these.
    half: hold the frozen weights in bf16, which requires mixed_precision=bf16.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    merge: bool = False
    half: bool = False


def check_half(lora: Lora, precision: str) -> None:
    """Raises `UserError` for bf16 weights in a run that computes in another precision. precision: accelerate's name of it."""
    if lora.half and precision != "bf16":
        raise UserError("lora.half holds weights in bf16, and this run does not compute in it: set mixed_precision=bf16, or leave it out")


def add_lora(model: Trained, lora: Lora) -> None:
    """Freeze the model and add A (random) and B (zero) to its transformer. Raises `UserError` if peft is missing or no layer matches."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("lora.rank needs peft: pip install 'kling[lora]'") from None
    for target in lora.targets:
        if not any(name.endswith(target) for name, _ in model.transformer.named_modules()):
            raise UserError(f"lora.targets '{target}' matches no layer's name: try to_q, to_k, to_v, to_out.0, ffn.net.2")
    model.requires_grad_(False)
    model.transformer.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft creates them in the dtype of the layer's weights


def export_lora(transformer: KlingTransformer3DModel, folder: Path) -> None:
    """Write the low-rank weights only, as `pytorch_lora_weights.safetensors` in diffusers' format."""
    from diffusers.loaders import WanLoraLoaderMixin
    from peft import get_peft_model_state_dict

    layers, settings = get_peft_model_state_dict(transformer), transformer.peft_config["default"].to_dict()
    with written_folder(folder) as temporary:
        WanLoraLoaderMixin.save_lora_weights(temporary, layers, transformer_lora_adapter_metadata=settings)
