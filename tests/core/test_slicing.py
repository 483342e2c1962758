import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from small_pipeline import pipeline_of
from unets import CONFIGS, SHAPES, build, inputs, relative_error

from prunekit import Architecture, PrunedUNet2DConditionModel, discover, gated, slice_unet


def run(unet, **kwargs):
    with torch.no_grad():
        return unet(**inputs(unet, **kwargs)).sample


def without(space, *names):
    """Return the architecture without these groups."""
    values = torch.ones(space.size, dtype=torch.bool)
    for name in names:
        values[space.slice(name)] = False
    return Architecture(space, values)


def same_state(a, b):
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, tmp_path):
    unet = build(shape)
    space = discover(unet, depth="blocks")
    values = space.random(0.6, seed=1).values.clone()
    for group in (space.width_groups[0], space.width_groups[-1]):
        values[space.slice(group)] = False
        values[[space.num_width + unit for unit in space.depth_units_over(group.path)]] = True
    architecture = Architecture(space, values)
    pruned = slice_unet(unet, architecture)
    pruned.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pruning"]["format"] == 1
    assert config["pruning"]["removed"] == sorted(group.path for group in architecture.removed())
    assert config["pruning"]["kept"]["down_blocks.0.resnets.0"] == []
    assert config["block_out_channels"] == CONFIGS[shape]["block_out_channels"]
    for options in ({}, {"low_cpu_mem_usage": False}):
        loaded, info = PrunedUNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert not any(info.values())
        assert same_state(loaded, pruned)
        assert relative_error(run(loaded), run(pruned)) <= 1e-6
        assert loaded.config.pruning == config["pruning"]
    half = PrunedUNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) <= set(unet.state_dict())


def test_the_source_is_left_alone_and_shares_no_memory():
    unet, untouched = build("sd2"), build("sd2")
    unet.requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    unet.train()
    pruned = slice_unet(unet, discover(unet, depth="all").random(0.5))
    assert same_state(unet, untouched)
    assert type(unet) is UNet2DConditionModel
    pointers = {parameter.data_ptr() for parameter in unet.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in pruned.parameters() if parameter.numel()}
    assert [name for name, parameter in pruned.named_parameters() if parameter.requires_grad] == [
        "conv_in.weight",
        "conv_in.bias",
    ]
    assert pruned.training
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert same_state(unet, untouched)


def test_full_architecture_is_stock():
    unet = build("sd1")
    pruned = slice_unet(unet, discover(unet).full())
    assert same_state(unet, pruned)
    assert torch.equal(run(pruned), run(unet))
    assert pruned.config.pruning == {"format": 1, "kept": {}, "removed": []}


def test_dtype_memory_format_and_processors_carry_over():
    from diffusers.models.attention_processor import AttnProcessor

    unet = build("sd2").to(torch.float64).to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    pruned = slice_unet(unet, discover(unet, depth="none").random(0.5))
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.float64}
    kernels = [parameter for name, parameter in pruned.named_parameters() if "conv1.weight" in name]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert {type(processor) for processor in pruned.attn_processors.values()} == {AttnProcessor}


def test_an_architecture_of_another_instance_and_on_meta():
    unet, other, meta = build("sd2"), build("sd2", seed=1), build("sd2", "meta")
    architecture = discover(other, depth="all").random(0.5)
    pruned = slice_unet(unet, architecture)
    shapes = {name: parameter.shape for name, parameter in pruned.named_parameters()}
    on_meta = slice_unet(meta, Architecture.from_dict(architecture.to_dict()))
    assert {name: parameter.shape for name, parameter in on_meta.named_parameters()} == shapes
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}


