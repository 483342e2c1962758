import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from unets import CONFIGS, build, inputs, relative_error

from prunekit import Architecture, CostModel, discover, gated, slice_unet
from prunekit.methods import BKSDM, PruneResult
from prunekit.methods.budget import budget_of
from prunekit.models import load_shape

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "unet_macs.json").read_text())["models"]
NAMED = ("base", "small", "tiny")
SIZES = (16, 12, 10, (10, 9))


@pytest.fixture(scope="module")
def sd14():
    return load_shape("sd-1.4").denoiser


def published(shape, variant):
    """Return BK-SDM's config: one layer per block; Small and Tiny have no mid block, and Tiny no innermost level."""
    levels = 3 if variant == "tiny" else 4
    config = {**CONFIGS[shape], "block_out_channels": CONFIGS[shape]["block_out_channels"][:levels]}
    if isinstance(config["attention_head_dim"], list):
        config["attention_head_dim"] = config["attention_head_dim"][:levels]
    cross = "CrossAttn{}Block2D".format
    plain = levels - 3
    return {
        **config,
        "layers_per_block": 1,
        "down_block_types": [cross("Down")] * 3 + ["DownBlock2D"] * plain,
        "up_block_types": ["UpBlock2D"] * plain + [cross("Up")] * 3,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if variant == "base" else None,
    }


def copied(unet, stock, variant):
    """Copy weights as BK-SDM does: the first layer of a down block, and the first and third layer of an up block."""

    def source(key):
        parts = key.split(".")
        if parts[0] == "up_blocks":
            parts[1] = str(int(parts[1]) + (variant == "tiny"))
            if parts[2] in ("resnets", "attentions"):
                parts[3] = {"0": "0", "1": "2"}[parts[3]]
        return ".".join(parts)

    state = unet.state_dict()
    stock.load_state_dict({key: state[source(key)] for key in stock.state_dict()})
    return stock


def output(unet, size):
    with torch.no_grad():
        return unet(**inputs(unet, size=size)).sample


@pytest.mark.parametrize("variant", NAMED)
def test_published_counts(variant, sd14):
    architecture = BKSDM(variant=variant).architecture(sd14)
    sliced, golden = slice_unet(sd14, architecture), GOLDENS[f"bk-sdm-{variant}"]
    assert sum(parameter.numel() for parameter in sliced.parameters()) == golden["params"]
    for convention in ("exact", "conv_linear"):
        cost = CostModel(sd14, architecture.space, golden["latent"], 77, convention)
        assert cost.macs(architecture) == golden[convention]
        assert cost.params(architecture) == golden["params"]
        empty = discover(sliced, depth="none")
        assert CostModel(sliced, empty, golden["latent"], 77, convention).dense_macs == golden[convention]


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
@pytest.mark.parametrize("variant", NAMED)
def test_is_the_published_model(shape, variant):
    unet = build(shape)
    stock = copied(unet, UNet2DConditionModel(sample_size=16, **published(shape, variant)).eval(), variant)
    architecture = BKSDM(variant=variant).architecture(unet)
    sliced = slice_unet(unet, architecture)
    for size in SIZES:
        expected = output(stock, size)
        assert relative_error(output(sliced, size), expected) <= 1e-5
        with gated(unet, architecture.space) as gates:
            gates.set(architecture)
            assert relative_error(output(unet, size), expected) <= 1e-5


def test_the_family():
    members = BKSDM().members(build("sd1", "meta"))
    assert tuple(members)[:3] == NAMED and len(members) == 2 * 2**4 - 1 + 1
    assert len(set(members.values())) == len(members)
    assert "1,1,1,1" not in members and "2,2,2,2" not in members and "2,2,2,2-mid" in members
    removed = {group.path for group in members["2,1,2,2-mid"].removed()}
    pairs = {f"{block}.{kind}.1" for block in ("down_blocks.1", "up_blocks.2") for kind in ("resnets", "attentions")}
    assert removed == pairs | {"mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"}
    assert all(architecture.is_boolean for architecture in members.values())


def test_the_family_of_other_shapes():
    xl = BKSDM().members(build("sdxl", "meta"))
    assert tuple(xl)[:2] == ("base", "small") and "tiny" not in xl and "1,2,1" in xl and len(xl) == 2 * 2**3 - 1
    removed = {group.path for group in xl["1,2,2"].removed()}
    assert removed == {"down_blocks.0.resnets.1", "up_blocks.2.resnets.1"}
    assert tuple(BKSDM().members(build("sd1", "meta", layers_per_block=1))) == ("small", "tiny")
    mixed = build("sd1", "meta", layers_per_block=[2, 1, 1, 1])
    assert tuple(BKSDM().members(mixed)) == ("base", "small", "tiny", "2,1,1,1-mid")
    with pytest.raises(ValueError, match="one or two layers in every down block; this one has 3,3,3,3"):
        BKSDM().members(build("sd1", "meta", layers_per_block=3))
    no_mid = BKSDM().members(build("sd1", "meta", mid_block_type=None))
    assert "small" not in no_mid and "tiny" in no_mid


