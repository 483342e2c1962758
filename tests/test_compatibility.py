"""Run each feature with pruned UNets of the embedded model; docs/compatibility.md must list the same outcomes."""

import copy
import functools
import importlib.util
import re
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    T2IAdapter,
    UniPCMultistepScheduler,
)
from PIL import Image
from small_model import write_pipeline
from unets import inputs, relative_error

import prunekit as pk
from prunekit.cli import is_users
from prunekit.export import check_controlnet, check_t2i_adapter, copy_ip_adapter, slice_lora
from prunekit.export.pipeline_parts import Parts
from prunekit.methods import BKSDM
from prunekit.models import load_pipeline

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
KINDS = ("dense", "depth, stock", "depth, class", "width, class", "stage, stock", "stage, class")
SCHEDULERS = (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
DRAW = {"num_inference_steps": 2, "guidance_scale": 0.0, "output_type": "np"}
MODELS = {"inpainting": "small"}  # diffusers' inpainting needs latents of 4 channels; the embedded model has 8
CHANGING = ("LoRA", "IP-Adapter", "torchao")
SLOW = {"torch.compile": ("width, class",)}  # the only kinds of a row that the test runs; the script runs all


@functools.cache
def loaded(model: str):
    with tempfile.TemporaryDirectory() as folder:
        return load_pipeline(model if model == "emoji" else write_pipeline(Path(folder) / model))


@functools.cache
def cut(kind: str, model: str):
    """Return the dense pipeline, an architecture of its UNet, and the sliced UNet (prunekit's or a stock class)."""
    dense, what = loaded(model), kind.partition(",")[0]
    space = pk.discover(dense.unet, "blocks")
    values = space.full().values
    if what in ("depth", "stage"):
        values = BKSDM(variant="base" if what == "depth" else "tiny").architecture(dense.unet).on(space).values
    elif what == "width":
        values[: space.num_width] = space.random(0.7, seed=1).values[: space.num_width]
    architecture = pk.Architecture(space, values)
    if kind == "dense":
        return dense, architecture, dense.unet
    unet = pk.slice_unet(dense.unet, architecture)
    return dense, architecture, pk.as_stock(unet) if kind.endswith("stock") else unet


class Subject:
    """A UNet of a kind in a pipeline, and the dense pipeline; both are copies if the feature changes them."""

    def __init__(self, kind: str, feature: str):
        dense, self.architecture, unet = cut(kind, MODELS.get(feature, "emoji"))
        if feature in CHANGING:
            dense, unet = Parts.of(dense).pipeline(copy.deepcopy(dense.unet)), copy.deepcopy(unet)
        self.dense, self.unet = dense, dense.unet if kind == "dense" else unet
        self.pipeline = Parts.of(dense).pipeline(self.unet)

    def reference(self, **arguments) -> torch.Tensor:
        """Return the output of the dense UNet, with its additions, under the architecture's mask."""
        unet = self.dense.unet
        with torch.no_grad(), pk.gated(unet, self.architecture.space) as gates:
            gates.set(self.architecture)
            return unet(**arguments).sample

    def output(self, **arguments) -> torch.Tensor:
        with torch.no_grad():
            return self.unet(**arguments).sample

    def arguments(self, batch: int = 1) -> dict:
        return inputs(self.dense.unet, batch, size=8)

    def draw(self, pipeline=None, **arguments):
        pipeline, generator = pipeline or self.pipeline, torch.Generator().manual_seed(0)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline("red apple", generator=generator, **{**DRAW, **arguments}).images[0]

    def other(self, kind):
        """Return a pipeline of another class with the same components; `from_pipe` drops UNets of other classes."""
        return kind(**self.pipeline.components, requires_safety_checker=False)


def random_(module: torch.nn.Module, scale: float = 0.02) -> torch.nn.Module:
    """Set random weights, as new adapters are 0 and would not change the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def same(output: torch.Tensor, reference: torch.Tensor, plain: torch.Tensor) -> None:
    """Check that the output equals the reference, and that the output without the addition (`plain`) differs."""
    assert relative_error(output, reference) <= 1e-5 and relative_error(plain, reference) >= 1e-3


def lora(subject):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    dense, arguments = subject.dense.unet, subject.arguments()
    plain = subject.output(**arguments)
    layers = "conv1|conv2|time_emb_proj|to_q|to_k|to_v|to_out.0|net.0.proj|net.2|proj_in"
    targets = rf"down_blocks\.1\..*\.({layers})"
    dense.add_adapter(LoraConfig(r=3, lora_alpha=3, init_lora_weights=False, target_modules=targets))
    state = {f"unet.{name}": value for name, value in get_peft_model_state_dict(dense).items()}
    dense.unload_lora()
    subject.pipeline.load_lora_weights(state if subject.unet is dense else slice_lora(state, subject.unet))
    output = subject.output(**arguments)
    subject.pipeline.unload_lora_weights()
    subject.dense.load_lora_weights(state)
    subject.dense.fuse_lora()
    subject.dense.unload_lora_weights()
    same(output, subject.reference(**arguments), plain)


def controlnet(subject):
    network = random_(ControlNetModel.from_unet(subject.dense.unet, conditioning_embedding_out_channels=(8, 8, 8, 8)))
    check_controlnet(subject.unet, network)
    arguments = subject.arguments()
    with torch.no_grad():
        down, mid = network(**arguments, controlnet_cond=torch.rand(1, 3, 64, 64), return_dict=False)
    extra = {"down_block_additional_residuals": [100 * part for part in down], "mid_block_additional_residual": mid}
    same(subject.output(**arguments, **extra), subject.reference(**arguments, **extra), subject.output(**arguments))


def t2i_adapter(subject):
    channels = list(subject.dense.unet.config.block_out_channels)
    adapter = random_(T2IAdapter(3, channels, 1, downscale_factor=8, adapter_type="full_adapter"), 0.1)
    check_t2i_adapter(subject.unet, adapter)
    arguments = subject.arguments()
    with torch.no_grad():
        features = adapter(torch.rand(1, 3, 64, 64))

    def extra():
        return {"down_intrablock_additional_residuals": [part.clone() for part in features]}  # it empties a list

    same(subject.output(**arguments, **extra()), subject.reference(**arguments, **extra()), subject.output(**arguments))


def ip_adapter(subject):
    dense, arguments, size = subject.dense.unet, subject.arguments(), 24
    plain = subject.output(**arguments)
    generator, weights = torch.Generator().manual_seed(0), {}
    cross = dense.config.cross_attention_dim
    for index, (name, _) in enumerate(dense.attn_processors.items()):
        if name.endswith("attn2.processor"):
            inner = dense.get_submodule(name.removesuffix(".processor")).inner_dim
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"{index}.{key}.weight"] = 0.1 * torch.randn(inner, cross, generator=generator)
    projection = {
        "proj.weight": torch.randn(4 * cross, size, generator=generator),
        "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    dense._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])  # load_ip_adapter does the same
    if subject.unet is not dense:
        copy_ip_adapter(dense, subject.unet)
    arguments["added_cond_kwargs"] = {"image_embeds": [torch.randn(1, 1, size, generator=generator)]}
    same(subject.output(**arguments), subject.reference(**arguments), plain)


def schedulers(subject):
    for kind in SCHEDULERS:
        subject.pipeline.scheduler = kind.from_config(subject.dense.scheduler.config)
        image = subject.draw()
        assert image.shape == (64, 64, 3) and (image == image).all() and image.std() > 0


def img2img(subject):
    pipeline, picture = subject.other(StableDiffusionImg2ImgPipeline), Image.new("RGB", (64, 64), "red")
    weak, strong = (subject.draw(pipeline, image=picture, strength=strength) for strength in (0.5, 1.0))
    assert abs(weak - strong).mean() > 1e-3


def inpainting(subject):
    pipeline = subject.other(StableDiffusionInpaintPipeline)
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    drawn = [subject.draw(pipeline, image=picture, mask_image=own, strength=1.0)
             for own in (mask, Image.new("L", (64, 64), 255))]  # fmt: skip
    assert abs(drawn[0] - drawn[1])[:, 40:].mean() > 1e-3


def compiling(subject):
    arguments = subject.arguments()
    torch.compiler.reset()
    compiled = torch.compile(subject.unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(**arguments).sample, subject.output(**arguments)) <= 1e-5


def torchao(subject):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    arguments = subject.arguments()
    plain = subject.output(**arguments)
    quantize_(subject.unet, Int8WeightOnlyConfig(version=2))
    assert 1e-5 < relative_error(subject.output(**arguments), plain) < 0.05


def deepcache(subject):
    from DeepCache import DeepCacheSDHelper

    subject.pipeline.scheduler = DDIMScheduler.from_config(subject.dense.scheduler.config)
    plain, calls = subject.draw(), []
    innermost = next(m for m in reversed(list(subject.unet.down_blocks[1].resnets.modules())))
    hook = innermost.register_forward_hook(lambda *_: calls.append(1))
    helper = DeepCacheSDHelper(subject.pipeline)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    cached = subject.draw()
    helper.disable()
    hook.remove()
    assert len(calls) < 2 * DRAW["num_inference_steps"] and abs(cached - plain).mean() < 0.2


def tome(subject):
    import tomesd

    plain = subject.draw()
    tomesd.apply_patch(subject.pipeline, ratio=0.5)
    merged = subject.draw()
    tomesd.remove_patch(subject.pipeline)
    assert 1e-4 < abs(merged - plain).mean() < 0.2


FEATURES = {
    "LoRA": (lora, "peft"),
    "ControlNet": (controlnet, None),
    "T2I-Adapter": (t2i_adapter, None),
    "IP-Adapter": (ip_adapter, None),
    "other schedulers": (schedulers, None),
    "img2img": (img2img, None),
    "inpainting": (inpainting, None),
    "torch.compile": (compiling, None),
    "torchao": (torchao, "torchao"),
    "DeepCache": (deepcache, "DeepCache"),
    "ToMe": (tome, "tomesd"),
}


NO = {"DeepCache": AttributeError}  # error of a feature's package in cells with "no"


def outcome(feature: str, kind: str) -> str:
    """Run a cell of the table; return "yes", "refused" for a one-line ValueError, or "no" for the error in `NO`.

    Any other error is a fault of this file or of prunekit, and is raised.
    """
    subject = Subject(kind, feature)
    try:
        FEATURES[feature][0](subject)
    except ValueError as error:
        if is_users(error) and "\n" not in str(error):
            return "refused"
        raise
    except NO.get(feature, ()) as error:
        *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals["__name__"].partition(".")[0] == FEATURES[feature][1]:
            return "no"
        raise
    return "yes"


def is_installed(feature: str) -> bool:
    """Return whether the package that a feature needs is installed."""
    package = FEATURES[feature][1]
    return package is None or importlib.util.find_spec(package) is not None


def documented() -> dict[tuple[str, str], str]:
    """Return the cells of the page's table by (feature, kind), without footnote marks."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    rows = [[re.sub(r"\s*\(\d\)", "", cell).strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], kind): cell for row in rows[2:] for kind, cell in zip(rows[0][1:], row[1:], strict=True)}


@pytest.mark.parametrize(
    "feature", [pytest.param(name, marks=pytest.mark.long if name == "torch.compile" else ()) for name in FEATURES]
)
def test_the_table_says_what_happens(feature):
    if not is_installed(feature):
        pytest.skip(f"{FEATURES[feature][1]} is not installed: its row of docs/compatibility.md is not tried here")
    told, kinds = documented(), SLOW.get(feature, KINDS)
    assert {kind: outcome(feature, kind) for kind in kinds} == {kind: told[feature, kind] for kind in kinds}


def test_a_lora_of_another_program_keeps_its_scale_and_what_fits_no_layer_is_refused():
    """kohya's names and alphas pass through diffusers' conversion."""
    dense, architecture, unet = cut("width, class", "emoji")
    layer, rank = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 4
    up, down = torch.randn(96, rank), torch.randn(rank, 96)
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    state, alphas = dense.lora_state_dict(
        {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    )
    matrices = list(slice_lora(state, unet, alphas).values())
    (a,) = (value for value in matrices if value.shape[0] == rank)
    (b,) = (value for value in matrices if value.shape[1] == rank)
    group = architecture.space.group(f"attention:{layer.removesuffix('.to_q')}")
    rows = torch.cat([torch.arange(16) + 16 * head for head in architecture.kept(group.name)])
    assert torch.allclose(b @ a, (0.5 * up @ down)[rows])
    for wrong, said in (({f"unet.{layer}.lora_A.weight": torch.zeros(4, 7)}, "does not fit the dense"),
                        ({"unet.down_blocks.9.x.lora_A.weight": down}, "made for another model"),
                        ({"unet.conv_in.weight": down}, "not a LoRA weight in a known format")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            slice_lora(wrong, unet)


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, RuntimeError, ValueError])
@pytest.mark.parametrize("feature", ["img2img", "DeepCache"])
def test_an_error_of_these_tests_is_no_outcome(feature, error, monkeypatch):
    """Once, an error in this file counted as the documented "no"."""

    def broken(subject):
        raise error("broken")

    monkeypatch.setitem(FEATURES, feature, (broken, FEATURES[feature][1]))
    with pytest.raises(error, match="broken"):
        outcome(feature, "dense")


def test_the_table_is_whole():
    assert set(documented()) == {(feature, kind) for feature in FEATURES for kind in KINDS}


if __name__ == "__main__":
    print("|".join(("| |", *KINDS, "")))
    for row in sys.argv[1:] or FEATURES:
        cells = [outcome(row, kind) if is_installed(row) else "no" for kind in KINDS]
        print("|".join((f"| {row} ", *(f" {cell} " for cell in cells), "")))
