"""Pruned transformers open elsewhere: each class with its class file, a mixture, and one expert of an SD 3."""

import importlib.util
import sys

import pytest
import torch
from small_transformer_pipelines import write
from small_transformers import CONFIGS, build
from unets import relative_error

import prunekit as pk
from prunekit.core.call import normal, predict
from prunekit.core.registry import denoiser_of
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.export import load_denoiser, load_pipeline_directory, save_denoiser, verification
from prunekit.export.tiers import FOLDERS, class_file_source, write_class_file
from prunekit.export.verification import Expected, claims_of, verify
from prunekit.methods.router import Router
from prunekit.models import load_pipeline
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json
from prunekit.serving.exporting import export

PROMPTS = ["red apple", "a blue house", "two green dogs", "old moon"]


def pruned(name, seed=1, keep=0.5):
    model = build(name)
    return pk.slice_unet(model, pk.discover(model, "all").random(keep, seed))


def output(model, batch=2):
    call = denoiser_of(model).example(model, batch, (8, 8), 5, normal(torch.Generator().manual_seed(0)))
    with torch.no_grad():
        return predict(model, call)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_class_file_is_the_package(name, tmp_path):
    model = pruned(name)
    spec = importlib.util.spec_from_file_location(f"modeling_of_{name}", write_class_file(type(model), tmp_path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    own_class = getattr(module, type(model).__name__)
    assert own_class.__module__ == spec.name
    for seed, keep in enumerate((0.1, 0.5, 0.9)):
        model = pruned(name, seed, keep)
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        own = own_class(**config).eval()
        own.load_state_dict(model.state_dict())
        assert torch.equal(output(own), output(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_class_file_needs_torch_and_diffusers_alone(name):
    lines = class_file_source(type(pruned(name))).splitlines()
    packages = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert packages - sys.stdlib_module_names == {"torch", "diffusers"}


@pytest.mark.long
def test_every_class_and_tier_opens_in_a_fresh_process(tmp_path):
    claims = []
    for name in CONFIGS:
        dense, cut = build(name), pruned(name)
        for tier, model in zip(FOLDERS, (dense, cut), strict=True):
            folder = tmp_path / f"{name}-{tier}"
            assert save_denoiser(model, folder, tier)["tier"] == tier
            claims += claims_of(tier, folder, f"{name} {tier}", Expected.of(model, 5))
    assert len(verify(claims)) == 4 * len(CONFIGS)


def test_a_check_that_takes_too_long_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "SECONDS", 0.01)
    with pytest.raises(UserError, match=r"took more than 0\.01 s; nothing was written"):
        verify(claims_of("stock", tmp_path, "model", Expected([])))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_read_and_checked(name, tmp_path):
    model = pruned(name)
    save_denoiser(model, tmp_path / "one", "class")
    again = load_denoiser(tmp_path / "one", verify=True)
    assert type(again) is type(model) and torch.equal(output(again), output(model))
    save_denoiser(pruned(name, seed=2), tmp_path / "other", "class")
    (tmp_path / "other" / "config.json").replace(tmp_path / "one" / "config.json")
    with pytest.raises(UserError, match="architecture") as error:
        load_denoiser(tmp_path / "one")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """Return a prompt-routed pipeline of an SD 3 with two experts."""
    folder = write(tmp_path_factory.mktemp("sd3"), "sd35", load_pipeline("emoji"))
    pipeline = load_pipeline(folder)
    space = pk.discover(pipeline.transformer, "all")
    experts = [pk.slice_unet(pipeline.transformer, space.random(0.6, seed)) for seed in range(2)]
    z = load_prompt_encoder("emoji").encode(PROMPTS)
    weight = torch.randn(2, z.shape[1], generator=torch.Generator().manual_seed(0))
    router = Router(weight, -(z @ weight.T).mean(dim=0))
    return pk.PromptRoutedPipeline.from_experts(pipeline, experts, router, guidance=3.0)


def draw(pipeline, **options):
    return pipeline(PROMPTS, num_inference_steps=2, seeds=0, output_type="np", **options)


def test_a_mixture_is_drawn_saved_and_read(routed, tmp_path):
    drawn = draw(routed)
    assert sorted(set(drawn.experts)) == [0, 1]
    costs = [
        pk.CostModel(model, pk.discover(model, "none"), text_length=routed.text_length).dense_macs
        for model in map(routed.mixture.experts.load, range(2), ["cpu"] * 2, [torch.float32] * 2)
    ]
    assert drawn.macs == [costs[expert] * 2 * 2 for expert in drawn.experts]  # 2 steps, 2 texts because of guidance
    assert draw(routed, guidance_scale=1.0).macs == [costs[expert] * 2 for expert in drawn.experts]
    routed.save_pretrained(tmp_path / "saved")
    again = draw(pk.PromptRoutedPipeline.from_pretrained(tmp_path / "saved", device="cpu"))
    assert again.experts == drawn.experts and (again.images == drawn.images).all()
    text = routed.text_length
    assert text == 16 + 1  # tokens of CLIP, and one of the replacement of T5


def test_an_image_is_the_stock_pipelines(routed):
    drawn = draw(routed)
    expert = drawn.experts[1]
    stock = routed.parts.pipeline(routed.mixture.experts.load(expert, "cpu", torch.float32))
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 1, "output_type": "np"}
    assert (stock(PROMPTS[1], generator=generator, **given).images[0] == drawn.images[1]).all()


OTHERS = [
    "z_image",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("flux2", "flux2_klein_base", "cogview4")),
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_are_routed(name, tmp_path):
    """An image equals the stock pipeline's, and its MACs count all calls of the transformer."""
    pipeline = load_pipeline(write(tmp_path / "own", name, load_pipeline("emoji")))
    space = pk.discover(pipeline.transformer, "all")
    experts = [pk.slice_unet(pipeline.transformer, space.random(0.6, seed)) for seed in range(2)]
    z = load_prompt_encoder("emoji").encode(PROMPTS)
    weight = torch.randn(2, z.shape[1], generator=torch.Generator().manual_seed(0))
    routed = pk.PromptRoutedPipeline.from_experts(
        pipeline, experts, Router(weight, -(z @ weight.T).mean(dim=0)), guidance=3.0
    )
    sizes = {"height": 32, "width": 16}
    drawn = draw(routed, **sizes)
    stock = routed.parts.pipeline(routed.mixture.experts.load(drawn.experts[1], "cpu", torch.float32))
    stock.set_progress_bar_config(disable=True)
    batches = []
    stock.transformer.register_forward_hook(
        lambda module, args, kwargs, output: batches.append(len(output[0])), with_kwargs=True
    )
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", **sizes}
    image = stock(prompt=PROMPTS[1], generator=torch.Generator().manual_seed(0), **given).images[0]
    assert (image == drawn.images[1]).all()
    cost = pk.CostModel(stock.transformer, pk.discover(stock.transformer, "none"), (16, 8), routed.text_length)
    assert drawn.macs[1] == cost.dense_macs * sum(batches)
    routed.save_pretrained(tmp_path / "saved")
    again = pk.PromptRoutedPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert (draw(again, **sizes).images == drawn.images).all()


@pytest.mark.long
def test_a_mixture_is_exported(routed, tmp_path):
    routed.save_pretrained(tmp_path / "saved")
    exported = export(tmp_path / "saved", tmp_path / "routed")
    assert exported.tiers == ["class"] * 2 and len(exported.checked) == 5
    assert "{" not in (tmp_path / "routed" / "README.md").read_text().replace("{DIRECTORY}", "")


@pytest.mark.long
def test_one_expert_is_a_plain_pipeline(routed, tmp_path):
    routed.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "one", expert=1)
    index = read_json(tmp_path / "one" / "model_index.json")
    assert index["transformer"] == ["modeling_pruned", "PrunedSD3Transformer2DModel"]
    card = (tmp_path / "one" / "README.md").read_text()
    assert "transformer/modeling_pruned.py" in card and "whose transformer was cut" in card
    pipeline = load_pipeline_directory(tmp_path / "one")
    model = routed.mixture.experts.load(1, "cpu", torch.float32)
    assert relative_error(output(pipeline.transformer), output(model)) <= 1e-6
    served = pk.PromptRoutedPipeline.from_pretrained(tmp_path / "one", device="cpu")
    assert served.num_experts == 1 and draw(served).experts == [0] * 4


@pytest.mark.long
@pytest.mark.parametrize("tier", ["torch", "onnx"])
@pytest.mark.parametrize("name", CONFIGS)
def test_graphs(name, tier, tmp_path):
    save_denoiser(pruned(name), tmp_path / "model")
    batch = 2 if name == "z_image" else None  # its forward pass loops over samples
    if batch is not None:
        with pytest.raises(UserError, match=r"cannot take any number of samples .* state how many"):
            export(tmp_path / "model", tmp_path / "out", tier)
    if tier == "onnx" and name in ("pixart", "qwen_image", "z_image"):  # torch's exporter does not support these
        with pytest.raises(UserError, match=r"as ONNX|does not open in a fresh process") as error:
            export(tmp_path / "model", tmp_path / "out", tier, batch=batch)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return
    exported = export(tmp_path / "model", tmp_path / "out", tier, batch=batch)
    assert exported.tiers == [tier] and exported.checked[0]["relative_error"] <= exported.checked[0]["tolerance"]