def test_include_and_exclude_limit_the_family():
    unet = build("sd1", "meta")
    assert set(BKSDM(exclude="mid_block.*").members(unet)) & {"small", "tiny"} == set()
    without = BKSDM(exclude="down_blocks.0.attentions.1").members(unet)
    assert "base" not in without and "2,1,1,1" in without and all(name[0] == "2" for name in without)
    for variant in (None, "tiny"):
        with pytest.raises(ValueError, match=r"^BK-SDM's rule cannot remove anything from this UNet$"):
            BKSDM(include="down_blocks.0.resnets.1", variant=variant).prune(unet)


@pytest.mark.parametrize("depth", ["aptp", "all", "blocks", "none"])
def test_depth_does_not_apply(depth):
    unet = build("sd2", "meta")
    result = BKSDM(depth=depth).prune(unet)
    assert result.space == discover(unet, depth="blocks") and result.info.settings["depth"] == "blocks"
    assert result.architectures == BKSDM().prune(unet).architectures
    with pytest.raises(ValidationError, match="'aptp', 'all', 'blocks' or 'none'"):
        BKSDM(depth="deep")


@pytest.mark.parametrize("shape", ["sd1", "sd2", "sdxl"])
def test_largest_member_at_or_below_the_budget(shape):
    unet = build(shape, "meta")
    members = BKSDM().members(unet)
    cost = CostModel(unet, next(iter(members.values())).space)
    dense = cost.dense_macs
    macs = sorted({cost.macs(member) for member in members.values()})
    for low, high in list(zip(macs, [*macs[1:], dense], strict=True))[:: len(macs) // 6]:
        for budget in (budget_of(low, dense), budget_of(high - 1, dense)):
            result = BKSDM(budget=budget).prune(unet)
            assert result.info.macs == [low] == [cost.macs(result.architectures[0])]
            assert members[result.info.variant] == result.architectures[0]
        assert BKSDM(budget=budget).architecture(unet) == result.architectures[0]


@pytest.mark.parametrize("budget", [0.6, 0.01])
def test_below_the_smallest(budget, sd14):
    with pytest.raises(ValueError, match=r"nearest are 'tiny' at 0\.6044, 'small' at 0\.6360, .* of the dense MACs"):
        BKSDM(budget=budget).prune(sd14)


def test_a_fixed_variant_and_the_budget(sd14):
    assert BKSDM(variant="2,2,2,1").prune(sd14).info.variant == "2,2,2,1"
    assert BKSDM(variant="base", budget=0.7).prune(sd14).info.ratio == pytest.approx([0.6511], abs=1e-4)
    with pytest.raises(ValueError, match=r"variant='base' costs 0\.6511 of the dense UNet, above budget=0\.65;"):
        BKSDM(variant="base", budget=0.65).prune(sd14)
    assert BKSDM(variant="base", budget=0.65).architecture(sd14) == BKSDM(variant="base").architecture(sd14)


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("Base", "base"),
        ("1,1,1,1", "base"),
        ([1, 1, 1, 1], "base"),
        ("1, 1, 1, 1-mid", "small"),
        ((2, 1, 1, 1), "2,1,1,1"),
        ("2,1,2,1-mid", "2,1,2,1-mid"),
    ],
)
def test_ways_to_write_a_variant(variant, name):
    unet = build("sd1", "meta")
    assert BKSDM(variant=variant).architecture(unet) == BKSDM().members(unet)[name]
    assert BKSDM(variant=variant).prune(unet).info.variant == name


@pytest.mark.parametrize("variant", ["basic", "2,1,1,1-stage", "2;1", "", [2, "x"]])
def test_an_unknown_variant_is_refused(variant):
    with pytest.raises(ValidationError, match="choose 'base', 'small', 'tiny', or the layers per down block"):
        BKSDM(variant=variant)


@pytest.mark.parametrize(
    ("shape", "variant"), [("sdxl", "tiny"), ("sd1", "1,1,1"), ("sd1", "3,1,1,1"), ("sd1", "2,2,2,2"), ("sdxl", "1,1")]
)
def test_a_variant_that_the_unet_cannot_have(shape, variant):
    with pytest.raises(ValueError, match=f"variant='{variant}' is not possible on this UNet.* It has: base; small; "):
        BKSDM(variant=variant).architecture(build(shape, "meta"))


def test_result_is_saved(tmp_path):
    unet = build("sd1")
    result = BKSDM(variant="small").prune(unet, directory=tmp_path)
    loaded = PruneResult.load(tmp_path, unet)
    assert loaded.architectures == result.architectures and loaded.info == result.info
    assert isinstance(result.architectures[0], Architecture) and result.info.variant == "small"


def test_own_distillation():
    assert BKSDM().fine_tuning() == {}
    expected = {"denoising_weight": 1.0, "distillation_weight": 1.0, "feature_blocks": "down_up", "snr_gamma": None}
    assert BKSDM(own_distillation=True).fine_tuning() == expected
