"""Generation and agreement on a small random pipeline."""

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from prunekit.evaluation.agreement import agreement, agreement_samples, predictions
from prunekit.evaluation.generate import generate, generate_to, read_pictures
from prunekit.evaluation.sheets import PictureRow, expert_note, picture_sheet, shortened

PROMPTS = ["red cat", "blue dog", "cat", "a dog and a cat", ""]
SEEDS = [3, 1, 4, 1, 5]
SETTINGS = {"steps": 2, "guidance": 3.0, "size": 16}


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=12)
    text = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=len(pieces) - 2,
        eos_token_id=len(pieces) - 1,
        pad_token_id=len(pieces) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(4, 4),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def pictures(pipeline):
    return generate(pipeline, PROMPTS, SEEDS, batch_size=2, **SETTINGS)


def near(first, second):
    return (first.int() - second.int()).abs().max() <= 1


def test_a_picture_belongs_to_its_prompt_and_seed(pipeline, pictures):
    assert pictures.shape == (5, 3, 16, 16) and pictures.dtype == torch.uint8
    assert torch.equal(pictures, generate(pipeline, PROMPTS, SEEDS, batch_size=2, **SETTINGS))
    backwards = generate(pipeline, PROMPTS[::-1], SEEDS[::-1], batch_size=3, **SETTINGS)
    assert near(pictures, backwards.flip(0))
    assert not near(*generate(pipeline, ["cat", "cat"], [0, 1], **SETTINGS))


def test_plain_diffusers_gives_the_same_picture(pipeline, pictures):
    output = pipeline(
        PROMPTS[0],
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(SEEDS[0]),
        output_type="pt",
    )
    assert near(pictures[0], (output.images[0] * 255).round())


def test_settings_of_the_pipeline_come_back(pipeline):
    pipeline.set_progress_bar_config(leave=False)
    pipeline.safety_checker = checker = object()
    try:
        generate(pipeline, ["cat"], [0], steps=1, guidance=1.0, size=(16, 24))
        assert pipeline.safety_checker is checker and pipeline._progress_bar_config == {"leave": False}
    finally:
        pipeline.safety_checker = None


def test_generate_to_resumes_and_refuses(pipeline, pictures, tmp_path):
    folder = tmp_path / "pictures"
    paths = generate_to(folder, pipeline, PROMPTS, SEEDS, batch_size=2, **SETTINGS)
    assert [path.name for path in paths] == [f"{i:05d}.png" for i in range(5)]
    assert torch.equal(read_pictures(paths), pictures)
    before = {path: path.stat().st_mtime_ns for path in paths}
    paths[2].unlink()
    generate_to(folder, pipeline, PROMPTS, SEEDS, batch_size=2, **SETTINGS)
    changed = [index for index, path in enumerate(paths) if path.stat().st_mtime_ns != before[path]]
    assert changed == [2, 3]  # only its batch
    assert torch.equal(read_pictures(paths), pictures)
    with pytest.raises(ValueError, match="other guidance"):
        generate_to(folder, pipeline, PROMPTS, SEEDS, batch_size=2, **{**SETTINGS, "guidance": 4.0})
    with pytest.raises(ValueError, match="one seed per prompt"):
        generate(pipeline, PROMPTS, SEEDS[:2])


def test_agreement(pipeline):
    latents, text = torch.randn(2, 7, 4, 8, 8, generator=torch.Generator().manual_seed(0))[0], torch.randn(7, 12, 8)
    samples = agreement_samples(latents, {"text": text}, pipeline, seed=1, count=10)
    again = agreement_samples(latents, {"text": text}, pipeline, seed=1, count=10)
    assert torch.equal(samples.call["sample"], again.call["sample"])
    assert torch.equal(samples.call["timestep"], again.call["timestep"])
    assert sorted(samples.indices[:7].tolist()) == list(range(7))  # each index once, before any repeats

    torch.manual_seed(1)
    dense, other = pipeline.unet, UNet2DConditionModel.from_config(pipeline.unet.config)
    dense_output, other_output = predictions(dense, samples), predictions(other, samples)
    expected = float((dense_output - other_output).square().mean())
    assert agreement(dense, dense, samples) == 0
    assert agreement(dense, other, samples, batch_size=3) == pytest.approx(expected, rel=1e-4)
    expert = torch.tensor([0, 1] * 5)
    routed = agreement(dense_output, [dense, other], samples, expert)
    half = float((dense_output - other_output)[1::2].square().sum()) / dense_output.numel()
    assert routed == pytest.approx(half, rel=1e-4)
    with pytest.raises(ValueError, match="expert index"):
        agreement(dense_output, [dense, other], samples)


def test_sheet_of_pictures(pictures, tmp_path):
    rows = [
        PictureRow("dense", pictures),
        PictureRow("APTP", pictures, [expert_note(i, 10**9 * (i + 1)) for i in range(5)]),
    ]
    path = picture_sheet(tmp_path / "sheet.png", rows, [*PROMPTS[:4], "costs $5, a long caption " * 5], "title")
    assert path.stat().st_size > 10_000
    assert expert_note(3, 1_300_000_000) == "expert 3 · 1.30 G MACs"
    assert expert_note(0, 84_300_000) == "expert 0 · 84 M MACs"
    assert shortened("word " * 40).count("\n") == 2 and shortened("word " * 40).endswith("…")
    with pytest.raises(ValueError, match="'dense' has 5 pictures for 4 prompts"):
        picture_sheet(tmp_path / "other.png", rows, PROMPTS[:4])
