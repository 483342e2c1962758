"""Loading of models: sources, supported models, and one-line errors for all others."""

import json
import shutil

import huggingface_hub.constants as hub_constants
import pytest
import torch
from huggingface_hub import hf_api
from safetensors.torch import load_file, save_file
from small_files import write_lora, write_single_file
from small_hub import small_hub
from small_sdxl import build_sd1, write

from prunekit.jobs.recipe import RecipeError, parse_recipe
from prunekit.models import load_pipeline, load_shape, load_unet_on_meta
from prunekit.models.lora import as_lora
from prunekit.models.single_file import UNET, config_name
from prunekit.models.weights import variant_of
from prunekit.runtime.errors import UserError

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_QUERY = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sd1") / "model", "sd1")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sdxl") / "model", "sdxl")


def refused(name, **options) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_pipeline(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_weights(one, other, parts=("unet", "vae", "text_encoder")):
    for part in parts:
        ours, theirs = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part


def changed_copy(source, folder, path, **changes):
    """Copy a pipeline's directory and change values in one of its JSON files; return the copy."""
    shutil.copytree(source, folder)
    content = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps({**content, **changes}))
    return folder


@pytest.mark.parametrize(
    "kind", ["LuminaPipeline", "KandinskyV22Pipeline", "StableDiffusionInpaintPipeline", ["x", "Y"]]
)
def test_another_pipeline_is_refused(sd1, tmp_path, kind):
    folder = changed_copy(sd1, tmp_path / "other", "model_index.json", _class_name=kind)
    line = refused(folder)
    assert str(kind) in line and "supported: StableDiffusionPipeline, StableDiffusionXLPipeline, " in line
    with pytest.raises(ValueError, match="is not supported; supported:"):
        load_shape(folder)


@pytest.mark.parametrize(
    ("path", "changes", "expected"),
    [
        ("model_index.json", {"unet": [None, None]}, "has no UNet"),
        ("unet/config.json", {"in_channels": 9}, "9"),
        ("unet/config.json", {"encoder_hid_dim_type": "text_image_proj"}, "encoder_hid_dim_type"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 4}, "not supported"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample'"),
    ],
)
def test_unsupported_parts_are_refused(sd1, tmp_path, path, changes, expected):
    assert expected in refused(changed_copy(sd1, tmp_path / "other", path, **changes))


def test_a_part_of_another_class_is_named_a_denoiser(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "LuminaNextDiT2DModel"}')
    with pytest.raises(UserError, match=r"^the denoiser of .* is a LuminaNextDiT2DModel, which is not supported; "):
        load_shape(tmp_path)


def test_half_precision_files_are_read_as_float32(sd1, tmp_path):
    half, said = tmp_path / "half", []
    build_sd1().to(torch.float16).save_pretrained(half, variant="fp16")
    pipeline = load_pipeline(half, say=said.append)
    assert said == [f"{half} has only fp16 weights; they are read as float32"]
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float32}
    weight = load_pipeline(sd1).unet.conv_in.weight
    assert torch.equal(pipeline.unet.conv_in.weight, weight.half().float())


def test_which_variant():
    plain = ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    half = ["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "text_encoder/model.fp16.safetensors"]
    assert variant_of([]) is None and variant_of([*plain, half[0]]) is None
    assert variant_of(half) == "fp16" and variant_of([plain[1], *half]) == "fp16"
    assert variant_of([*plain, "safety_checker/model.bin", "unet/diffusion_pytorch_model.bin"]) is None
    with pytest.raises(ValueError, match=r"unet: only pickled weights.*convert"):
        variant_of(["unet/diffusion_pytorch_model.bin", plain[1]])


def test_missing_weights_are_refused(sd1, tmp_path):
    folder = changed_copy(sd1, tmp_path / "other", "model_index.json")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "mid_block" not in name}, path)
    assert "lack weights of its unet" in refused(folder)
    path.unlink()
    assert "cannot load model" in refused(folder)


