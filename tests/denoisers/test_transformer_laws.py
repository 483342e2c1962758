"""The core's laws hold for every transformer: masked equals sliced, costs are exact, a saved model loads unchanged."""

import fnmatch
import os

import pytest
import torch
from small_transformers import CONFIGS, UNITS, build, call_of, double_throughout
from torch.utils.flop_counter import FlopCounterMode
from unets import relative_error, with_empty_groups

import prunekit as pk
from prunekit.core.call import predict
from prunekit.core.discovery import width_layers
from prunekit.core.registry import denoiser_of
from prunekit.core.slicing import cut
from prunekit.denoisers.flux2.denoiser import ENTRY, EXIT
from prunekit.denoisers.joint import pack, unpack
from prunekit.runtime.errors import UserError

MODELS = {}
KEEPS = (0.2, 0.5, 0.8, 0.95)
UNFUSED = ("qwen_image", "z_image", "sana", "sana15", "cogview4")  # models whose attentions diffusers does not fuse
COUNTS = (12, pytest.param(int(os.environ.get("PRUNEKIT_ARCHITECTURES", "50")), marks=pytest.mark.long))


def model_of(name, device="cpu"):
    if (name, device) not in MODELS:
        MODELS[name, device] = build(name, device)
    return MODELS[name, device]


def architecture_of(space, seed):
    """Return a random architecture; for every third seed, about a tenth of its groups are empty."""
    architecture = space.random(KEEPS[seed % 4], seed)
    return with_empty_groups(architecture, seed) if seed % 3 == 0 else architecture


def extremes(space):
    """Return architectures with all groups empty, without any block, and without the last block."""
    values = torch.ones(3, space.size, dtype=torch.bool)
    values[0, : space.num_width] = False
    values[1, space.num_width :] = False
    values[2, -1] = False
    return [pk.Architecture(space, row) for row in values]


def flops(model, latent, text_length):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(model, call_of(model, 1, latent, text_length))
    return counter.get_total_flops()


