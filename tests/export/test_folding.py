"""Folded modulation layers: tables are exact at their steps, ranks have the measured error, and both open elsewhere."""

import importlib.util
import sys

import pytest
import torch
from small_transformer_pipelines import make
from small_transformers import build, call_of
from torch.utils.flop_counter import FlopCounterMode
from unets import build as build_unet
from unets import relative_error

import prunekit as pk
from prunekit.core.call import predict
from prunekit.core.registry import denoiser_of
from prunekit.core.timesteps import TimestepBins, TimestepModel
from prunekit.export import load_denoiser, save_denoiser
from prunekit.export.folding import (
    FoldingPlan,
    Recorded,
    fold_modulation,
    modulation_of,
    output_errors,
    project_lora,
    record_modulation,
)
from prunekit.export.inputs import Called
from prunekit.export.tiers import write_class_file
from prunekit.export.verification import Claim, Expected, verify
from prunekit.models import load_pipeline
from prunekit.models.names import EMBEDDED_DIRECTORIES
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json
from prunekit.serving.exporting import export

STEPS = 5
CUT = 1  # seed of the architectures


def cut_of(model):
    return pk.slice_model(model, pk.discover(model, "all").random(0.6, CUT))


def recorded_of(model, count=40, seed=0):
    """Return the modulation layers' inputs in random calls, with made-up timesteps that differ from each other."""
    seen = []
    embedding = model.get_submodule(modulation_of(model).embedding)
    handle = embedding.register_forward_hook(
        lambda module, given, output: seen.append(torch.nn.functional.silu(output))
    )
    predict(model, call_of(model, count, seed=seed))
    handle.remove()
    return Recorded([137.0 + 211 * index for index in range(count)], seen[0].detach().double())


@pytest.fixture(scope="module")
def qwen_image():
    """Return a pipeline with a pruned Qwen-Image, and arguments of its call."""
    pipeline, options = make("qwen_image", load_pipeline("emoji"))
    pipeline.transformer = cut_of(pipeline.transformer)
    return pipeline, {**options, "guidance": options.pop("true_cfg_scale")}


def test_a_table_is_exact_at_the_samplers_steps(qwen_image):
    pipeline, options = qwen_image
    recorded = record_modulation(pipeline, None, num_inference_steps=STEPS, **options)
    folded = fold_modulation(pipeline.transformer, recorded)
    assert "forward" not in vars(pipeline.transformer) and len(folded.basis) == STEPS
    errors = output_errors(pipeline, {"table": folded.model}, None, num_inference_steps=STEPS, **options)["table"]
    assert errors["calls"] == STEPS and errors["max"] <= 1e-5
    report = folded.report
    assert report["after"]["parameters"] < 0.7 * report["before"]["parameters"]
    assert report["after"]["parameters"] == sum(parameter.numel() for parameter in folded.model.parameters())
    assert report["modulation_after"] * 64 == report["modulation_before"] * STEPS
    with pytest.raises(UserError, match="is not in this model's table of 5 modulations") as error:
        output_errors(pipeline, {"table": folded.model}, None, num_inference_steps=STEPS + 1, **options)
    assert "\n" not in str(error.value)
    nearest = fold_modulation(pipeline.transformer, recorded, nearest=True).model
    errors = output_errors(pipeline, {"table": nearest}, None, num_inference_steps=STEPS + 1, **options)["table"]
    assert 1e-4 < errors["mean"] < 1
    half = folded.model.to(torch.bfloat16)  # in bfloat16, the pipeline rounds its timesteps
    call = call_of(half, STEPS).to("cpu", torch.bfloat16)
    rounded = torch.tensor(half.config.folding["timesteps"]).bfloat16() / 1000
    assert predict(half, call.replace(timestep=rounded)).isfinite().all()