@pytest.mark.parametrize("shape", SHAPES)
def test_slicing_composes(shape, tmp_path):
    unet = build(shape)
    first = discover(unet, depth="all").random(0.7, seed=1)
    once = slice_unet(unet, first)
    second = discover(once, depth="blocks").random(0.7, seed=2)
    with torch.no_grad(), gated(once, second.space) as gates:
        gates.set(second)
        masked = run(once)
    twice = slice_unet(once, second)
    assert relative_error(masked, run(twice)) <= 1e-5
    twice.save_pretrained(tmp_path)
    loaded = PrunedUNet2DConditionModel.from_pretrained(tmp_path)
    assert same_state(loaded, twice)
    whole = discover(unet, depth="blocks")
    values = torch.ones(whole.size, dtype=torch.bool)
    pruning = twice.config.pruning
    for group in whole.groups:
        if group.is_depth:
            values[whole.slice(group)] = group.path not in pruning["removed"]
        elif group.path in pruning["kept"]:
            part = whole.slice(group)
            values[part] = False
            values[[part.start + index for index in pruning["kept"][group.path]]] = True
    assert same_state(slice_unet(unet, Architecture(whole, values)), twice)


def test_scale_shift_time_embedding():
    unet = build("sd2", resnet_time_scale_shift="scale_shift")
    architecture = discover(unet, depth="none").random(0.5)
    with torch.no_grad(), gated(unet, architecture.space) as gates:
        gates.set(architecture)
        masked = run(unet)
    assert relative_error(masked, run(slice_unet(unet, architecture))) <= 1e-5


def test_bksdm_tiny_is_its_stock_form():
    """Removing a stage gives the UNet of BK-SDM-Tiny's config in diffusers, with weights copied as in BK-SDM."""
    unet = build("sd1")
    config = {
        **CONFIGS["sd1"],
        "block_out_channels": [32, 64, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "mid_block_type": None,
    }
    stock = UNet2DConditionModel(sample_size=16, **config).eval()
    state = unet.state_dict()

    def source(key):
        parts = key.split(".")
        if parts[0] == "up_blocks":
            parts[1] = str(int(parts[1]) + 1)
            parts[3] = "2" if parts[2] != "upsamplers" and parts[3] == "1" else parts[3]
        return ".".join(parts)

    stock.load_state_dict({key: state[source(key)] for key in stock.state_dict()})
    space = discover(unet, depth="blocks")
    dropped = [f"layer:down_blocks.{i}.{kind}.1" for i in range(3) for kind in ("resnets", "attentions")]
    dropped += [f"layer:up_blocks.{i}.{kind}.1" for i in (1, 2, 3) for kind in ("resnets", "attentions")]
    pruned = slice_unet(unet, without(space, "stage:down_blocks.3", *dropped))
    for size in (16, 12, (10, 9)):
        assert torch.equal(run(pruned, size=size), run(stock, size=size))


def test_emptied_groups_survive_saving(tmp_path):
    unet = build("sdxl")
    space = discover(unet, depth="none")
    architecture = without(space, *(group.name for group in space.groups))
    pruned = slice_unet(unet, architecture)
    pruned.save_pretrained(tmp_path)
    loaded = PrunedUNet2DConditionModel.from_pretrained(tmp_path)
    assert same_state(loaded, pruned)
    names = set(load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert "down_blocks.0.resnets.0.conv2.bias" in names and "down_blocks.0.resnets.0.conv2.weight" not in names
    assert discover(loaded).num_width == 0
    assert run(loaded).isfinite().all()


def test_attention_slicing_with_one_head():
    unet = build("sd2")
    space = discover(unet, depth="none")
    values = torch.ones(space.size, dtype=torch.bool)
    for group in space.groups:
        if group.kind == "attention" and "attn1" in group.path:
            values[space.slice(group)] = torch.arange(group.size) == 0
    pruned = slice_unet(unet, Architecture(space, values))
    expected = run(pruned)
    for slice_size in ("auto", "max", 1):
        pruned.set_attention_slice(slice_size)
        assert relative_error(run(pruned), expected) <= 1e-6


def test_fused_projections_are_refused():
    unet = build("sd2")
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\) first"):
        slice_unet(unet, discover(unet, depth="none").random(0.5))


def test_a_soft_architecture_is_refused():
    unet = build("sd2", "meta")
    space = discover(unet)
    with pytest.raises(ValueError, match="make it boolean first"):
        slice_unet(unet, Architecture(space, torch.rand(space.size)))


def test_an_architecture_of_another_unet_is_refused():
    architecture = discover(build("sdxl", "meta"), depth="all").full()
    with pytest.raises(ValueError, match="this model has no 'attention:"):
        slice_unet(build("sd2", "meta"), architecture)
    narrow = discover(build("sd2", "meta", norm_num_groups=4)).full()
    with pytest.raises(ValueError, match="has 8 units of 4 channels in this model, 4 of 8 in the space"):
        slice_unet(build("sd2", "meta"), narrow)


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"format": 3, "kept": {}, "removed": []}, "format 3; this version of prunekit reads formats 1 and 2"),
        ([], r"format \[\]"),
        ({"format": 1, "keep": {}}, r"unknown keys \['keep'\]"),
        ({"format": 1, "kept": {"down_blocks.0.resnet.0": [0]}}, r"Near names: down_blocks\.0\.resnets\.0"),
        ({"format": 1, "kept": {"down_blocks.0.resnets.0": [0, 8]}}, "outside 0 to 7"),
        ({"format": 1, "kept": {"down_blocks.0.resnets.0": [-1]}}, "outside 0 to 7"),
        ({"format": 1, "kept": {"down_blocks.0.resnets.0": [1, 1]}}, "name each unit once"),
        ({"format": 1, "kept": {"down_blocks.0.resnets.0": [2, 1]}}, "must be sorted"),
        ({"format": 1, "removed": ["up_blocks.3.resnets.0"]}, "not a layer that can be removed"),
        ({"format": 1, "removed": ["down_blocks.1"]}, "not a layer that can be removed"),
        ({"format": 1, "removed": ["nothing"]}, "not a layer that can be removed"),
    ],
)
def test_bad_records_are_refused(pruning, message, tmp_path):
    unet = build("sd2")
    unet.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pruning": pruning}))
    with pytest.raises(ValueError, match=message):
        PrunedUNet2DConditionModel.from_pretrained(tmp_path)


