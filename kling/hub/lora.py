"""LoRAs, in any of the namings that diffusers reads, on the transformer or on the second expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kling.errors import UserError
from kling.hub.files import weight_files


def add_loras(pipe: Any, loras: Sequence[tuple[str, float]], second: bool = False) -> None:
    """Load (file, scale) pairs on top of each other. second: into the low-noise expert.

    Raises `UserError` if peft is missing, or if a file is no LoRA of this model.
    """
    if not loras:
        return
    model = pipe.transformer_2 if second else pipe.transformer
    if model is None:
        raise UserError("a LoRA was given for the second expert, and this model has one only: leave it out")
    names = []
    for number, (path, scale) in enumerate(loras):
        name = f"{'low' if second else 'high'}{number}"
        file = weight_files(path)[0]
        try:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, load_into_transformer_2=second)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(f"{path} is no LoRA that fits this model ({reason})") from None
        if name not in getattr(model, "peft_config", {}):
            raise UserError(f"{path} is no LoRA that fits this model: none of its layers are in the transformer")
        names.append((name, scale))
    model.set_adapters([name for name, _ in names], [scale for _, scale in names])