def test_a_single_file(sd1, tmp_path):
    pipeline = load_pipeline(sd1)
    path = write_single_file(tmp_path / "fine-tune.safetensors", pipeline)
    loaded = load_pipeline(path, single_file_config=sd1)
    assert_same_weights(loaded, pipeline)
    assert loaded.tokenizer("red apple").input_ids == pipeline.tokenizer("red apple").input_ids
    assert load_shape(path, sd1).vae_scale_factor == 8
    assert config_name(path) == "sd-1.5"
    with pytest.raises(ValueError, match=r"does not fit the configs of sd-1\.5: its UNet has .* not 859,520,964"):
        load_unet_on_meta(path)
    assert "does not fit the configs" in refused(path, single_file_config="emoji")
    assert "cannot be reached" in refused(path) and "single_file_config=DIRECTORY" in refused(path)
    assert "is for a model in a single file" in refused(sd1, single_file_config=sd1)
    unet_alone = {name: value for name, value in load_file(path).items() if name.startswith("model.")}
    save_file(unet_alone, tmp_path / "unet.safetensors")
    assert "holds no autoencoder" in refused(tmp_path / "unet.safetensors", single_file_config=sd1)
    marked = write_single_file(tmp_path / "v.safetensors", pipeline, v_pred=torch.zeros(1))
    assert "prediction_type v_prediction" in refused(marked, single_file_config=sd1)


