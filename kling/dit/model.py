"""The spatiotemporal diffusion transformer: latents, noise levels, text and camera in, velocity out.

    latents --patch--> tokens (+ kind, + camera, + tracks) --blocks: attention over (frame, row, column), text, feed-forward--> velocity

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
from diffusers.utils import apply_lora_scale, logging
from torch import Tensor, nn

from kling.cameras.trajectory import RAY_CHANNELS, Cameras
from kling.dit.block import KlingTransformerBlock
from kling.dit.camera import CameraAdapter
from kling.dit.embedding import ConditionEmbedder, KindEmbedding, TrackEmbedding
from kling.dit.history import History
from kling.dit.walk_cache import WalkCache
from kling.errors import UserError, unknown
from kling.nn.modulation import Levels, ModulatedNorm, Modulation, TokenIndex, noise_levels, spell_alike
from kling.nn.patch import PatchEmbed, unpatchify
from kling.nn.rope import RotaryPosEmbed
from kling.runtime.diffusers_internals import ContextParallelInput, ContextParallelOutput
from kling.shapes import token_grid

RAYS_PER_PASS = 2**23  # numbers in the rays that are made at once while sampling
MOST_GRAPHS = 32  # that torch may compile of a block
DELTATIME_TYPES = ("r", "t-r")
ANYFLOW_KEYS = {"init_far_model", "init_flowmap_model", "chunk_partition", "compressed_patch_size", "full_chunk_limit"}  # of its training
OUTPUT = "thwc"  # order of the numbers that a token becomes: Wan's, in which the channel is the fastest axis


class KlingTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin):
    """Velocity of noisy latents.

    Args, in addition to those of `WanTransformer3DModel` (of which `rope_max_seq_len` limits nothing here: positions are real numbers):
        timestep_scale: the time embedder sees `timestep_scale · σ`.
        num_kinds: size of the embedding of frame kinds; 0 is none.
        camera_channels: channels of the packed Plücker rays (24); 0 is no camera input.
        camera_fold: "unshuffle" (as the published Wan-Fun Camera weights) or "pool" (small models).
        camera_downscale: pixels of a ray map along each side of a latent cell (the spatial factor of the VAE).
        camera_residual_blocks: residual blocks after the fold.
        track_channels: channels of the map of tracks (latent channels + 1); 0 is no input for tracks.
        gate_value, deltatime_type: of a flow map, as in diffusers' `AnyFlowTransformer3DModel`: the share of a step's end in the embedded
            level, and whether the end is given as a level ("r") or as a length ("t-r"). None: no flow map.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "kind_embedding", "track_embedding", "norm"]
    _no_split_modules = ["KlingTransformerBlock"]
    _keep_in_fp32_modules = ["time_embedder", "delta_embedder", "scale_shift_table", "norm1", "norm2", "norm3"]
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
        track_channels: int = 0,
        gate_value: float | None = None,
        deltatime_type: str = "r",
    ) -> None:
        super().__init__()
        if deltatime_type not in DELTATIME_TYPES:
            raise unknown("deltatime_type", deltatime_type, DELTATIME_TYPES)
        if qk_norm not in (None, "rms_norm_across_heads"):
            raise unknown("qk_norm", qk_norm, ["rms_norm_across_heads"])
        if attention_head_dim % 2 or freq_dim % 2 or freq_dim < 4:
            raise UserError(f"attention_head_dim {attention_head_dim}, freq_dim {freq_dim}: give even numbers, and a freq_dim of 4 or more")
        if len(patch_size) != 3:
            raise UserError(f"patch_size {list(patch_size)}: give three numbers, of latent frames, rows and columns, such as [1, 2, 2]")
        dim = num_attention_heads * attention_head_dim
        patch_size = tuple(patch_size)

        self.patch_embedding = PatchEmbed(in_channels, dim, patch_size)
        self.rope = RotaryPosEmbed(attention_head_dim)
        self.token_index = TokenIndex()
        self.condition_embedder = ConditionEmbedder(
            dim, freq_dim, text_dim, timestep_scale, image_dim, pos_embed_seq_len, gate_value, deltatime_type
        )
        self.kind_embedding = KindEmbedding(num_kinds, dim) if num_kinds else None
        self.control_adapter = None
        if camera_channels:
            self.control_adapter = CameraAdapter(
                camera_channels, dim, patch_size[1:], camera_fold, camera_downscale, camera_residual_blocks
            )
        self.track_embedding = TrackEmbedding(track_channels, dim, patch_size) if track_channels else None
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
        """For training from scratch: every block starts near the identity, and the velocity at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | PatchEmbed):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view
                nn.init.zeros_(module.bias)
        embedder = self.condition_embedder
        for layer in (embedder.time_embedder.linear_1, embedder.time_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)  # not the text's layers: with this std a small model learned to ignore the text
        for block in self.blocks:  # at 0: a random cross-attention is noise at first, and training would shrink the text's features
            nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(embedder.time_proj.weight)
        nn.init.zeros_(self.proj_out.weight)
        for extra in self._extras.values():
            extra.zero_init()
        self._copy_level_embedder()

    def _copy_level_embedder(self) -> None:
        """Start the embedding of a step's end as a copy of that of its level, so that a step of length 0 has the velocity of the weights
        it began with."""
        if (delta := self.condition_embedder.delta_embedder) is not None:
            delta.load_state_dict(self.condition_embedder.time_embedder.state_dict())

    def compile_repeated_blocks(self, fullgraph: bool = True, dynamic: bool | None = None, **kwargs: Any) -> None:
        """Compile the blocks, once for all of them; arguments are those of `torch.compile`. dynamic: one graph for many shapes, as
        training needs; by default each shape has its own graph until there are two.

        Unlike diffusers' method, it compiles only the computation of a block and not the hooks on it, so that nothing breaks its graph.
        """
        # torch gives up after 8 graphs: the batches of the small world need 5 on a CPU, and a GPU has more kernels of attention
        torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
        if dynamic:  # otherwise two lengths that are equal in the first batch, such as samples and levels, must be equal in every batch
            torch.fx.experimental._config.use_duck_shape = False
        for block in self.blocks:
            block.layer = torch.compile(block.layer, fullgraph=fullgraph, dynamic=dynamic, **kwargs)
        self.many_shapes = bool(dynamic)

    @property
    def _extras(self) -> dict[str, KindEmbedding | CameraAdapter | TrackEmbedding]:
        """The modules that a Wan checkpoint does not have."""
        names = ("kind_embedding", "control_adapter", "track_embedding")
        return {name: module for name in names if (module := getattr(self, name)) is not None}

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        sigma: Tensor | Levels,
        encoder_hidden_states: Tensor,
        *,
        sigma_next: Tensor | None = None,
        positions: Tensor | None = None,
        kinds: Tensor | None = None,
        camera: Tensor | Cameras | None = None,
        camera_mask: Tensor | None = None,
        tracks: Tensor | None = None,
        shots: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        history: History | None = None,
        walk_cache: WalkCache | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity ε - x₀ of noisy latents, for every frame; of a flow map its mean over a step.

        Args:
            hidden_states: (b, c, G, h, w) noisy latents, any conditioning channels of older checkpoints concatenated.
            sigma: noise level in [0, 1], one per sample (b,), per frame (b, G) or per token (b, G, h/ph, w/pw) or (b, n). Give float64 to
                reach a published integer timestep exactly; or give the distinct `Levels`, which saves a GPU from waiting to find them.
            encoder_hidden_states: (b, l, e) text; with `shots` (b · S, l, e), the texts of the S shots of each sample.
            sigma_next: of a flow map, the level at which the step ends, of the same shape as `sigma`. Default: `sigma`, a step of length 0.
            positions: (b, G) position of each frame in time, in latent frames, any real number. Default 0 … G - 1.
            kinds: (b, G) integers below `num_kinds`. Default 0, a frame to generate.
            camera: (b, camera_channels, G, H, W) packed Plücker rays, or the poses from which they are computed here.
            camera_mask: (b,) True if the sample has a camera, or (b, G) if the frame has. Default: all have.
            tracks: (b, track_channels, G, h, w) map of where points move; 0 for a sample without any.
            shots: (b, G) the shot of each frame, from 0: its tokens attend to the text of that shot only.
            encoder_hidden_states_image: (b, i, image_dim) image-encoder tokens of the older Wan I2V weights.
            history: earlier frames, which block-causal weights attend to as well.
            walk_cache: results of earlier steps with the same inputs, to be reused.

        Returns:
            `.sample` (b, out_channels, G, h, w).

        Raises:
            UserError: an input that this model cannot use, or of a shape that does not fit the latents.
        """
        if encoder_hidden_states_image is not None and self.config.image_dim is None:
            raise UserError("image tokens were given but this model has no image branch (image_dim is None): leave them out")
        if history is not None and self._parallel_config is not None:
            raise UserError("block-causal sampling cannot share its tokens between devices: leave context parallelism off")
        if shots is not None and self._parallel_config is not None:
            raise UserError("the frames of several shots cannot be shared between devices: leave context parallelism off, or make one shot")
        patch = tuple(self.config.patch_size)
        grid = token_grid(*hidden_states.shape[2:], patch)
        levels = noise_levels(sigma, grid, sigma_next)
        if levels.ends is not None and self.config.gate_value is None:
            raise UserError("the end of a step was given but this model is no flow map (gate_value is None): leave it out")
        still = {} if walk_cache is None else walk_cache.still
        if "rotation" not in still:
            still["rotation"] = self.rope(self._positions(positions, grid[0], hidden_states), *grid[1:])
        rotation = still["rotation"]  # (b | 1, n, 1, head_dim / 2, 2)

        x = self._embed(hidden_states, grid, kinds, camera, camera_mask, tracks, still)  # (b, n, d)
        if self.many_shapes:
            levels = spell_alike(levels, grid)
            rotation = rotation.clone()  # a view would bring the lengths of its base into every graph
        sigmas, index, ends = levels  # (u,), (b, g), (u,)
        if self._parallel_config is not None and index.shape[1] > 1:
            index = self.token_index(index, x.shape[1])
        temb, vectors, text, image = self.condition_embedder(sigmas, encoder_hidden_states, encoder_hidden_states_image, ends)
        modulation = Modulation(vectors, index)  # (u, 6, d)
        rows = None if shots is None else self._text_rows(shots, text, grid[0])  # (b, G)

        for i, block in enumerate(self.blocks):
            past = None if history is None else history.layers[i]
            kept = None if walk_cache is None else walk_cache.layers[i]
            x = self._run(block, x, text, modulation, rotation, image, past, kept, rows)
        velocity = unpatchify(self._head(x, temb, index).unflatten(1, grid), patch, OUTPUT)  # (b, c, G, h, w)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _embed(
        self, z: Tensor, grid: tuple[int, int, int], kinds: Tensor | None, camera: Tensor | Cameras | None, mask: Tensor | None,
        tracks: Tensor | None, still: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        """Latents (b, c, G, h, w) -> tokens (b, n, d), with kinds, camera and tracks added."""
        x = self._add_kinds(self.patch_embedding(z), kinds, grid)
        if camera is not None:
            if "camera" not in still:
                still["camera"] = self._camera(camera, x, mask)
            x = x + still["camera"]
        if tracks is not None:
            if "tracks" not in still:
                still["tracks"] = self._tracks(tracks, z)
            x = x + still["tracks"]
        return x

    def _run(self, block: KlingTransformerBlock, *args: Any) -> Tensor:
        """Run one block; its activations are kept, or recomputed in the backward pass."""
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
        known = max(self.config.num_kinds, 1)  # every model knows kind 0, a frame to generate
        on_host = kinds is not None and kinds.device.type == "cpu"  # checking on a GPU would wait for it, and its embedding checks too
        if on_host and not torch.compiler.is_compiling() and not 0 <= int(kinds.min()) <= int(kinds.max()) < known:
            raise UserError(f"kinds up to {int(kinds.max())}, but this model knows {known} (num_kinds): use 0 … {known - 1}")
        if self.kind_embedding is None:
            return x
        if kinds is None:
            return x + self.kind_embedding.weight[0]
        return (x.unflatten(1, (frames, -1)) + self.kind_embedding(kinds)[:, :, None]).flatten(1, 2)

    def _camera(self, camera: Tensor | Cameras, x: Tensor, mask: Tensor | None) -> Tensor:
        """The camera's contribution to tokens like x (b, n, d)."""
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
        if mask is None:
            return residual
        if mask.ndim == 2:
            mask = mask.repeat_interleave(residual.shape[1] // mask.shape[1], dim=1)  # (b, n)
        return residual * mask.to(residual.dtype).view(len(mask), -1, 1)

    def _tracks(self, tracks: Tensor, z: Tensor) -> Tensor:
        """What tracks (b, track_channels, G, h, w) add to the tokens of z (b, c, G, h, w): (b, n, d)."""
        if self.track_embedding is None:
            raise UserError("tracks were given but this model has no input for them (track_channels is 0): leave them out")
        if tracks.shape != (shape := (z.shape[0], self.config.track_channels, *z.shape[2:])):
            raise UserError(f"tracks of shape {tuple(tracks.shape)}: give {shape}, a map of the size of the latents")
        return self.track_embedding(tracks.to(self.track_embedding.weight.dtype))

    @staticmethod
    def _text_rows(shots: Tensor, text: Tensor, frames: int) -> Tensor:
        """The row of `text` (b · S, l, d) that each frame attends to, (b, G), for its shot."""
        b = len(shots)
        if shots.shape[1] != frames or len(text) % b:
            raise UserError(f"shots of shape {tuple(shots.shape)} with {len(text)} texts: give ({b}, {frames}), and as many texts a sample")
        return shots + torch.arange(b, device=shots.device)[:, None] * (len(text) // b)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self | tuple[Self, dict[str, Any]]:
        """As in diffusers, but extras that the checkpoint lacks start at zero instead of on the meta device.

        Raises `UserError` if anything else is missing from the checkpoint.
        """
        return_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)  # diffusers falls back to a pickle
        said = logging.get_verbosity()
        logging.set_verbosity_error()  # it would warn of weights that are missing; here they begin at zero, or are refused
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        finally:
            logging.set_verbosity(said)
        missing = set(info["missing_keys"])
        for name, module in model._extras.items():
            keys = {f"{name}.{key}" for key in module.state_dict()}
            if keys <= missing:
                missing -= keys
                module.to_empty(device=model.scale_shift_table.device)
                module.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
                module.zero_init()
        delta = {name for name in missing if name.startswith("condition_embedder.delta_embedder.")}
        if delta and missing == delta:
            model.condition_embedder.delta_embedder.to_empty(device=model.scale_shift_table.device)
            model._copy_level_embedder()
            missing = set()
        if missing:
            raise UserError(
                f"checkpoint '{pretrained_model_name_or_path}' lacks {len(missing)} weights of its config, "
                f"'{min(missing)}' among them: get it again"
            )
        return (model, info) if return_info else model

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in diffusers, but an unknown key is refused instead of ignored."""
        known = cls._get_init_keys(cls) - {"self"}
        if config_dict.get("init_far_model"):
            raise UserError("this transformer is a causal AnyFlow (init_far_model), which is not supported: take the one for plain Wan")
        config_dict = {key: value for key, value in config_dict.items() if key not in ANYFLOW_KEYS}
        for key in (*config_dict, *kwargs):
            if key not in known and not key.startswith("_") and key != "quantization_config":
                raise unknown("config key", key, sorted(known))
        return super().extract_init_dict(config_dict, **kwargs)


def _ray_parts(camera: Tensor | Cameras) -> Iterator[Tensor]:
    """Rays (b, camera_channels, ·, H, W) in frame order: all at once, or, in sampling, in parts, so that memory does not grow."""
    if isinstance(camera, Tensor):
        yield camera
        return
    together = camera.frames
    if not torch.is_grad_enabled():
        together = max(1, RAYS_PER_PASS // (len(camera.c2w) * RAY_CHANNELS * camera.size[0] * camera.size[1]))
    for start in range(0, camera.frames, together):
        yield camera.rays(start, min(start + together, camera.frames))
