import json
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from unets import SHAPES, build, inputs, relative_error

from prunekit import Architecture, PrunedUNet2DConditionModel, as_stock, discover, export_unet, slice_unet
from prunekit.methods import BKSDM

UNETS = {shape: build(shape) for shape in SHAPES}
ONE_NOW = [pytest.param(shape, marks=() if shape == SHAPES[0] else pytest.mark.long) for shape in SHAPES]
SPACES = {shape: discover(unet, depth="blocks") for shape, unet in UNETS.items()}
LOAD_WITHOUT_PRUNEKIT = """
import sys, torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    unet, info = UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    arguments = load_file(folder + "/inputs.safetensors")
    save_file({"sample": unet.eval()(**arguments).sample.detach()}, folder + "/out.safetensors")
assert not any(name.startswith("prunekit") for name in sys.modules)
"""


def run(unet, **kwargs):
    with torch.no_grad():
        return unet(**inputs(unet, **kwargs)).sample


def without(shape, *paths):
    """Return the UNet without the layers and stages at these paths; a stage has the path of its down block."""
    space = SPACES[shape]
    kinds = {group.path: group.name for group in space.depth_groups}
    values = torch.ones(space.size, dtype=torch.bool)
    for path in paths:
        values[space.slice(kinds[path])] = False
    return slice_unet(UNETS[shape], Architecture(space, values))


def pair(block, index=1):
    return f"{block}.resnets.{index}", f"{block}.attentions.{index}"


def assert_equal(stock, pruned):
    assert type(stock) is UNet2DConditionModel
    for size in (16, (10, 9)):
        assert relative_error(run(stock, size=size), run(pruned, size=size)) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("shape", ["sd1", "sd2"])
def test_bksdms_family_loads_without_prunekit(shape, tmp_path):
    expected = {}
    members = list(BKSDM().members(UNETS[shape]).items())
    for name, member in [*members[:3], *members[3 + SHAPES.index(shape) :: 8]]:
        pruned = slice_unet(UNETS[shape], member)
        assert_equal(as_stock(pruned), pruned)
        folder = tmp_path / name
        assert export_unet(pruned, folder) == "stock"
        assert "pruning" not in json.loads((folder / "config.json").read_text())
        arguments = inputs(pruned, size=12)
        save_file(arguments, folder / "inputs.safetensors")
        with torch.no_grad():
            expected[folder] = pruned(**arguments).sample
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_PRUNEKIT, *map(str, expected)], check=True)
    for folder, sample in expected.items():
        assert relative_error(load_file(folder / "out.safetensors")["sample"], sample) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_on_meta(shape):
    unet = build(shape, "meta")
    members = BKSDM().members(unet)
    for name in list(members)[:5]:
        pruned = slice_unet(unet, members[name])
        stock = as_stock(pruned)
        assert {parameter.device.type for parameter in stock.parameters()} == {"meta"}
        assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in pruned.parameters())
        layers = stock.config.layers_per_block
        levels = len(stock.down_blocks)
        counts = [layers] * levels if isinstance(layers, int) else list(layers)
        if name[0].isdigit():
            assert counts == [int(count) for count in name.removesuffix("-mid").split(",")]
            assert (stock.mid_block is None) == name.endswith("-mid")


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_removed(shape):
    pruned = slice_unet(UNETS[shape], SPACES[shape].full())
    stock = as_stock(pruned)
    assert torch.equal(run(stock), run(pruned))
    known = {key: value for key, value in UNETS[shape].config.items() if not key.startswith("_")}
    assert json.dumps({key: stock.config[key] for key in known}) == json.dumps(known)


@pytest.mark.parametrize("shape", ONE_NOW)
def test_a_width_cut_has_no_stock_form(shape, tmp_path):
    space = SPACES[shape]
    for kind in ("resnet", "attention", "feedforward"):
        group = next(group for group in space.width_groups if group.kind == kind)
        for kept in (1, 0):
            values = torch.ones(space.size, dtype=torch.bool)
            values[space.slice(group)] = torch.arange(group.size) < kept
            pruned = slice_unet(UNETS[shape], Architecture(space, values))
            assert as_stock(pruned) is None
    assert export_unet(pruned, tmp_path) == "pruned"
    loaded = PrunedUNet2DConditionModel.from_pretrained(tmp_path)
    assert relative_error(run(loaded), run(pruned)) <= 1e-6


@pytest.mark.parametrize("shape", ONE_NOW)
def test_a_single_layer_removed_has_no_stock_form(shape):
    for group in SPACES[shape].depth_groups:
        if group.kind == "layer":
            assert as_stock(without(shape, group.path)) is None, group.path