def check_laws(name, architecture, latent=(8, 6), text_length=5):
    """Check that masked equals sliced and that both costs are exact; return the sliced model, its output and call."""
    model, call = model_of(name), call_of(model_of(name), 2, latent, text_length)
    pruned = pk.slice_model(model, architecture)
    with torch.no_grad():
        with pk.gated(model, architecture.space) as gates:
            gates.set(architecture)
            masked = predict(model, call)
        sliced = predict(pruned, call)
    assert relative_error(masked, sliced) <= 1e-6
    cost = pk.CostModel(model, architecture.space, latent, text_length)
    assert cost.params(architecture) == sum(parameter.numel() for parameter in pruned.parameters())
    shape = pk.slice_model(model_of(name, "meta"), architecture)
    assert 2 * cost.macs(architecture) == flops(shape, latent, text_length)
    return pruned, sliced, call


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_found(name):
    space = pk.discover(model_of(name), "all")
    assert (space.num_width, space.num_depth) == UNITS[name]
    assert pk.discover(model_of(name, "meta"), "all") == space
    assert pk.discover(model_of(name), "none").num_depth == 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_random_architectures(name, count):
    space = pk.discover(model_of(name), "all")
    for seed in range(count):
        latent, text_length = ((8, 6), (4, 8), (8, 8))[seed % 3], (5, 1, 9)[seed % 3]
        check_laws(name, architecture_of(space, seed), latent, text_length)


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", CONFIGS)
def test_extremes(name, index):
    architecture = extremes(pk.discover(model_of(name), "all"))[index]
    _, sliced, call = check_laws(name, architecture)
    with torch.no_grad():
        assert relative_error(predict(model_of(name), call), sliced) > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cut_is_saved_loaded_and_cut_again(name, tmp_path):
    model = model_of(name)
    space, call = pk.discover(model, "all"), call_of(model_of(name))
    for seed, first in ((0, architecture_of(space, 0)), (1, architecture_of(space, 1)), (2, extremes(space)[0])):
        pruned = pk.slice_model(model, first)
        folder = tmp_path / str(seed)
        pruned.save_pretrained(folder)
        loaded = type(pruned).from_pretrained(folder)
        state = pruned.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
        with torch.no_grad():
            assert relative_error(predict(loaded, call), predict(pruned, call)) <= 1e-6
        # two successive cuts, and a single cut to the same architecture
        left = pk.discover(loaded, "all")
        second = left.random(0.7, seed)
        twice = pk.slice_model(loaded, second)
        values = torch.zeros(space.size, dtype=torch.bool)
        for group in left.groups:
            units = [group.name] if group.is_depth else first.kept(group.name)
            kept = second.kept(group.name)
            part = space.slice(group.name)
            if group.is_depth:
                values[part] = bool(kept)
            else:
                values[[part.start + units[unit] for unit in kept]] = True
        once = pk.slice_model(model, pk.Architecture(space, values))
        assert twice.config.pruning == once.config.pruning
        assert twice.state_dict().keys() == once.state_dict().keys()
        with torch.no_grad():
            assert relative_error(predict(twice, call), predict(once, call)) <= 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_each_sample_under_its_own_row(name):
    model = model_of(name)
    space, call = pk.discover(model, "all"), call_of(model_of(name), 3)
    soft = torch.rand(2, space.size, generator=torch.Generator().manual_seed(3))
    soft[1] = (soft[1] > 0.4).float()
    rows = torch.tensor([1, 0, 1])
    with torch.no_grad(), pk.gated(model, space) as gates:
        gates.set(soft, rows)
        together = predict(model, call)
        for sample, row in enumerate(rows.tolist()):
            gates.set(soft[row])
            one = slice(sample, sample + 1)
            assert relative_error(together[one], predict(model, call.take(one))) <= 5e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_gates_are_differentiable_also_recomputed(name, monkeypatch):
    double_throughout(monkeypatch)
    model = build(name).double().requires_grad_(False)
    space, call = pk.discover(model, "all"), call_of(model).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(2)
    soft = torch.rand(space.size, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(predict(model, call).shape, generator=generator, dtype=torch.float64)
    with pk.gated(model, space) as gates:

        def value(vector):
            gates.set(vector)
            return (predict(model, call) * weight).sum()

        (gradient,) = torch.autograd.grad(value(soft), soft)
        units = [*torch.randperm(space.size, generator=generator)[:12].tolist(), space.size - 1, space.size - 2]
        largest = gradient.abs().max().item()
        for unit in units:
            step = torch.zeros_like(soft)
            step[unit] = 1e-5
            with torch.no_grad():
                slope = (value(soft + step) - value(soft - step)) / 2e-5
            assert abs(gradient[unit].item() - slope.item()) <= 1e-8 * largest
        model.enable_gradient_checkpointing()
        model.train()
        (recomputed,) = torch.autograd.grad(value(soft), soft)
        assert torch.equal(recomputed, gradient)


@pytest.mark.parametrize("seed", range(3))
def test_a_bias_that_two_groups_share_is_counted_once(seed):
    model = build("flux2", "meta")
    for block in model.single_transformer_blocks:  # diffusers creates these layers without a bias
        for name in (ENTRY, EXIT):
            layer = getattr(block.attn, name)
            setattr(block.attn, name, torch.nn.Linear(layer.in_features, layer.out_features, device="meta"))
    space = pk.discover(model)
    cost, architecture = pk.CostModel(model, space, (8, 6)), architecture_of(space, seed)
    assert cost.dense_params == sum(parameter.numel() for parameter in model.parameters())
    cut(denoiser_of(model), model, architecture)
    assert cost.params(architecture) == sum(parameter.numel() for parameter in model.parameters())


def test_streams_pass_on_in_the_order_of_a_blocks_outputs():
    """Image and text have equal shapes here, so a wrong order would raise no error."""
    for name in ("sd3", "flux", "flux2", "qwen_image"):
        model = model_of(name)
        space = pk.discover(model, "all")
        check_laws(
            name, extremes(space)[1], (8, 4) if name != "qwen_image" else (4, 4), 8 if name != "qwen_image" else 4
        )


PLANNED = [name for name in CONFIGS if getattr(CONFIGS[name][0], "_tp_plan", None)]


@pytest.mark.parametrize("name", PLANNED)
def test_axes_are_those_of_tensor_parallelism(name):
    """Units own the channels that diffusers' tensor parallelism splits over devices."""
    model, sides = model_of(name), {}
    for layer in width_layers(model).values():
        for axis in layer.axes:
            sides[f"{layer.path}.{axis.layer}"] = axis.side
    plan = {
        path: "in" if "row" in (style if isinstance(style, str) else type(style).__name__).lower() else "out"
        for path, _ in model.named_modules()
        for pattern, style in type(model)._tp_plan.items()
        if fnmatch.fnmatchcase(path, pattern)
    }
    assert len(PLANNED) >= 2 and sides == plan


def test_packing_is_the_pipelines():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 8, 6)
    tokens, rows, columns = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 4, 8, 6))
    assert (rows, columns) == (4, 3) and torch.equal(unpack(tokens, rows, columns), latents)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_cannot_be_right_is_refused(name):
    model = build(name)
    attention = next(module for module in model.modules() if hasattr(module, "set_processor"))

    class Foreign:
        pass

    attention.processor = Foreign()
    with pytest.raises(UserError, match=r"\.0\.att.* has the processor Foreign"):
        pk.discover(model, "all")
    model = build(name)
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()
    if any(getattr(module, "fused_projections", False) for module in model.modules()):
        with pytest.raises(UserError, match=r"processor|fused"):
            pk.discover(model, "all")
    else:  # diffusers does not fuse these models' projections
        assert name in UNFUSED and model.state_dict().keys() == model_of(name).state_dict().keys()
    model = build(name)
    attention = next(module for module in model.modules() if hasattr(module, "to_q"))
    attention.to_q = torch.nn.Sequential(attention.to_q)
    with pytest.raises(UserError, match="holds a Sequential where a plain layer is expected"):
        pk.discover(model, "all")


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_build_or_are_refused(name):
    model = model_of(name)
    denoiser, config = denoiser_of(model), dict(model.config)
    built = denoiser.from_config(config, "a folder")
    assert type(built) is type(model) and next(built.parameters()).is_meta
    pruned = pk.slice_model(model, pk.discover(model, "all").random(0.6, 1))
    assert type(denoiser.from_config(dict(pruned.config), "a folder")) is type(pruned)
    layers, heads = denoiser.layers_in_config[0], "n_heads" if "n_heads" in config else "num_attention_heads"
    for change, message in (((layers, 10**9), f"{layers} has"), ((heads, "many"), "builds no")):
        with pytest.raises(UserError, match=message):
            denoiser.from_config({**config, change[0]: change[1]}, "a folder")


