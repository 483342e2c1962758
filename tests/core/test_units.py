import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from unets import SHAPES, build

from prunekit import Architecture, UnitSpace, discover, slice_unet

SD21 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
PAPERS_DEPTH_UNITS = [
    "down_blocks.0.resnets.1",
    "down_blocks.0.attentions.1",
    "down_blocks.1.resnets.1",
    "down_blocks.1.attentions.1",
    "down_blocks.2.resnets.1",
    "down_blocks.2.attentions.1",
    "down_blocks.3.resnets.1",
    "up_blocks.0.resnets.2",
    "up_blocks.1.resnets.2",
    "up_blocks.1.attentions.2",
    "up_blocks.2.resnets.2",
    "up_blocks.2.attentions.2",
    "up_blocks.3.resnets.2",
    "up_blocks.3.attentions.2",
]


def stock(**config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def sdxl():
    return stock(
        block_out_channels=[320, 640, 1280],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def depth_paths(unet, depth, kind="layer"):
    return [group.path for group in discover(unet, depth=depth).depth_groups if group.kind == kind]


def test_sd21_has_the_papers_1620_units():
    space = discover(stock(**SD21))
    assert (space.num_width, space.num_depth, space.size) == (1606, 14, 1620)
    by_kind = {kind: sum(g.size for g in space.groups if g.kind == kind) for kind in ("resnet", "attention")}
    assert by_kind == {"resnet": 704, "attention": 390}
    feedforwards = [group for group in space.groups if group.kind == "feedforward"]
    assert [group.size for group in feedforwards] == [32] * 16
    assert [group.path for group in space.depth_groups] == PAPERS_DEPTH_UNITS
    assert [group.is_depth for group in space.groups] == [False] * 70 + [True] * 14


def test_the_order_is_the_forward_pass():
    names = [group.name for group in discover(build("sd2", "meta"), depth="blocks").groups]
    assert names[:4] == [
        "resnet:down_blocks.0.resnets.0",
        "attention:down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "attention:down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "feedforward:down_blocks.0.attentions.0.transformer_blocks.0.ff",
    ]
    assert names[-1] == "stage:down_blocks.3"
    places = [
        [part.split(".")[0] for part in ("down_blocks", "mid_block", "up_blocks")].index(
            name.split(":")[1].split(".")[0]
        )
        for name in names[:70]
    ]
    assert places == sorted(places)


def test_layers_that_can_go_follow_from_carried_widths():
    unet = stock(**SD21)
    layers = depth_paths(unet, "all")
    assert len([path for path in layers if "resnets" in path]) == 18
    assert len([path for path in layers if "attentions" in path]) == 16
    resnets = {name for name, module in unet.named_modules() if type(module).__name__ == "ResnetBlock2D"}
    cannot = {f"{block}.resnets.0" for block in ("down_blocks.1", "down_blocks.2", "up_blocks.2", "up_blocks.3")}
    assert resnets - set(layers) == cannot
    assert len(depth_paths(build("sd1", "meta"), "all")) == 36  # channels (32, 64, 64, 64); SD's list would be wrong


def test_sdxl():
    unet = sdxl()
    assert discover(unet).num_depth == 10
    layers = depth_paths(unet, "all")
    assert len([path for path in layers if "resnets" in path]) == 13
    assert len([path for path in layers if "attentions" in path]) == 11
    assert len(depth_paths(unet, "all", "block")) == 70
    assert depth_paths(unet, "blocks", "stage") == []


def test_stages():
    (stage,) = [group for group in discover(stock(**SD21), depth="blocks").groups if group.kind == "stage"]
    assert stage.covers == ("down_blocks.2.downsamplers.0", "down_blocks.3", "mid_block", "up_blocks.0")
    assert depth_paths(build("sd1", "meta"), "blocks", "stage") == ["down_blocks.2", "down_blocks.3"]


def test_a_bksdm_unet_has_only_legal_depth_units():
    base = stock(layers_per_block=1)
    layers = depth_paths(base, "aptp")
    assert "down_blocks.1.resnets.0" not in layers
    assert "down_blocks.2.resnets.0" not in layers
    assert len(depth_paths(base, "all")) == 20


def test_include_and_exclude():
    unet = build("sd2", "meta")
    down = discover(unet, include="down_blocks.*")
    assert {group.path.split(".")[0] for group in down.groups} == {"down_blocks"}
    without = discover(unet, include=["*.attn1", "*.attn2"], exclude="*.attn2")
    assert {group.path.rpartition(".")[2] for group in without.groups} == {"attn1"}
    with pytest.raises(ValueError, match=r"'down_block\.\*' matches no module path\. Near names: down_blocks"):
        discover(unet, include="down_block.*")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"num_class_embeds": 10}, "num_class_embeds"),
        ({"mid_block_type": "UNetMidBlock2D"}, "UNetMidBlock2D"),
        (
            {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["ResnetDownsampleBlock2D"]},
            "ResnetDownsampleBlock2D",
        ),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
    ],
)
def test_models_that_are_not_supported_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        discover(build("sd1", "meta", **overrides))
    assert "prunekit supports UNet2DConditionModel" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_classes_and_policies_are_refused():
    with pytest.raises(ValueError, match="AutoencoderKL is not supported"):
        discover(AutoencoderKL())
    with pytest.raises(ValueError, match="choose one of 'aptp', 'all', 'blocks', 'none'"):
        discover(build("sd1", "meta"), depth="some")


