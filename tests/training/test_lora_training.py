"""Adapters attach to a pruned UNet's layers; if a named layer was removed, the error names it."""

import functools
import gzip
import importlib.util
import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file
from small_pipeline import pipeline_of
from unets import MORE_SHAPES, build, inputs, relative_error

from prunekit import Architecture, PrunedUNet2DConditionModel, discover, gated, slice_unet
from prunekit.core.emptied import names_in_files
from prunekit.export import copy_ip_adapter, load_denoiser, save_denoiser
from prunekit.runtime.errors import UserError

peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = [*ATTENTION, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "net.0.proj", "net.2", "proj_in", "proj_out"]
OF_KIND = {  # layers that disappear if a group of this kind is emptied
    "resnet": ("conv1", "conv2", "time_emb_proj"),
    "attention": ATTENTION,
    "feedforward": ("net.0.proj", "net.2"),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
GOLDEN = Path(__file__).parents[1] / "goldens" / "unet_format_1"
"""A folder of tier "class" with emptied groups and removed layers, written by prunekit at commit 062d5d2 with
`save_unet(pruned, folder, "class")`: config, weights, class file (gzip), and the output for `inputs(unet, 2, 8)`."""


@functools.cache
def architecture(shape: str, seed: int = 0) -> Architecture:
    """Return a random architecture that empties every fourth group of each kind and removes every fourth layer."""
    space = discover(build(shape, "meta"), depth="all")
    values = space.random(0.7, seed).values
    values[space.num_width :] = True
    for kind in ("resnet", "attention", "feedforward", "layer"):
        for number, group in enumerate(own for own in space.groups if own.kind == kind):
            values[space.slice(group)] &= number % 4 != seed % 4
    return Architecture(space, values)


def cut(shape: str, seed: int = 0) -> PrunedUNet2DConditionModel:
    return slice_unet(build(shape), architecture(shape, seed))


def lost_layers(shape: str, seed: int = 0) -> dict[str, str]:
    """Return the names of the dense UNet's layers that the architecture removes, with the removed layer around each."""
    own, found = architecture(shape, seed), {}
    for group in own.removed():
        names = (name for name, module in build(shape, "meta").get_submodule(group.path).named_modules() if name)
        found |= {f"{group.path}.{name}": group.path for name in names}
    for group in own.space.width_groups:
        if not own.kept(group.name) and not any(gone.removes(group.path) for gone in own.removed()):
            found |= {f"{group.path}.{name}": group.path for name in OF_KIND[group.kind]}
    return found


def config(targets=LAYERS, **options):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 2, "init_lora_weights": False, **options}, target_modules=targets)


def run(unet, **arguments):
    with torch.no_grad():
        return unet(**inputs(unet, size=8), **arguments).sample


def copies(unet):
    return {name: value.clone() for name, value in unet.state_dict().items()}


def train(unet, parameters=None):
    """Run one training step on the parameters, by default those that require gradients."""
    optimizer = torch.optim.SGD([p for p in parameters or unet.parameters() if p.requires_grad], lr=0.1)
    unet(**inputs(unet, size=8)).sample.square().mean().backward()
    optimizer.step()


def changed(before, after):
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("shape", MORE_SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_target_modules_match_the_layers_that_are_left(shape, seed):
    unet, lost = cut(shape, seed), lost_layers(shape, seed)
    kinds = {type(module).__name__ for module in unet.modules()}
    assert {"EmptiedResnet", "EmptiedAttention", "EmptiedFeedForward"} <= kinds
    assert {"BypassedResnet", "BypassedTransformer"} <= kinds
    ends = tuple(f".{name}" for name in LAYERS)
    left = {name for name, _ in build(shape, "meta").named_modules() if name.endswith(ends) and name not in lost}
    unet.add_adapter(config())
    assert {name for name, module in unet.named_modules() if hasattr(module, "lora_A")} == left
    assert run(unet).isfinite().all()


@pytest.mark.parametrize("shape", MORE_SHAPES)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_training_step_changes_only_the_adapter(shape, use_dora):
    unet = cut(shape)
    unet.add_adapter(config(use_dora=use_dora))
    adapter = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert adapter and all("lora_" in name for name in adapter)
    assert any("magnitude" in name for name in adapter) == use_dora
    before = copies(unet)
    train(unet)
    assert changed(before, unet.state_dict()) == adapter


@pytest.mark.parametrize("shape", MORE_SHAPES)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_saved_adapter_gives_the_same_output(shape, use_dora, tmp_path):
    unet = cut(shape)
    plain, state = run(unet), copies(unet)
    unet.save_pretrained(tmp_path / "unet")
    unet.add_adapter(config(use_dora=use_dora))
    train(unet)
    adapted = run(unet)
    assert relative_error(adapted, plain) > 1e-3
    unet.save_lora_adapter(tmp_path)
    unet.unload_lora()
    assert not changed(state, unet.state_dict()) and torch.equal(run(unet), plain)
    again = PrunedUNet2DConditionModel.from_pretrained(tmp_path / "unet")
    for target, options in ((unet, {}), (again, {"low_cpu_mem_usage": True})):
        target.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True, **options)
        assert relative_error(run(target), adapted) <= 1e-6