@pytest.mark.parametrize(
    ("shape", "paths", "expressible"),
    [
        ("sd1", [*pair("down_blocks.1"), *pair("up_blocks.2")], True),
        ("sd1", [*pair("down_blocks.1"), *pair("up_blocks.2", 2)], False),  # up_blocks.2 would read a wrong skip
        ("sd1", [*pair("down_blocks.0", 0), *pair("up_blocks.3", 1)], True),
        ("sd1", [*pair("down_blocks.0", 0), *pair("up_blocks.3", 2)], True),
        ("sd1", [*pair("down_blocks.1"), *pair("up_blocks.1")], False),  # different levels
        ("sd1", [*pair("down_blocks.1"), "up_blocks.2.resnets.1"], False),
        ("sd1", ["mid_block.resnets.0"], False),
        ("sd1", ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"], True),
        ("sd1", ["down_blocks.3"], True),
        ("sd1", ["down_blocks.2"], True),
        ("sd1", [f"down_blocks.{i}.{k}" for i, k in ((0, "attentions.0"), (0, "attentions.1"))], True),
        ("sd1", ["down_blocks.3.resnets.0", "down_blocks.3.resnets.1", "up_blocks.0.resnets.0"], False),
        (
            "sd1",
            [f"{block}.resnets.{i}" for block in ("down_blocks.3", "up_blocks.0") for i in (0, 1)],
            True,
        ),
        ("sdxl", ["down_blocks.0.resnets.0", "up_blocks.2.resnets.2"], True),
        ("sdxl", [f"{pair(f'down_blocks.{i}')[1]}.transformer_blocks.1" for i in (1, 2)], True),
        ("sdxl", ["mid_block.attentions.0.transformer_blocks.0"], False),
        ("sdxl", [f"{p}.attentions.0.transformer_blocks.0" for p in ("mid_block", "down_blocks.2")], True),
        (
            "sdxl",
            [*pair("down_blocks.2"), *pair("up_blocks.0"), "up_blocks.0.attentions.2.transformer_blocks.0"],
            True,
        ),
    ],
)
def test_which_forms_stock_configs_express(shape, paths, expressible, tmp_path):
    pruned = without(shape, *paths)
    stock = as_stock(pruned)
    assert (stock is not None) == expressible
    if expressible:
        assert_equal(stock, pruned)
        stock.save_pretrained(tmp_path)
        loaded, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert_equal(loaded.eval(), pruned)


@pytest.mark.parametrize("examples", [20, pytest.param(100, marks=pytest.mark.long)])
def test_equal_wherever_there_is_one(examples):
    settings(max_examples=examples, deadline=None)(given(data=st.data(), shape=st.sampled_from(SHAPES))(_equal))()


def _equal(data, shape):
    """Remove random layers of each level and its up block, sometimes also the mid block or one more layer."""
    unet, droppable = UNETS[shape], {group.path for group in discover(UNETS[shape], depth="all").depth_groups}
    removed, num_levels = set(), len(unet.down_blocks)
    for level in range(num_levels):
        for block, layers in ((f"down_blocks.{level}", 2), (f"up_blocks.{num_levels - 1 - level}", 3)):
            for index in range(layers):
                if data.draw(st.integers(0, 3)) == 0:
                    removed |= set(pair(block, index)) & droppable
    if data.draw(st.booleans()):
        removed |= {path for path in droppable if path.startswith("mid_block") and "transformer_blocks" not in path}
    if data.draw(st.integers(0, 3)) == 0:
        removed.add(data.draw(st.sampled_from(sorted(droppable))))
    pruned = without(shape, *removed)
    stock = as_stock(pruned)
    if stock is not None:
        assert_equal(stock, pruned)


@pytest.mark.parametrize("seeds", [range(5), pytest.param(range(5, 20), marks=pytest.mark.long)], ids=len)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_architectures_over_all(shape, seeds):
    space = discover(UNETS[shape], depth="all")
    for seed in seeds:
        values = torch.ones(space.size, dtype=torch.bool)
        values[space.num_width :] = space.random(0.5, seed).values[space.num_width :]
        pruned = slice_unet(UNETS[shape], Architecture(space, values))
        stock = as_stock(pruned)
        if stock is not None:
            assert_equal(stock, pruned)


def test_what_carries_over():
    unet = build("sd2").to(torch.float64).to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())
    unet.requires_grad_(False)
    unet.conv_in.requires_grad_(True)
    pruned = slice_unet(unet.train(), BKSDM(variant="tiny").architecture(unet))
    stock = as_stock(pruned)
    assert stock.training and {parameter.dtype for parameter in stock.parameters()} == {torch.float64}
    assert {type(processor) for processor in stock.attn_processors.values()} == {AttnProcessor}
    names = [name for name, parameter in stock.named_parameters() if parameter.requires_grad]
    assert names == ["conv_in.weight", "conv_in.bias"]
    assert stock.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    before = run(pruned.eval(), dtype=torch.float64)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.zero_()
    assert torch.equal(run(pruned, dtype=torch.float64), before)


def test_the_stock_form_can_be_pruned_again():
    first = as_stock(slice_unet(UNETS["sd1"], BKSDM(variant="2,1,1,1").architecture(UNETS["sd1"])))
    second = as_stock(slice_unet(first, BKSDM(variant="tiny").architecture(first)))
    direct = slice_unet(UNETS["sd1"], BKSDM(variant="tiny").architecture(UNETS["sd1"]))
    assert_equal(second, direct)
