"""The names of layers in diffusers' transformers, and in the files in which the models were published.

A table for each class maps the original name of a layer to the diffusers names of the layers whose rows it holds, in
order. `*` stands for the index of a block. An ending `.weight` or `.bias` is kept. Names that are not listed are the
same in both. Sources: the converters of `diffusers.loaders.single_file_utils`; `original_layout` runs them to check
every name.
"""

from __future__ import annotations

from collections.abc import Mapping

Names = Mapping[str, tuple[str, ...]]
Layers = Mapping[str, str | tuple[str, ...]]


def _block(original: str, diffusers: str, names: Layers) -> dict[str, tuple[str, ...]]:
    """Return names of layers with the names of their blocks in front, in the original code and in diffusers."""
    tuples = {name: (others,) if isinstance(others, str) else others for name, others in names.items()}
    return {f"{original}.*.{name}": tuple(f"{diffusers}.*.{other}" for other in tuples[name]) for name in names}


def _embedders(first: str, second: str, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the names of both layers of embedders; `first` and `second` are the layers' original names."""
    layers = ((first, "linear_1"), (second, "linear_2"))
    return {f"{name}.{part}": (f"{other}.{layer}",) for name, other in names.items() for part, layer in layers}


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
SD3: Names = {
    "pos_embed": ("pos_embed.pos_embed",),
    "x_embedder.proj": ("pos_embed.proj",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    **_embedders(
        "0",
        "2",
        {"t_embedder.mlp": "time_text_embed.timestep_embedder", "y_embedder.mlp": "time_text_embed.text_embedder"},
    ),
    **_block(
        "joint_blocks",
        "transformer_blocks",
        {
            "x_block.attn.qkv": QKV,
            "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.attn.qkv": ADDED_QKV,
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        },
    ),
}
_FLUX_ENDS: Names = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_FLUX_ATTENTION: Layers = {
    "img_attn.qkv": QKV,
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": ADDED_QKV,
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "txt_attn.proj": "attn.to_add_out",
}
_SINGLE_NORMS: Layers = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}
FLUX: Names = {
    **_FLUX_ENDS,
    **_embedders(
        "in_layer",
        "out_layer",
        {
            "time_in": "time_text_embed.timestep_embedder",
            "vector_in": "time_text_embed.text_embedder",
            "guidance_in": "time_text_embed.guidance_embedder",
        },
    ),
    **_block(
        "double_blocks",
        "transformer_blocks",
        {
            **_FLUX_ATTENTION,
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        },
    ),
    **_block(
        "single_blocks",
        "single_transformer_blocks",
        {
            **_SINGLE_NORMS,
            "linear1": (*QKV, "proj_mlp"),
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
        },
    ),
}
FLUX2: Names = {
    **_FLUX_ENDS,
    **_embedders(
        "in_layer",
        "out_layer",
        {
            "time_in": "time_guidance_embed.timestep_embedder",
            "guidance_in": "time_guidance_embed.guidance_embedder",
        },
    ),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    **_block(
        "double_blocks",
        "transformer_blocks",
        {
            **_FLUX_ATTENTION,
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    **_block(
        "single_blocks",
        "single_transformer_blocks",
        {**_SINGLE_NORMS, "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
}
_Z_IMAGE_ATTENTION: Layers = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}
Z_IMAGE: Names = {
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    **{
        original: others
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for original, others in _block(blocks, blocks, _Z_IMAGE_ATTENTION).items()
    },
}
WAN: Names = {
    "head.modulation": ("scale_shift_table",),
    "head.head": ("proj_out",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    **_block(
        "blocks",
        "blocks",
        {
            "modulation": "scale_shift_table",
            "norm3": "norm2",
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            **{
                f"{original}.{name}": f"{other}.{layer}"
                for original, other in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for name, layer in (
                    ("q", "to_q"),
                    ("k", "to_k"),
                    ("v", "to_v"),
                    ("o", "to_out.0"),
                    ("norm_q", "norm_q"),
                    ("norm_k", "norm_k"),
                )
            },
        },
    ),
}
NAMES: Mapping[str, Names] = {
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "QwenImageTransformer2DModel": {},
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
}