@pytest.mark.parametrize("shape", MORE_SHAPES)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_fused_adapter_is_part_of_the_weights(shape, use_dora):
    unet = cut(shape)
    plain = run(unet)
    unet.add_adapter(config(use_dora=use_dora))
    adapted = run(unet)
    unet.fuse_lora()
    assert relative_error(run(unet), adapted) <= 1e-5
    unet.unfuse_lora()
    assert relative_error(run(unet), adapted) <= 1e-5
    with pytest.raises(ValueError, match="merge it into the weights first"):
        discover(unet)
    unet.fuse_lora()
    unet.unload_lora()
    assert relative_error(run(unet), adapted) <= 1e-5 and relative_error(plain, adapted) > 1e-3
    space = discover(unet, depth="all")
    with torch.no_grad(), gated(unet, space) as gates:
        gates.set(space.random(0.6, seed=3))
        masked = run(unet)
    assert relative_error(run(slice_unet(unet, space.random(0.6, seed=3))), masked) <= 1e-5


@pytest.mark.parametrize("targets", [LAYERS, ATTENTION], ids=["layers", "attention"])
def test_a_pipeline_saves_and_loads_an_adapter(targets, tmp_path):
    pipeline = pipeline_of(StableDiffusionPipeline, cut("sd2"))
    pipeline.unet.add_adapter(config(targets))
    adapted = run(pipeline.unet)
    layers = peft.utils.get_peft_model_state_dict(pipeline.unet)
    if targets is ATTENTION:  # names of diffusers' training scripts, which exist only for attentions
        layers = convert_state_dict_to_diffusers(layers)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipeline.unet.unload_lora()
    pipeline.load_lora_weights(tmp_path)
    assert relative_error(run(pipeline.unet), adapted) <= 1e-6
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert relative_error(run(pipeline.unet), adapted) <= 1e-5


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "OFTConfig"])
def test_peft_itself_finds_the_layers_that_are_left(kind):
    unet = cut("sd2")
    rank = {"oft_block_size": 2, "r": 0} if kind == "OFTConfig" else {"r": 2}
    model = peft.get_peft_model(unet, getattr(peft, kind)(**rank, target_modules=ATTENTION))
    train(model.base_model.model)
    adapted = run(unet)
    assert relative_error(run(model.merge_and_unload()), adapted) <= 1e-5


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_an_adapter_of_a_removed_layer_is_refused(shape):
    lost, unet = lost_layers(shape), cut(shape)
    lost = {name: layer for name, layer in lost.items() if name.endswith(tuple(LAYERS))}
    assert {layer.rpartition(".")[2] for layer in lost.values()} >= {"attn1", "ff"}
    for name, layer in lost.items():
        with pytest.raises(UserError, match=f"names '{name}', but {layer} was removed"):
            unet.add_adapter(config([name, "to_q"]))
        for prefix in ("unet", None):
            state = {f"{prefix}.{name}.lora_A.weight" if prefix else f"{name}.lora_A.weight": torch.zeros(2, 2)}
            with pytest.raises(UserError, match=f"has weights for {layer}, which was removed"):
                unet.load_lora_adapter(state, prefix=prefix)
    pattern = "|".join(lost).replace(".", r"\.")
    with pytest.raises(UserError, match=f"All {len(lost)} layers that it matches .* were removed: ") as error:
        unet.add_adapter(config(pattern))
    assert str(error.value).partition("removed: ")[2].split(", ")[0] in lost
    assert not hasattr(unet, "peft_config")
    unet.add_adapter(config(f"{pattern}|.*to_q"))