def test_an_ip_adapter_that_does_not_fit_is_refused_by_name():
    model = build("flux")
    cut = pk.slice_unet(model, pk.discover(model, "none").random(0.5, 0))
    with pytest.raises(UserError, match=r"transformer_blocks\.0\.attn.* lost some") as error:
        cut._load_ip_adapter_weights([{}])
    assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "feedforward"])
def test_a_norm_behind_a_branch_divides_a_common_factor_out(kind):
    """In Z-Image, only the ratios of a branch's gates matter; if all gates are 0, the branch vanishes."""
    model = model_of("z_image")
    space, call = pk.discover(model, "none"), call_of(model_of("z_image"))
    group = next(group for group in space.groups if group.kind == kind and group.path.startswith("layers.0"))
    part, dense = space.slice(group), predict(model, call)

    def change(gates_of_group):
        values = torch.ones(space.size)
        values[part] = gates_of_group
        with pk.gated(model, space) as gates:
            gates.set(values)
            return relative_error(predict(model, call), dense)

    mixed = torch.linspace(1.0, 0.2, group.size)
    assert change(torch.tensor(0.5)) < 0.1 * change(mixed) < 0.1 * change(torch.tensor(0.0))


REFUSED = {  # unsupported settings, and a part of the error message
    "wan": [
        ({"added_kv_proj_dim": 16}, "added_kv_proj_dim=16 .*image to video.*added keys and values"),
        ({"image_dim": 16}, "image_dim=16 .*image to video"),
        ({"patch_size": (2, 2, 2)}, "patches of 2 frames"),
    ],
    "sana": [
        ({"guidance_embeds": True}, "guidance_embeds=true .*Sprint"),
        ({"timestep_scale": 1000.0}, r"timestep_scale=1000\.0"),
        ({"qk_norm": "layer_norm_across_heads"}, "qk_norm='layer_norm_across_heads'"),
        ({"cross_attention_dim": None}, "without cross-attention"),
    ],
}


@pytest.mark.parametrize(("name", "change", "message"), [(n, *case) for n, cases in REFUSED.items() for case in cases])
def test_variants_without_proof_are_refused_by_name(name, change, message):
    with pytest.raises(UserError, match=message) as error:
        pk.discover(build(name, "meta", **change), "all")
    assert "\n" not in str(error.value)


def test_a_picture_is_a_video_of_one_frame():
    model, call = model_of("wan"), call_of(model_of("wan"))
    assert call["hidden_states"].shape == (2, 4, 1, 8, 6) and denoiser_of(model).noisy(call).shape == (2, 4, 8, 6)
    with torch.no_grad():
        video = model(**call).sample
        assert torch.equal(predict(model, call), video[:, :, 0])