@pytest.mark.parametrize("name", ["sd35", "flux", "qwen_image"])
def test_a_full_rank_loses_nothing_and_a_lower_one_what_is_reported(name):
    model = cut_of(build(name))
    recorded, call = recorded_of(model, 65), call_of(model, seed=3)
    held_out = recorded_of(model, 20, seed=3)
    full = fold_modulation(model, recorded, rank=64, held_out=held_out)
    with torch.no_grad():
        assert relative_error(predict(full.model, call), predict(model, call)) <= 1e-5
    errors = {row["rank"]: row["error"] for row in full.report["errors"]}
    assert list(errors) == [1, 2, 4, 8, 16, 32, 64] and errors[64] <= 1e-6 < errors[32] < errors[8] < errors[1]
    low = fold_modulation(model, recorded, rank=8, held_out=held_out)
    assert [row["error"] for row in low.report["errors"] if row["rank"] == 8] == pytest.approx([errors[8]], rel=1e-6)
    squares = torch.zeros(2)
    code = low.model.get_submodule("time_text_embed").code
    codes = torch.cat([code(held_out.inputs.float()), torch.ones(20, 1)], dim=1)
    for path, linear in modulation_of(model).linears(model).items():
        expected = linear(held_out.inputs.float())
        rest = low.model.get_submodule(path)(codes) - expected
        squares += torch.stack([rest.square().sum(), expected.square().sum()]).detach()
    assert (squares[0] / squares[1]).sqrt() == pytest.approx(errors[8], rel=1e-3)