def test_other_files_are_refused(sd1, tmp_path):
    for name in ("model.ckpt", "model.bin"):
        (tmp_path / name).write_bytes(b"pickle")
        assert "pickles can run code" in refused(tmp_path / name) and "save_pretrained" in refused(tmp_path / name)
    save_file({"lora_unet.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    assert "does not hold a complete Stable Diffusion model" in refused(tmp_path / "lora.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12")
    assert "not a readable .safetensors" in refused(tmp_path / "broken.safetensors")
    assert "no file" in refused(tmp_path / "missing.safetensors")
    (tmp_path / "notes.txt").write_text("a")
    assert "is not a .safetensors file" in refused(tmp_path / "notes.txt")
    inpainting = {UNET: torch.zeros(320, 9, 3, 3)}
    save_file(inpainting, tmp_path / "inpainting.safetensors")
    assert "'inpainting'" in refused(tmp_path / "inpainting.safetensors", say=print)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", (4, 1024), "sd-2.1"),
        ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", (4,), "sdxl"),
    ],
)
def test_the_family_of_a_file(tmp_path, name, shape, expected):
    save_file({UNET: torch.zeros(4, 4, 3, 3), name: torch.zeros(shape)}, tmp_path / "file.safetensors")
    assert config_name(tmp_path / "file.safetensors") == expected


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Return a function that makes this process use the hub at a URL with an empty cache, and returns the cache."""

    def ask(url):
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", url)
        return tmp_path / "cache"

    return ask


def test_an_unreachable_hub(online, monkeypatch):
    cache = online("http://127.0.0.1:9")
    for name in ("sd-1.5", "some/model"):
        line = refused(name)
        assert "the hub cannot be reached" in line and "DiffusionPipeline.save_pretrained wrote" in line
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is on" in refused("some/model")
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != "CACHEDIR.TAG"]
    assert not list(cache.glob("models--*"))


def test_a_hub_id(sd1, online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # no wait between retries
    with small_hub(sd1) as hub:
        cache = online(hub.url)
        assert "the hub has no model 'some/other'" in refused("some/other")
        hub.lost = "unet/diffusion_pytorch_model.safetensors"
        line = refused("some/model")
        assert "cannot be reached" in line and "save_pretrained" in line
        hub.lost = None
        assert_same_weights(load_pipeline("some/model"), load_pipeline(sd1))
        assert not list(cache.rglob("*.incomplete"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert_same_weights(load_pipeline("some/model"), load_pipeline(sd1))
    next(cache.rglob("snapshots/*/unet/*.safetensors")).unlink()
    assert "not complete in the local cache" in refused("some/model")
    shutil.rmtree(next(cache.rglob("trees")))  # older versions of huggingface_hub have no such folder
    assert "not complete in the local cache" in refused("some/model")


def test_an_unsupported_hub_id_is_refused_before_its_weights_are_fetched(sd1, online, tmp_path):
    for path, changes in {
        "model_index.json": {"_class_name": "FluxPipeline"},
        "unet/config.json": {"act_fn": "gelu"},
    }.items():
        with small_hub(changed_copy(sd1, tmp_path / path.partition("/")[0], path, **changes)) as hub:
            cache = online(hub.url)
            assert "supported" in refused("some/model")
            assert not [name for name in hub.asked if name.endswith(".safetensors")]
            assert not list(cache.glob("models--*"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_lora_is_merged(request, family, tmp_path):
    pytest.importorskip("peft", reason="merging LoRA weights needs peft (the extra `lora`)")
    folder, said = request.getfixturevalue(family), []
    dense = load_pipeline(folder)
    layers = {f"unet.{QUERY}": dense.unet, f"text_encoder.text_model.{TEXT_QUERY}": dense.text_encoder}
    if family == "sdxl":
        layers[f"text_encoder_2.text_model.{TEXT_QUERY}"] = dense.text_encoder_2
    inner = {key: QUERY if key.startswith("unet") else TEXT_QUERY for key in layers}
    inner |= {key: f"text_model.{TEXT_QUERY}" for key in layers if key.startswith("text_encoder_2")}
    linear = {key: module.get_submodule(inner[key]) for key, module in layers.items()}
    first, second = (write_lora(tmp_path / f"{seed}.safetensors", linear, seed=seed) for seed in (0, 1))
    lora = [{"path": str(tmp_path / "0.safetensors"), "scale": 0.5}, {"path": str(tmp_path / "1.safetensors")}]
    merged = load_pipeline(folder, lora=lora, say=said.append)
    for key in layers:
        module = getattr(merged, key.partition(".")[0]).get_submodule(inner[key])
        expected = linear[key].weight + 0.5 * first[key] + second[key]
        assert type(module) is torch.nn.Linear
        assert torch.allclose(module.weight, expected, atol=1e-5), key
    names = {name for name, _ in dense.unet.named_parameters()}
    assert {name for name, _ in merged.unet.named_parameters()} == names
    assert len(said) == 2 and f"{len(layers)} layer(s) at scale 0.5" in said[0]


def test_lora_that_does_not_fit_is_refused(sd1, tmp_path):
    pytest.importorskip("peft", reason="merging LoRA weights needs peft (the extra `lora`)")
    path = tmp_path / "lora.safetensors"
    for layers, expected in (
        ({f"unet.{QUERY}": torch.nn.Linear(7, 64)}, "size mismatch"),
        ({"unet.down_blocks.9.to_q": torch.nn.Linear(64, 64)}, "not found in the base model"),
        ({"transformer.to_q": torch.nn.Linear(64, 64)}, "no weight for this model"),
    ):
        write_lora(path, layers)
        assert expected in refused(sd1, lora=[{"path": str(path)}])
    path.write_bytes(b"12")
    assert "cannot be merged" in refused(sd1, lora=[{"path": str(path)}])
    assert "pickles" in refused(sd1, lora=[{"path": "lora.ckpt"}])
    assert "no such file" in refused(sd1, lora=[{"path": str(tmp_path / "missing")}])
    line = refused(sd1, lora=[{"path": "some/lora"}])
    assert (
        "its pytorch_lora_weights.safetensors is not complete in the local cache" in line and "give a .safeten" in line
    )


def test_without_peft(sd1, monkeypatch):
    monkeypatch.setattr("prunekit.models.lora.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'prunekit\[lora\]'"):
        load_pipeline(sd1, lora=[{"path": "any.safetensors"}])


def test_lora_in_a_recipe():
    common = {"name": "x", "prune": {"budget": 0.7}, "methods": {"norm": {}}, "fine_tune": {"steps": 1}}
    common["fine_tune"] |= {"batch_size": 1, "learning_rate": 1e-3}
    assert as_lora(None) == [] and parse_recipe(common).lora == []
    lora = parse_recipe({**common, "lora": ["a.safetensors", {"path": "b", "scale": 0.3}]}).lora
    assert [(item.path, item.scale) for item in lora] == [("a.safetensors", 1.0), ("b", 0.3)]
    assert parse_recipe({**common, "lora": "a.safetensors"}).model_dump()["lora"] == [
        {"path": "a.safetensors", "scale": 1.0}
    ]
    with pytest.raises(RecipeError, match=r"lora\.0\.scael"):
        parse_recipe({**common, "lora": [{"path": "b", "scael": 0.3}]})
