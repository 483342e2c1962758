"""Models without some blocks open without prunekit: as stock models, and as single files in the original layout."""

import itertools
from collections import Counter

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, WanTransformer3DModel, ZImageTransformer2DModel
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from small_transformers import CONFIGS, build, call_of
from unets import relative_error

import prunekit as pk
from prunekit.core.call import predict
from prunekit.core.registry import denoiser_of
from prunekit.export import save_denoiser
from prunekit.export.original_layout import FILE, original_layout, save_single_file
from prunekit.export.verification import Claim, Expected, verify
from prunekit.runtime.errors import UserError
from prunekit.serving.exporting import export

SMALL = {"attention_head_dim": 16, "num_attention_heads": 4, "in_channels": 16}
OTHERS = {  # other classes, with a name of a weight in their original files
    "flux2": (
        Flux2Transformer2DModel,
        {**SMALL, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 4, 4)},
        "double_blocks.1.img_attn.qkv.weight",
    ),
    "wan": (
        WanTransformer3DModel,
        {**SMALL, "num_layers": 2, "out_channels": 16, "text_dim": 32, "freq_dim": 16, "ffn_dim": 64},
        "blocks.1.self_attn.norm_q.weight",
    ),
    "z_image": (
        ZImageTransformer2DModel,
        {"n_layers": 2, "dim": 64, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 32, "axes_dims": [4, 6, 6]},
        "noise_refiner.1.attention.qkv.weight",
    ),
}


def without(model, removed):
    """Return the architecture without the blocks of the given numbers."""
    space = pk.discover(model, "all")
    values = torch.ones(space.size, dtype=torch.bool)
    for index in removed:
        values[space.num_width + index] = False
    return pk.Architecture(space, values)


def masked(model, architecture):
    """Return the outputs of the dense model under the architecture's gates, on random inputs."""
    with pk.gated(model, architecture.space) as gates:
        gates.set(architecture)
        return Expected.of(model, 5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n == "sd3" else ()) for n in CONFIGS])
def test_every_cut_of_whole_blocks_is_a_stock_model(name):
    model = build(name)
    denoiser = denoiser_of(model)
    call, paths = call_of(model), list(denoiser.blocks(model))
    settings = dict(zip(denoiser.lists, denoiser.layers_in_config, strict=True))
    for count in range(1, len(paths) + 1):
        for removed in itertools.combinations(range(len(paths)), count):
            architecture = without(model, removed)
            stock = denoiser.stock(pk.slice_model(model, architecture))
            left = Counter(path.partition(".")[0] for index, path in enumerate(paths) if index not in removed)
            counts = {(setting, left[blocks]) for blocks, setting in settings.items()}
            ends_text = name.startswith("sd3") and len(paths) - 1 in removed and count < len(paths)
            if ends_text or len(counts) > len(set(settings.values())):  # one setting cannot express two counts
                assert stock is None
                continue
            assert type(stock) is type(model) and "pruning" not in stock.config
            assert len(denoiser_of(stock).blocks(stock)) == len(paths) - count
            with torch.no_grad(), pk.gated(model, architecture.space) as gates:
                gates.set(architecture)
                assert relative_error(predict(stock, call), predict(model, call)) <= 1e-6
    if name == "sd35":
        assert build(name).config.dual_attention_layers == (0, 1)
        assert denoiser_of(model).stock(pk.slice_model(model, without(model, [0]))).config.dual_attention_layers == (0,)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_carries_over(name):
    model = build(name).double().train()
    paths, blocks = list(denoiser_of(model).blocks(model)), denoiser_of(model).lists[-1]
    first = f"{blocks}.0"
    model.get_submodule(f"{blocks}.1").requires_grad_(False)
    pruned = pk.slice_model(model, without(model, [paths.index(first)]))
    stock = denoiser_of(model).stock(pruned)
    assert stock.training and stock.dtype == torch.float64
    frozen = {name for name, parameter in stock.named_parameters() if not parameter.requires_grad}
    assert frozen and all(name.startswith(first + ".") for name in frozen)
    before = {key: value.clone() for key, value in pruned.state_dict().items()}
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in pruned.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_width_cut_is_no_stock_model(name, tmp_path):
    model = build(name)
    space = pk.discover(model, "all")
    for kind in ("attention", "feedforward"):
        group = next(group for group in space.width_groups if group.kind == kind)
        for kept in (1, 0):
            values = torch.ones(space.size, dtype=torch.bool)
            values[space.slice(group)] = torch.arange(group.size) < kept
            pruned = pk.slice_model(model, pk.Architecture(space, values))
            assert denoiser_of(model).stock(pruned) is None
    with pytest.raises(UserError, match="no stock config expresses this cut"):
        save_single_file(pruned, tmp_path)