@pytest.mark.parametrize("name", ["sd35", "flux", "qwen_image"])
def test_costs_are_exact_and_a_folded_model_can_be_cut(name):
    model = build(name)
    recorded = recorded_of(model)
    folded = fold_modulation(model, recorded, rank=8).model
    space = pk.discover(folded, "all")
    assert space == pk.discover(model, "all")
    architecture = space.random(0.6, CUT)
    cut, call = pk.slice_model(folded, architecture), call_of(model)
    with torch.no_grad(), pk.gated(folded, space) as gates:
        gates.set(architecture)
        assert relative_error(predict(cut, call), predict(folded, call)) <= 1e-5
    cost = pk.CostModel(folded, space, (8, 6), 5)
    assert cost.params(architecture) == sum(parameter.numel() for parameter in cut.parameters())
    with torch.device("meta"):
        shape = type(cut)(**cut.config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(shape, call_of(shape, 1, (8, 6)).to("meta"))
    assert 2 * cost.macs(architecture) == counter.get_total_flops()
    assert denoiser_of(cut).stock(pk.slice_model(folded, space.full())) is None


@pytest.fixture(scope="module")
def models(qwen_image):
    """Return folded models by name: a pruned Qwen-Image folded to a table, and others folded to a rank."""
    pipeline, options = qwen_image
    table = fold_modulation(
        pipeline.transformer, record_modulation(pipeline, None, num_inference_steps=STEPS, **options)
    )
    models = {"table": table}
    for name in ("sd35", "flux"):
        model = cut_of(build(name))
        models[name] = fold_modulation(model, recorded_of(model), rank=4)
    return models


@pytest.mark.parametrize("name", ["table", "sd35", "flux"])
def test_the_class_file_folds_as_the_package(name, models, tmp_path):
    model = models[name].model
    spec = importlib.util.spec_from_file_location(f"modeling_of_folded_{name}", write_class_file(type(model), tmp_path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    own = getattr(module, type(model).__name__).from_config(model.config).eval()
    own.load_state_dict(model.state_dict())
    inputs = Expected.of(model, 5).pairs[0]
    assert torch.equal(Called(own, inputs[0])(**inputs[0].tensors), inputs[1])


@pytest.mark.long
def test_they_open_in_a_fresh_process_without_prunekit(tmp_path, models):
    claims = []
    for name, folded in models.items():
        assert save_denoiser(folded.model, tmp_path / name)["tier"] == "class"
        folded.save(tmp_path / name)
        claims.append(Claim("class", name, tmp_path / name, Expected.of(folded.model, 5), with_prunekit=False))
        again = load_denoiser(tmp_path / name, verify=True)
        assert again.config["folding"] == folded.model.config["folding"]
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in folded.model.state_dict().items())
    assert max(line["relative_error"] for line in verify(claims)) <= 1e-5


def test_a_lora_is_projected(tmp_path):
    model = build("qwen_image")
    recorded = recorded_of(model, 4)
    folded = fold_modulation(model, recorded)
    folded.save(tmp_path)
    path, other = "transformer_blocks.1.img_mod.1", "transformer_blocks.1.attn.to_q"
    state = {}
    for layer in (path, other):
        linear = model.get_submodule(layer)
        state[f"transformer.{layer}.lora_A.weight"] = torch.randn(3, linear.in_features)
        state[f"transformer.{layer}.lora_B.weight"] = torch.randn(linear.out_features, 3)
    down, up = (state[f"transformer.{path}.lora_{side}.weight"] for side in "AB")
    projected = project_lora(state, folded.model, tmp_path)
    weight = folded.model.get_submodule(path).weight.detach() + up @ projected[f"transformer.{path}.lora_A.weight"]
    with torch.no_grad():
        model.get_submodule(path).weight += up @ down
    assert relative_error(weight, fold_modulation(model, recorded).model.get_submodule(path).weight) <= 1e-6
    changed = [name for name in state if projected[name] is not state[name]]
    assert changed == [f"transformer.{path}.lora_A.weight"]
    for wrong, message in (
        ({"transformer.time_text_embed.timestep_embedder.linear_1.lora_A.weight": down}, "changes the embedding"),
        ({f"transformer.{path}.lora_A.weight": down[:, 1:]}, "another model's"),
    ):
        with pytest.raises(UserError, match=message):
            project_lora(wrong, folded.model, folded.basis)
    with pytest.raises(UserError, match="not folded"):
        project_lora(state, model, folded.basis)
    with pytest.raises(UserError, match="not the folder of a folded model"):
        project_lora(state, folded.model, tmp_path / "none")


def test_what_cannot_be_folded(tmp_path):
    model = build("sd35")
    recorded = recorded_of(model, 4)
    folded = fold_modulation(model, recorded, rank=2).model
    sliced = TimestepModel([folded, folded], TimestepBins((500.0,)))
    assert "folding" in folded.config and not {"folding", "pruning"} & sliced.config.keys()
    newer = {**folded.config, "folding": {"format": 2, "kind": "rank", "rank": 2}}
    wrong = [
        (lambda: fold_modulation(model, recorded), "the pooled text does too"),
        (lambda: fold_modulation(model, recorded, rank=4), "between 1 and 3"),
        (lambda: fold_modulation(folded, recorded, rank=2), "folded already"),
        (lambda: fold_modulation(sliced, recorded, rank=2), "give one of its `slices`"),
        (lambda: project_lora({}, sliced, torch.zeros(1, 1)), "give one of its `slices`"),
        (lambda: modulation_of(build_unet("sd1")), "no modulation layers"),
        (lambda: modulation_of(build("pixart")), "no modulation layers"),
        (lambda: type(folded)(**newer), "format 2"),
        (lambda: FoldingPlan.parse("rank"), "give table=N"),
        (lambda: FoldingPlan.parse("rank=0"), "give table=N"),
        (lambda: export(tmp_path, tmp_path / "out", "onnx", fold_modulation="rank=2"), "of tier class, not onnx"),
    ]
    for call, message in wrong:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert FoldingPlan.parse("table=50@1328x1024").options == {"width": 1328, "height": 1024}
    save_denoiser(model, tmp_path / "model")
    with pytest.raises(UserError, match="give a run or a pipeline's directory"):
        export(tmp_path / "model", tmp_path / "out", fold_modulation="rank=2")


@pytest.mark.long
def test_the_command_folds(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["red apple", "a blue house", "two green dogs", "old moon", "a cat", "rain"]))
    source = EMBEDDED_DIRECTORIES["emoji-sd3"]
    exported = export(source, tmp_path / "out", fold_modulation="rank=48", prompts_file=prompts)
    assert exported.tiers == ["class"] and len(exported.checked) == 3
    report = read_json(tmp_path / "out" / "transformer" / "folding.json")
    assert report["held_out"] == 2 * 2 * 20 and report["output_error"]["calls"] == 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "folded to 48 directions" in card and f"{report['after']['parameters']:,} after" in card
    drawn = pk.PromptRoutedPipeline.from_pretrained(tmp_path / "out", device="cpu")(
        ["red apple"], num_inference_steps=2, seeds=0, output_type="np"
    )
    assert drawn.images.shape[-1] == 3
