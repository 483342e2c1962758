"""Parts of pipelines that `plan` counts without weights: autoencoders, schedulers, text encoders."""

from dataclasses import replace

import pytest
import small_transformer_pipelines
import torch
from small_model import write_pipeline
from small_sdxl import write
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from prunekit.core.registry import scale_of
from prunekit.jobs.plan.planned_parts import KNOWN, load_parts
from prunekit.jobs.plan.text_encoders import (
    CLIP_L,
    GEMMA_2_2B,
    MISTRAL_SMALL_24B,
    OPEN_CLIP_G,
    OPEN_CLIP_H,
    QWEN_2_5_VL_7B,
    QWEN_3_4B,
    QWEN_3_8B,
    T5_XXL,
    UMT5_XXL,
    DecoderShape,
    T5Shape,
    shape_of,
)
from prunekit.models import load_pipeline, load_shape


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("small") / "model")


@pytest.mark.parametrize("family", ["small", "sd1", "sdxl"])
def test_parts_are_those_of_the_pipeline(family, model, tmp_path):
    folder = model if family == "small" else write(tmp_path / family, family)
    pipeline, parts = load_pipeline(folder), load_parts(folder, load_shape(folder).denoiser)
    modules = [pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    count = sum(p.numel() for module in modules if module is not None for p in module.parameters())
    assert parts.params == pytest.approx(count, rel=0.02)  # all parameters except a projection
    assert type(parts.scheduler) is type(pipeline.scheduler)
    calls, guidance = [], 3.0
    pipeline.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(output[0])))
    pipeline(prompt="red apple", num_inference_steps=5, guidance_scale=guidance, output_type="latent")
    assert parts.calls(5, 2) == sum(calls) and parts.calls(5, 1) == len(calls)


ALIKE = ("sana-1.6b", "sana-1.5-4.8b", "wan-2.1-14b")  # models that share their parts with another model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in ALIKE else ()) for name in KNOWN]
)
def test_every_known_model_has_its_parts(name):
    shape = load_shape(name)
    parts = load_parts(name, shape.denoiser)
    assert parts.scale == shape.vae_scale_factor == (32 if name.startswith("sana") else 8)
    assert parts.calls(25, 2) in (50, 52) and parts.params > 2e8
    encoding, decoding = parts.picture_macs((8, 8))
    assert 0 < encoding < decoding


def test_text_encoders_of_the_known_models():
    assert CLIP_L.params == 123_060_480 and OPEN_CLIP_H.params == 340_387_840 and OPEN_CLIP_G.params == 694_659_840
    assert T5_XXL.params == 4_762_310_656 and QWEN_2_5_VL_7B.params == 8_292_166_656
    assert QWEN_3_4B.params == 4_022_468_096 and QWEN_3_8B.params == 8_190_735_360
    assert MISTRAL_SMALL_24B.params == 24_011_361_280
    with torch.device("meta"):
        mistral = Mistral3ForConditionalGeneration(Mistral3Config(tie_word_embeddings=False))  # the config's defaults
    assert MISTRAL_SMALL_24B.params == sum(parameter.numel() for parameter in mistral.parameters())
    assert shape_of(mistral.config.to_dict(), 7) == MISTRAL_SMALL_24B
    assert UMT5_XXL.params == 5_680_910_336 and GEMMA_2_2B.params == 2_614_341_888


SMALL_T5 = {"d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 3, "num_heads": 4, "vocab_size": 90}
SMALL_GEMMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "head_dim": 16,
}
SMALL_QWEN = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 70,
}


def test_text_encoders_are_counted_as_they_compute():
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(**SMALL_T5, feed_forward_proj="gated-gelu"))
    qwen = Qwen2ForCausalLM(Qwen2Config(**SMALL_QWEN, tie_word_embeddings=False, attn_implementation="eager"))
    for model, shape in ((t5, T5Shape(**SMALL_T5, tokens=7)), (qwen, DecoderShape(**SMALL_QWEN, tokens=7))):
        assert shape.params == sum(parameter.numel() for parameter in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            (model.encoder if model is t5 else model.model)(torch.arange(7)[None])
        assert shape.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", [Qwen3ForCausalLM, Qwen3Model])
def test_language_models_are_counted_as_their_configs_say(kind, is_tied):
    config = Qwen3Config(**SMALL_QWEN, head_dim=24, tie_word_embeddings=is_tied, attn_implementation="eager")
    model = kind(config)
    shape = replace(shape_of({**config.to_dict(), "architectures": [kind.__name__]}, 7), tokens=7)
    assert shape.params == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(7)[None])
    assert shape.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("has_biases", [False, True])
def test_a_glm_is_counted_as_its_config_says(has_biases):
    config = GlmConfig(
        **SMALL_QWEN, head_dim=16, pad_token_id=0, attention_bias=has_biases, attn_implementation="eager"
    )
    with torch.device("meta"):
        model = GlmModel(config)
        shape = shape_of(config.to_dict(), 7)
        assert shape.params == sum(parameter.numel() for parameter in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 7, dtype=torch.long))
    assert replace(shape, tokens=7).macs == counter.get_total_flops() // 2


def test_text_encoders_of_a_directory_are_read_from_its_configs():
    """UMT5 and Gemma 2, with the configs of Wan's and Sana's text encoders, against real modules on the meta device."""
    with torch.device("meta"):
        umt5 = UMT5EncoderModel(UMT5Config(**SMALL_T5, feed_forward_proj="gated-gelu"))
        gemma = Gemma2Model(Gemma2Config(**SMALL_GEMMA, attn_implementation="eager"))
        for model in (umt5, gemma):
            shape = shape_of(model.config.to_dict(), 7)
            assert shape.params == sum(parameter.numel() for parameter in model.parameters())
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                (model.encoder if model is umt5 else model)(torch.zeros(1, 7, dtype=torch.long))
            assert replace(shape, tokens=7).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["sana15", "wan"])
def test_parts_are_those_of_a_transformers_pipeline(name, tmp_path):
    """Shapes and parts read from a directory's configs equal those of the loaded pipeline."""
    folder = small_transformer_pipelines.write(tmp_path / name, name, load_pipeline("emoji"))
    pipeline, shape = load_pipeline(folder), load_shape(folder)
    parts = load_parts(folder, shape.denoiser)
    assert shape.vae_scale_factor == parts.scale == scale_of(pipeline) == {"sana15": 2, "wan": 4}[name]
    modules = (pipeline.vae, pipeline.text_encoder)
    assert parts.params == sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert type(parts.scheduler) is type(pipeline.scheduler)
    encoding, decoding = parts.picture_macs((8, 8))
    assert 0 < encoding < decoding
