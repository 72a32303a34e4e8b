"""The spatiotemporal diffusion transformer: latents, noise levels, text and camera in, velocity out.

    latents --patch--> tokens (+ kind, + camera) --blocks: attention over (frame, row, column), text, feed-forward--> velocity

A strict superset of diffusers' `WanTransformer3DModel` (0.42): the same parameters under the same names, the same function when every
extra is off. The extras are zero at initialisation, so that turning one on changes nothing until it is trained.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.fx.experimental._config
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from kling.cameras.trajectory import RAY_CHANNELS, Cameras
from kling.dit.block import KlingTransformerBlock
from kling.dit.camera import CameraAdapter
from kling.dit.embedding import ConditionEmbedder, KindEmbedding
from kling.dit.history import History
from kling.dit.walk_cache import WalkCache
from kling.errors import UserError, unknown
from kling.nn.modulation import Levels, ModulatedNorm, Modulation, TokenIndex, noise_levels, spell_alike
from kling.nn.patch import PatchEmbed, unpatchify
from kling.nn.rope import RotaryPosEmbed
from kling.runtime.diffusers_internals import ContextParallelInput, ContextParallelOutput
from kling.shapes import token_grid

RAYS_PER_PASS = 2**23  # numbers of rays that are made at once while sampling
OUTPUT = "thwc"  # of the numbers that a token becomes: Wan's order, in which the channel is the fastest axis


class KlingTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """Velocity of noisy latents.

    Args, beyond those of `WanTransformer3DModel` (of which `rope_max_seq_len` bounds nothing here: positions are real numbers):
        timestep_scale: the time embedder sees `timestep_scale · σ`.
        num_kinds: size of the embedding of frame kinds; 0 is none.
        camera_channels: channels of the packed Plücker rays (24); 0 is no camera input.
        camera_fold: "unshuffle" (as the published Wan-Fun Camera weights) or "pool" (small models).
        camera_downscale: pixels of a ray map along each side of a latent cell (the spatial factor of the VAE).
        camera_residual_blocks: residual blocks after the fold.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "kind_embedding", "norm"]
    _no_split_modules = ["KlingTransformerBlock"]
    _keep_in_fp32_modules = ["time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]
    _keys_to_ignore_on_load_unexpected = ["norm_added_q"]
    _repeated_blocks = ["KlingTransformerBlock"]
    _cp_plan = {
        "rope": {0: ContextParallelInput(split_dim=1, expected_dims=5, split_output=True)},
        "token_index": {0: ContextParallelInput(split_dim=1, expected_dims=2, split_output=True)},
        "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        timestep_scale: float = 1000.0,
        num_kinds: int = 0,
        camera_channels: int = 0,
        camera_fold: str = "unshuffle",
        camera_downscale: int = 8,
        camera_residual_blocks: int = 1,
    ) -> None:
        super().__init__()
        if qk_norm not in (None, "rms_norm_across_heads"):
            raise unknown("qk_norm", qk_norm, ["rms_norm_across_heads"])
        dim = num_attention_heads * attention_head_dim
        patch_size = tuple(patch_size)

        self.patch_embedding = PatchEmbed(in_channels, dim, patch_size)
        self.rope = RotaryPosEmbed(attention_head_dim)
        self.token_index = TokenIndex()
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, timestep_scale, image_dim, pos_embed_seq_len)
        self.kind_embedding = KindEmbedding(num_kinds, dim) if num_kinds else None
        self.control_adapter = None
        if camera_channels:
            self.control_adapter = CameraAdapter(
                camera_channels, dim, patch_size[1:], camera_fold, camera_downscale, camera_residual_blocks
            )
        self.blocks = nn.ModuleList(
            KlingTransformerBlock(dim, ffn_dim, num_attention_heads, bool(qk_norm), cross_attn_norm, eps, added_kv_proj_dim)
            for _ in range(num_layers)
        )
        self.norm_out = ModulatedNorm(dim, eps)
        self.proj_out = nn.Linear(dim, (out_channels or in_channels) * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

        self.gradient_checkpointing = False
        self.many_shapes = False  # whether the blocks are compiled for any shape
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """For training from scratch: every block starts near the identity and the velocity at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | PatchEmbed):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view
                nn.init.zeros_(module.bias)
        embedder = self.condition_embedder
        for layer in (embedder.time_embedder.linear_1, embedder.time_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)  # the text keeps its size: at 0.02 a small model learned to ignore it
        for block in self.blocks:  # while text is noise to the model, a branch that speaks teaches the text encoder to be silent
            nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(embedder.time_proj.weight)
        nn.init.zeros_(self.proj_out.weight)
        for extra in self._extras.values():
            extra.zero_init()

    def compile_repeated_blocks(self, fullgraph: bool = True, dynamic: bool | None = None, **kwargs: Any) -> None:
        """Compile the blocks, once for all of them; arguments are those of `torch.compile`. dynamic: one graph for many shapes, as
        training needs; by default each shape has its own until there are two.

        As diffusers' method, but only the computation of a block is compiled and not the hooks on it, so that nothing breaks its graph.
        """
        if dynamic:  # else two lengths that are alike in the first batch, such as samples and levels, must be so in every one
            torch.fx.experimental._config.use_duck_shape = False
        for block in self.blocks:
            block.layer = torch.compile(block.layer, fullgraph=fullgraph, dynamic=dynamic, **kwargs)
        self.many_shapes = bool(dynamic)

    @property
    def _extras(self) -> dict[str, KindEmbedding | CameraAdapter]:
        """The modules that a Wan checkpoint does not have."""
        extras = {"kind_embedding": self.kind_embedding, "control_adapter": self.control_adapter}
        return {name: module for name, module in extras.items() if module is not None}

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        sigma: Tensor | Levels,
        encoder_hidden_states: Tensor,
        *,
        positions: Tensor | None = None,
        kinds: Tensor | None = None,
        camera: Tensor | Cameras | None = None,
        camera_mask: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        history: History | None = None,
        walk_cache: WalkCache | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity ε - x₀ of noisy latents, for every frame.

        Args:
            hidden_states: (b, c, G, h, w) noisy latents, any conditioning channels of older checkpoints concatenated.
            sigma: noise level in [0, 1], one per sample (b,), per frame (b, G) or per token (b, G, h/ph, w/pw) or (b, n). Give float64 to
                reach a published integer timestep exactly; or the distinct `Levels`, which on a GPU saves the wait for finding them.
            encoder_hidden_states: (b, l, e) text.
            positions: (b, G) place of each frame in time, in latent frames, any real number. Default 0 … G - 1.
            kinds: (b, G) integers below `num_kinds`. Default 0, a frame to generate.
            camera: (b, camera_channels, G, H, W) packed Plücker rays, or the poses that they are made from here.
            camera_mask: (b,) True where the sample has a camera. Default: all have.
            encoder_hidden_states_image: (b, i, image_dim) image-encoder tokens of the older Wan I2V weights.
            history: frames before these, which block-causal weights attend to as well.
            walk_cache: what earlier steps of the same walk have found and this one may use again.

        Returns:
            `.sample` (b, out_channels, G, h, w).

        Raises:
            UserError: an input that this model has no use for, or of a shape that does not fit the latents.
        """
        if encoder_hidden_states_image is not None and self.config.image_dim is None:
            raise UserError("image tokens were given but this model has no image branch (image_dim is None): leave them out")
        if history is not None and self._parallel_config is not None:
            raise UserError("block-causal sampling cannot share its tokens between devices: leave context parallelism off")
        patch = tuple(self.config.patch_size)
        grid = token_grid(*hidden_states.shape[2:], patch)
        still = {} if walk_cache is None else walk_cache.still
        if "rotation" not in still:
            still["rotation"] = self.rope(self._positions(positions, grid[0], hidden_states), *grid[1:])
        rotation = still["rotation"]  # (b | 1, n, 1, head_dim / 2, 2)

        x = self._embed(hidden_states, grid, kinds, camera, camera_mask, still)  # (b, n, d)
        levels, index = noise_levels(sigma, grid)  # (u,), (b, g)
        if self.many_shapes:
            levels, index = spell_alike(levels, index, grid)
            rotation = rotation.clone()  # a view brings the lengths of what it views into every graph
        if self._parallel_config is not None and index.shape[1] > 1:
            index = self.token_index(index, x.shape[1])
        temb, vectors, text, image = self.condition_embedder(levels, encoder_hidden_states, encoder_hidden_states_image)
        modulation = Modulation(vectors, index)  # (u, 6, d)

        for i, block in enumerate(self.blocks):
            past = None if history is None else history.layers[i]
            kept = None if walk_cache is None else walk_cache.layers[i]
            x = self._run(block, x, text, modulation, rotation, image, past, kept)
        velocity = unpatchify(self._head(x, temb, index).unflatten(1, grid), patch, OUTPUT)  # (b, c, G, h, w)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _embed(
        self, z: Tensor, grid: tuple[int, int, int], kinds: Tensor | None, camera: Tensor | Cameras | None, mask: Tensor | None,
        still: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """Latents (b, c, G, h, w) -> tokens (b, n, d), with what is added to them."""
        x = self._add_kinds(self.patch_embedding(z), kinds, grid)
        if camera is None:
            return x
        if "camera" not in still:
            still["camera"] = self._camera(camera, x, mask)
        return x + still["camera"]

    def _run(self, block: KlingTransformerBlock, *args: Any) -> Tensor:
        """One block, its activations kept or computed again in the backward pass."""
        again = torch.is_grad_enabled() and self.gradient_checkpointing
        return self._gradient_checkpointing_func(block, *args) if again else block(*args)

    def _head(self, x: Tensor, temb: Tensor, index: Tensor) -> Tensor:
        """(b, n, d) -> (b, n, patch · c), modulated by the embedded levels (u, d)."""
        out = Modulation(temb[:, None], index) + self.scale_shift_table  # (u, 2, d)
        return self.proj_out(self.norm_out(x, out.vector(0), out.vector(1)))

    def _positions(self, positions: Tensor | None, frames: int, latents: Tensor) -> Tensor:
        if positions is None:
            return torch.arange(frames, device=latents.device)[None]  # (1, G)
        if positions.shape != (latents.shape[0], frames):
            raise UserError(f"positions of shape {tuple(positions.shape)}: give ({latents.shape[0]}, {frames}), one per frame")
        return positions

    def _add_kinds(self, x: Tensor, kinds: Tensor | None, grid: tuple[int, int, int]) -> Tensor:
        b, frames = x.shape[0], grid[0]
        if kinds is not None and kinds.shape != (b, frames):
            raise UserError(f"kinds of shape {tuple(kinds.shape)}: give ({b}, {frames}), one per frame")
        known = max(self.config.num_kinds, 1)  # kind 0, a frame to generate, is what every model knows
        on_host = kinds is not None and kinds.device.type == "cpu"  # a GPU would have to be waited for, and its embedding checks as well
        if on_host and not torch.compiler.is_compiling() and not 0 <= int(kinds.min()) <= int(kinds.max()) < known:
            raise UserError(f"kinds up to {int(kinds.max())}, but this model knows {known} (num_kinds): use 0 … {known - 1}")
        if self.kind_embedding is None:
            return x
        if kinds is None:
            return x + self.kind_embedding.weight[0]
        return (x.unflatten(1, (frames, -1)) + self.kind_embedding(kinds)[:, :, None]).flatten(1, 2)

    def _camera(self, camera: Tensor | Cameras, x: Tensor, mask: Tensor | None) -> Tensor:
        """What the camera adds to tokens like x (b, n, d)."""
        if self.control_adapter is None:
            raise UserError("a camera was given but this model has no camera input (camera_channels is 0): leave the camera out")
        channels = RAY_CHANNELS if isinstance(camera, Cameras) else camera.shape[1]
        if channels != self.config.camera_channels:
            raise UserError(f"camera of {channels} channels: this model takes {self.config.camera_channels}")
        residual = torch.cat([self.control_adapter(rays.to(x.dtype)) for rays in _ray_parts(camera)], dim=1)  # (b, n, d)
        if residual.shape != x.shape:
            shape = camera.size if isinstance(camera, Cameras) else camera.shape
            raise UserError(
                f"camera rays of {' x '.join(map(str, shape))} give {residual.shape[1]} tokens where the latents have {x.shape[1]}: "
                f"render the rays at {self.config.camera_downscale} pixels per latent cell"
            )
        return residual if mask is None else residual * mask.to(residual.dtype)[:, None, None]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self | tuple[Self, dict[str, Any]]:
        """As diffusers', and extras that the checkpoint lacks start at zero instead of on the meta device.

        Raises `UserError` if anything else is missing from the checkpoint.
        """
        return_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)  # diffusers falls back to a pickle
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        missing = set(info["missing_keys"])
        for name, module in model._extras.items():
            keys = {f"{name}.{key}" for key in module.state_dict()}
            if keys <= missing:
                missing -= keys
                module.to_empty(device=model.scale_shift_table.device)
                module.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
                module.zero_init()
        if missing:
            raise UserError(
                f"checkpoint '{pretrained_model_name_or_path}' lacks {len(missing)} weights of its config, "
                f"'{min(missing)}' among them: get it again"
            )
        return (model, info) if return_info else model

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As diffusers', but a key that is not an argument is refused instead of ignored."""
        known = cls._get_init_keys(cls) - {"self"}
        for key in (*config_dict, *kwargs):
            if key not in known and not key.startswith("_") and key != "quantization_config":
                raise unknown("config key", key, sorted(known))
        return super().extract_init_dict(config_dict, **kwargs)


def _ray_parts(camera: Tensor | Cameras) -> Iterator[Tensor]:
    """Rays (b, camera_channels, ·, H, W) in the order of their frames: all at once, or while sampling so many that memory stays flat."""
    if isinstance(camera, Tensor):
        yield camera
        return
    together = camera.frames
    if not torch.is_grad_enabled():
        together = max(1, RAYS_PER_PASS // (len(camera.c2w) * RAY_CHANNELS * camera.size[0] * camera.size[1]))
    for start in range(0, camera.frames, together):
        yield camera.rays(start, min(start + together, camera.frames))