def test_they_open_in_a_fresh_process_without_prunekit(tmp_path):
    claims = []
    for name, removed in {"sd3": [0], "sd35": [0], "flux": [0, 3], "qwen_image": [1, 2], "pixart": [0, 2]}.items():
        model = build(name)
        architecture = without(model, removed)
        pruned, expected = pk.slice_model(model, architecture), masked(model, architecture)
        assert save_denoiser(pruned, tmp_path / name)["tier"] == "stock"
        claims.append(Claim("stock", name, tmp_path / name, expected, with_prunekit=False))
        if name not in ("flux", "pixart"):
            save_single_file(pruned, tmp_path / f"{name} file")
            claims.append(Claim("single-file", name, tmp_path / f"{name} file", expected, with_prunekit=False))
    assert max(line["relative_error"] for line in verify(claims)) <= 1e-5


@pytest.mark.parametrize("name", ["sd3", "sd35", "qwen_image"])
def test_a_single_file_gives_every_bit_back(name, tmp_path):
    model = build(name)
    stock = denoiser_of(model).stock(pk.slice_model(model, without(model, [0])))
    save_single_file(stock, tmp_path)
    read = type(stock).from_single_file(str(tmp_path / FILE), config=str(tmp_path), local_files_only=True)
    assert_equal(read.state_dict(), stock.state_dict())


@pytest.mark.parametrize("name", OTHERS)
def test_the_layouts_of_other_classes(name):
    kind, config, expected = OTHERS[name]
    model = kind(**config)
    convert = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"]
    tensors = original_layout(model)
    assert expected in tensors
    assert_equal(convert(checkpoint=tensors, config={}), model.state_dict())


def test_flux_has_the_width_that_diffusers_reads(tmp_path):
    with pytest.raises(UserError, match="does not take this FluxTransformer2DModel") as error:
        original_layout(build("flux"))
    assert "\n" not in str(error.value)
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=3, guidance_embeds=True)
    shapes = {key: tuple(value.shape) for key, value in original_layout(model).items()}
    assert shapes["single_blocks.2.linear1.weight"] == (3 * 3072 + 4 * 3072, 3072)
    assert (
        shapes["double_blocks.1.txt_attn.qkv.bias"] == (3 * 3072,) and "double_blocks.2.img_mod.lin.bias" not in shapes
    )


@pytest.mark.long
def test_a_file_of_flux_gives_every_bit_back(tmp_path):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).half()
    save_single_file(model, tmp_path)
    read = FluxTransformer2DModel.from_single_file(str(tmp_path / FILE), config=str(tmp_path), local_files_only=True)
    assert_equal(read.state_dict(), model.state_dict())


@pytest.mark.long
def test_the_command_writes_a_single_file(tmp_path):
    model = build("sd35")
    save_denoiser(pk.slice_model(model, without(model, [1])), tmp_path / "cut", "class")
    exported = export(tmp_path / "cut", tmp_path / "one", "single-file")
    assert exported.tiers == ["single-file"] and len(exported.checked) == 1
    assert "from_single_file" in (tmp_path / "one" / "README.md").read_text()
    save_denoiser(pk.slice_model(model, without(model, [2])), tmp_path / "last", "class")
    with pytest.raises(UserError, match="all but the last"):
        export(tmp_path / "last", tmp_path / "two", "single-file")
    assert not (tmp_path / "two").exists()
    save_denoiser(build("pixart"), tmp_path / "pixart")
    with pytest.raises(UserError, match="of a PixArtTransformer2DModel, use tier stock"):
        export(tmp_path / "pixart", tmp_path / "two", "single-file")


def assert_equal(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())