def test_an_adapter_for_layers_of_which_none_is_left_is_refused(tmp_path):
    unet = build("sd2")
    space = discover(unet, depth="none")
    values = torch.tensor([group.kind != "attention" for group in space.groups for _ in range(group.size)])
    pruned = slice_unet(unet, Architecture(space, values))
    with pytest.raises(UserError, match=r"were removed: down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn1"):
        pruned.add_adapter(config(ATTENTION))
    with pytest.raises(ValueError, match="not found in the base model"):  # PEFT's error: no such layer exists
        pruned.add_adapter(config(["to_nothing"]))
    unet.add_adapter(config(ATTENTION))
    unet.save_lora_adapter(tmp_path)
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        with pytest.raises(UserError, match=r"\.attn[12], which was removed from this UNet\. Cut a LoRA"):
            pruned.load_lora_adapter(source, prefix=None)


def custom_diffusion(unet, rows=lambda attention: attention.inner_dim):
    """Return custom-diffusion processors initialized from the attentions' weights, as in its training script."""
    made = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        cross = name.endswith("attn2.processor")
        whole = attention.inner_dim == attention.query_dim  # diffusers' processor has square query and output weights
        own = made[name] = CustomDiffusionAttnProcessor(
            train_kv=cross,
            train_q_out=cross and whole,
            hidden_size=rows(attention),
            cross_attention_dim=unet.config.cross_attention_dim if cross else None,
        )
        layers = [("to_k", attention.to_k), ("to_v", attention.to_v)]
        layers += [("to_q", attention.to_q), ("to_out", attention.to_out)] if whole else []
        for layer, source in layers if cross else ():
            getattr(own, f"{layer}_custom_diffusion").load_state_dict(source.state_dict())
    return made


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_custom_diffusion_trains_and_loads(shape, tmp_path):
    unet = cut(shape).requires_grad_(False)
    plain, count = run(unet), len(unet.attn_processors)
    unet.set_attn_processor(custom_diffusion(unet))
    assert len(unet.attn_processors) == count and relative_error(run(unet), plain) <= 1e-5
    before = copies(unet)
    train(unet)
    names = changed(before, unet.state_dict())
    assert names and all("custom_diffusion" in name for name in names)
    trained = run(unet)
    unet.save_attn_procs(tmp_path, safe_serialization=False)
    pipeline = pipeline_of(StableDiffusionPipeline, cut(shape))
    pipeline.unet.load_attn_procs(tmp_path, weight_name="pytorch_custom_diffusion_weights.bin", _pipeline=pipeline)
    assert relative_error(run(pipeline.unet), trained) <= 1e-6 and relative_error(trained, plain) > 1e-6


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_processors_of_removed_layers_are_refused(shape):
    unet, dense = cut(shape), build(shape)
    lost = set(lost_layers(shape).values())
    own = unet.attn_processors
    for name in dense.attn_processors.keys() - own.keys():
        layer = next(layer for layer in lost if name.startswith(f"{layer}."))
        with pytest.raises(UserError, match=f"include '{name}', but {layer} was removed from this UNet"):
            unet.set_attn_processor({**own, name: AttnProcessor2_0()})
    unet.set_attn_processor(own)
    with pytest.raises(UserError, match="was removed from this UNet"):
        unet.set_attn_processor(custom_diffusion(dense))