def test_inside_a_pipelines_folder_in_a_fresh_process(tmp_path):
    unet = build("sd1")
    pruned = slice_unet(unet, discover(unet, depth="blocks").random(0.6, seed=2))
    pipeline = pipeline_of(StableDiffusionPipeline, pruned)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["prunekit.slicing", "PrunedUNet2DConditionModel"]
    code = (
        "import sys, torch, prunekit.slicing; from diffusers import DiffusionPipeline\n"
        "from safetensors.torch import save_file\n"
        "pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], text_encoder=None, tokenizer=None)\n"
        "prompt = torch.ones(1, 7, 32); pipeline.set_progress_bar_config(disable=True)\n"
        "latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))\n"
        "images = pipeline(prompt_embeds=prompt, negative_prompt_embeds=-prompt, latents=latents, output_type='latent',"
        " num_inference_steps=2).images\n"
        "save_file({'images': images, **pipeline.unet.state_dict()}, sys.argv[1] + '/out.safetensors')\n"
        "print(type(pipeline.unet).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert printed[-1] == "PrunedUNet2DConditionModel"

    out = load_file(tmp_path / "out.safetensors")
    prompt = torch.ones(1, 7, 32)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=-prompt,
        latents=latents,
        output_type="latent",
        num_inference_steps=2,
    ).images
    assert relative_error(out.pop("images"), images) <= 1e-5
    state = pruned.state_dict()
    assert out.keys() == state.keys()
    assert all(torch.equal(out[key], state[key]) for key in state)
    again = DiffusionPipeline.from_pretrained(tmp_path, unet=pruned, text_encoder=None, tokenizer=None)
    assert again.unet is pruned


def test_no_module_names_a_list_of_layers():
    """The set of removable layers is derived from the given model, never from a list of SD's layers."""
    source = Path(__file__).parents[2] / "prunekit"
    files = [*(source / "core").glob("*.py"), *(source / "denoisers").rglob("*.py")]
    assert len(files) > 15
    for path in files:
        assert "resnets.1" not in path.read_text()
