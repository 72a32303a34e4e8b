"""Tiny random Wan pipelines of diffusers, saved in the published format: the hub's tests load them and compare with them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WIDTH = 128  # one head, of the size that all published weights have
IMAGE = {"image_dim": 16, "added_kv_proj_dim": WIDTH}
VAE21 = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
VAE22 = {
    "base_dim": 4, "decoder_base_dim": 4, "z_dim": 48, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "is_residual": True,
    "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
    "latents_mean": [0.01 * i for i in range(48)], "latents_std": [1 + 0.02 * i for i in range(48)],
}  # fmt: skip


def randomised(model: torch.nn.Module, std: float = 0.05) -> torch.nn.Module:
    """Random weights in which errors show, and norms near their usual scale."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=std)
        if "norm" in name and name.endswith(("weight", "gamma")):
            parameter.data += 1
    return model.eval()


def transformer(seed: int = 0, **config: object) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    small = {"num_attention_heads": 1, "attention_head_dim": WIDTH, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2}
    return randomised(WanTransformer3DModel(**{**small, "in_channels": 16, "out_channels": 16, **config}))


def vae(config: dict) -> AutoencoderKLWan:
    torch.manual_seed(1)
    return AutoencoderKLWan(**config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, an end token, padding on the right: the relevant properties of umT5's."""
    words = ["<pad>", "</s>", "<unk>", *map(chr, range(32, 127)), *"一个红色的球在草地上滚动静态"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def text_encoder() -> UMT5EncoderModel:
    torch.manual_seed(2)
    config = UMT5Config(vocab_size=160, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def image_encoder() -> CLIPVisionModel:
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=16
    )
    return CLIPVisionModel(config).eval()


def pipeline(layout: str) -> WanPipeline | WanImageToVideoPipeline:
    """t2v, t2v-a14b, ti2v (as image pipeline), i2v, flf2v or i2v-a14b."""
    parts = {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "vae": vae(VAE22 if layout == "ti2v" else VAE21),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
    if layout == "ti2v":
        parts |= {"transformer": transformer(in_channels=48, out_channels=48), "expand_timesteps": True}
    elif layout in ("i2v", "flf2v"):
        ends = {"pos_embed_seq_len": 2 * 5} if layout == "flf2v" else {}  # 2 x 2 patches and a class token, twice
        parts |= {"transformer": transformer(in_channels=36, **IMAGE, **ends), "image_encoder": image_encoder()}
        parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    else:
        channels = {"in_channels": 36} if layout == "i2v-a14b" else {}
        parts["transformer"] = transformer(**channels)
        if layout.endswith("a14b"):
            parts |= {"transformer_2": transformer(seed=7, **channels), "boundary_ratio": 0.9 if "i2v" in layout else 0.875}
    kind = WanPipeline if layout.startswith("t2v") else WanImageToVideoPipeline
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(layout: str, folder: Path) -> Path:
    """A folder of `pipeline(layout)`."""
    pipeline(layout).save_pretrained(folder)
    return folder