def ip_adapter(unet, size=24, seed=0):
    """Return random weights of an IP-Adapter for a UNet, in the format of published files."""
    generator, weights, cross = torch.Generator().manual_seed(seed), {}, unet.config.cross_attention_dim
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{key}.weight"] = 0.1 * torch.randn(inner, cross, generator=generator)
    projection = {
        "proj.weight": torch.randn(4 * cross, size, generator=generator),
        "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    return {"image_proj": projection, "ip_adapter": weights}


def drawn(unet, size=24):
    """Return the UNet's output with a picture as the IP-Adapter's condition."""
    arguments = inputs(unet, size=8)
    embeds = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(1))
    arguments["added_cond_kwargs"] = {**arguments.get("added_cond_kwargs", {}), "image_embeds": [embeds]}
    with torch.no_grad():
        return unet(**arguments).sample


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_an_ip_adapter_of_the_dense_unet_fits(shape):
    """Loaded into the pruned UNet or copied from the dense one, it gives the dense UNet's output under the mask."""
    dense, unet, copied = build(shape), cut(shape), cut(shape)
    plain = run(unet)
    weights = ip_adapter(dense)
    with torch.no_grad(), gated(dense, architecture(shape).on(discover(dense, "all")).space) as gates:
        gates.set(architecture(shape))
        dense._load_ip_adapter_weights([weights])  # pipeline.load_ip_adapter does the same
        expected = drawn(dense)
    copy_ip_adapter(dense, copied)
    assert relative_error(drawn(copied), expected) <= 1e-5
    for low_cpu_mem_usage in (False, True):
        unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=low_cpu_mem_usage)
        assert relative_error(drawn(unet), expected) <= 1e-5
    assert relative_error(plain, expected) > 1e-3


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_an_ip_adapter_that_was_trained_on_the_pruned_unet_fits(shape):
    unet = cut(shape)
    weights = ip_adapter(unet)
    unet._load_ip_adapter_weights([weights])
    own = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    numbers = sorted(int(key.partition(".")[0]) for key in weights["ip_adapter"] if "to_k_ip" in key)
    for name, number in zip(own, numbers, strict=True):
        processor = unet.attn_processors[name]
        for key, layers in (("to_k_ip", processor.to_k_ip), ("to_v_ip", processor.to_v_ip)):
            assert torch.equal(layers[0].weight, weights["ip_adapter"][f"{number}.{key}.weight"])
    unet.requires_grad_(False)
    trained = [p for name in own for p in unet.attn_processors[name].parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    assert drawn(unet).isfinite().all()


def test_the_lora_of_an_ip_adapter_names_the_dense_unets_layers():
    """Face-ID adapters number their LoRA layers by the attentions of the dense UNet."""
    unet, dense = cut("sd2"), build("sd2", "meta")
    number, name = len(dense.attn_processors) - 1, list(dense.attn_processors)[-1]
    keys = [f"to_{layer}_lora.{side}.weight" for layer in ("q", "k", "v", "out") for side in ("down", "up")]
    state = {"ip_adapter": {f"{number}.{key}": torch.zeros(1) for key in keys}}
    assert len(unet.attn_processors) <= number
    assert set(unet._load_ip_adapter_loras([state])[0]) == {f"unet.{name}.{key}" for key in keys}


def test_an_ip_adapter_of_another_model_is_refused():
    unet, other = cut("sd2"), build("sd2", layers_per_block=1)
    with pytest.raises(UserError, match=r"for 10 cross-attentions; the dense UNet has 16 and this one \d+"):
        unet._load_ip_adapter_weights([ip_adapter(other)])
    wide = build("sd2", block_out_channels=[64, 64, 96, 96], attention_head_dim=[4, 4, 6, 6])
    with pytest.raises(UserError, match=r"64 channels for down_blocks\.0\.attentions\.\d.* 32 in the dense UNet"):
        unet._load_ip_adapter_weights([ip_adapter(wide)])
    wide._load_ip_adapter_weights([ip_adapter(wide)])
    with pytest.raises(UserError, match=r"64 channels for down_blocks\.0\.attentions\.\d.* 32 in the dense UNet"):
        copy_ip_adapter(wide, unet)


@pytest.mark.parametrize("shape", MORE_SHAPES)
def test_names_in_memory_agree_and_files_have_the_dense_names(shape, tmp_path):
    unet, dense = cut(shape), build(shape, "meta")
    assert set(unet.state_dict()) == {name for name, _ in unet.named_parameters()}
    names = names_in_files(unet)
    assert names and set(names) <= set(unet.state_dict())
    unet.save_pretrained(tmp_path / "one")
    unet.save_pretrained(tmp_path / "several", max_shard_size="100KB", variant="own")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    in_file = load_file(tmp_path / "one" / WEIGHTS)
    assert set(in_file) < set(dense.state_dict()) and set(in_file) == {names.get(own, own) for own in unet.state_dict()}
    assert list(unet.state_dict()) == [name for name, _ in unet.named_parameters()]  # no hook of saving remains
    stock = UNet2DConditionModel.save_pretrained  # pipelines inspect its signature for accepted arguments
    assert inspect.signature(type(unet).save_pretrained) == inspect.signature(stock)
    for folder, variant in (("one", None), ("several", "own")):
        for low in (True, False):
            loaded, info = PrunedUNet2DConditionModel.from_pretrained(
                tmp_path / folder, variant=variant, low_cpu_mem_usage=low, output_loading_info=True
            )
            assert not any(info.values())
            assert not changed(unet.state_dict(), loaded.state_dict())
    for state in (in_file, unet.state_dict()):
        blank = cut(shape, seed=0)
        for parameter in blank.parameters():
            parameter.data.zero_()
        blank.load_state_dict(state)
        assert not changed(unet.state_dict(), blank.state_dict())


def test_weights_that_are_offloaded_are_found():
    unet = cut("sd2")
    expected = run(unet)
    cpu_offload(unet, torch.device("cpu"))  # enable_sequential_cpu_offload of a pipeline does the same
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
    assert torch.equal(unet(**inputs(build("sd2"), size=8)).sample, expected)


def class_of(source: str, folder: Path):
    """Import a class file as a separate module, and return its class."""
    folder.mkdir()
    path = folder / "modeling_pruned.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"modeling_pruned_{folder.name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module.PrunedUNet2DConditionModel


def test_an_exported_class_file_takes_adapters(tmp_path):
    unet = cut("sd2")
    save_denoiser(unet, tmp_path / "unet", "class")
    own = class_of((tmp_path / "unet" / "modeling_pruned.py").read_text(), tmp_path / "module")
    loaded = own.from_pretrained(tmp_path / "unet")
    assert torch.equal(run(loaded), run(unet))
    loaded.add_adapter(config())
    unet.add_adapter(config())
    unet.load_state_dict(loaded.state_dict())
    assert torch.equal(run(loaded), run(unet))
    name, layer = next(iter(lost_layers("sd2").items()))
    with pytest.raises(ValueError, match=f"{layer} was removed"):
        loaded.add_adapter(config([name]), "second")


@pytest.fixture
def written(tmp_path):
    """Return the golden folder, written before emptied layers had separate names, and the class in it."""
    for name in ("config.json", WEIGHTS):
        shutil.copy(GOLDEN / name, tmp_path)
    source = gzip.decompress((GOLDEN / "modeling_pruned.py.gz").read_bytes()).decode()
    return tmp_path, class_of(source, tmp_path / "golden")


def test_a_folder_of_format_1_loads_to_the_same_bits(written, tmp_path):
    folder, old_class = written
    old, in_file = old_class.from_pretrained(folder), load_file(folder / WEIGHTS)
    biases = [key for key in in_file if key.endswith(("conv2.bias", "to_out.0.bias", "net.2.bias"))]
    emptied = {key for key in biases if key.removesuffix("bias") + "weight" not in in_file}
    assert len(emptied) == 5
    ours = {f"low {low}": PrunedUNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=low) for low in (1, 0)}
    ours["load_denoiser"] = load_denoiser(folder, verify=True)
    for unet in (old, *ours.values()):
        for parameter in unet.requires_grad_(False).parameters():
            parameter.data = (
                parameter.data.clone()
            )  # rounding depends on the weights' memory alignment and on whether they are frozen
    expected = load_file(GOLDEN / "output.safetensors")["sample"]
    arguments = inputs(old, batch=2, size=8)
    with torch.no_grad():
        reference = old(**arguments).sample
        assert relative_error(reference, expected) <= 1e-5
        for how, unet in ours.items():
            names = names_in_files(unet)
            assert set(names.values()) == emptied, how
            state = {names.get(name, name): value for name, value in unet.state_dict().items()}
            assert state.keys() == in_file.keys() and not changed(in_file, state), how
            assert torch.equal(unet(**arguments).sample, reference), how
    unet = ours["load_denoiser"]
    unet.save_pretrained(tmp_path / "again")
    assert not changed(in_file, again := load_file(tmp_path / "again" / WEIGHTS)) and in_file.keys() == again.keys()
    assert not changed(old.state_dict(), old_class.from_pretrained(tmp_path / "again").state_dict())
    unet.add_adapter(config())
    train(unet)


def test_a_folder_of_format_1_in_several_files_loads(written, tmp_path):
    folder, old_class = written
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {}
    for index, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        places |= dict.fromkeys(names, f"diffusion_pytorch_model-{index + 1:05}-of-00002.safetensors")
        save_file({name: tensors[name] for name in names}, folder / places[names[0]], {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    old = old_class.from_pretrained(folder)
    for low in (True, False):
        unet, info = PrunedUNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=low, output_loading_info=True)
        assert not any(info.values()) and torch.equal(run(unet), run(old))
    assert torch.equal(run(load_denoiser(folder)), run(old))