def test_an_adapter_in_a_layers_place_is_refused():
    unet = build("sd2", "meta")
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.to_out[0] = torch.nn.Sequential(attention.to_out[0])
    with pytest.raises(ValueError, match=r"attn1 holds a Sequential.*LoRA"):
        discover(unet)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_under_a_removed_layer_are_ignored(shape):
    space = discover(build(shape, "meta"), depth="all")
    values = torch.ones(space.size, dtype=torch.bool)
    layer = next(group for group in space.depth_groups if "attentions" in group.path)
    values[space.slice(layer)] = False
    other = values.clone()
    under = [group for group in space.width_groups if group.path.startswith(layer.path)]
    other[space.slice(under[0])] = False
    a, b = Architecture(space, values), Architecture(space, other)
    assert a == b
    assert hash(a) == hash(b)
    assert a != space.full()
    assert a.kept(under[0].name) == []
    assert [group.path for group in a.removed()] == [layer.path]


def test_a_stage_hides_what_lies_in_it():
    space = discover(build("sd1", "meta"), depth="blocks")
    values = torch.ones(space.size, dtype=torch.bool)
    values[space.slice("stage:down_blocks.2")] = False
    outer = Architecture(space, values)
    values[space.slice("stage:down_blocks.3")] = False
    values[space.slice("layer:mid_block.resnets.0")] = False
    assert Architecture(space, values) == outer
    assert [group.path for group in Architecture(space, values).removed()] == ["down_blocks.2"]


def test_saved_and_loaded(tmp_path):
    unet = build("sd2", "meta")
    space = discover(unet, depth="blocks")
    boolean = space.random(0.5, seed=4)
    boolean.save(tmp_path / "a.json")
    assert Architecture.load(tmp_path / "a.json") == boolean
    assert Architecture.load(tmp_path / "a.json", discover(build("sd2", "meta"), depth="blocks")) == boolean
    soft = Architecture(space, torch.rand(space.size))
    assert Architecture.from_dict(soft.to_dict(), space) == soft
    assert soft.threshold(0.5) == Architecture(space, soft.values > 0.5)
    with pytest.raises(ValueError, match=r"'stage:down_blocks\.3' is missing here"):
        Architecture.load(tmp_path / "a.json", discover(unet, depth="all"))
    with pytest.raises(ValueError, match="format: 2"):
        Architecture.from_dict({**boolean.to_dict(), "format": 2})
    assert UnitSpace.from_dict(space.to_dict()) == space


def test_random_is_bernoulli_and_seeded():
    space = discover(stock(**SD21))
    assert space.random(0.7, seed=1) == space.random(0.7, seed=1)
    assert space.random(0.7, seed=1) != space.random(0.7, seed=2)
    assert space.random(0.7, seed=1).values.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert space.random(1.0) == space.full()


def test_bad_values_are_refused():
    space = discover(build("sd2", "meta"))
    with pytest.raises(ValueError, match=f"has {space.size} values"):
        Architecture(space, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Architecture(space, torch.full((space.size,), 1.5))
    with pytest.raises(ValueError, match="is soft"):
        Architecture(space, torch.rand(space.size)).kept(space.groups[0].name)
    with pytest.raises(ValueError, match=r"Near names: resnet:down_blocks\.0\.resnets\.0"):
        space.full().kept("resnet:down_blocks.0.resnet.0")


def test_a_pruned_unet_is_discovered():
    unet = build("sd2", "meta")
    space = discover(unet, depth="blocks")
    values = torch.ones(space.size, dtype=torch.bool)
    head = space.slice("attention:mid_block.attentions.0.transformer_blocks.0.attn1")
    feedforward = space.slice("feedforward:mid_block.attentions.0.transformer_blocks.0.ff")
    values[head.start] = False
    values[feedforward.start : feedforward.start + 5] = False
    values[space.slice("resnet:down_blocks.0.resnets.0")] = False
    values[space.slice("layer:up_blocks.1.resnets.1")] = False
    pruned = discover(slice_unet(unet, Architecture(space, values)), depth="blocks")
    assert pruned.group("attention:mid_block.attentions.0.transformer_blocks.0.attn1").size == 5
    assert pruned.group("feedforward:mid_block.attentions.0.transformer_blocks.0.ff").size == 27
    names = {group.name for group in pruned.groups}
    assert {group.name for group in space.groups} - names == {
        "resnet:down_blocks.0.resnets.0",
        "resnet:up_blocks.1.resnets.1",
        "layer:up_blocks.1.resnets.1",
    }


def test_describe():
    space = discover(build("sd2", "meta"))
    rows = space.random(0.5, seed=0).describe()
    assert [row["name"] for row in rows] == [group.name for group in space.groups]
    assert all(row["kept"] == 0 for row in rows if row["removed"])
    assert any(row["removed"] for row in rows)
    assert rows[0]["block"] == "down_blocks.0"
    assert sum(row["total"] for row in rows) == space.size
