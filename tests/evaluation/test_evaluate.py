"""`prunekit evaluate`: the same figures for runs and pipelines, resumption, other protocols, and invalid input."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from small_clip import write_clip
from small_model import CAPTIONS, TRAINING, write_world
from transformers import CLIPModel
from typer.testing import CliRunner

import prunekit as pk
from prunekit.cli import app
from prunekit.data.config import load_data
from prunekit.evaluation.clip import CLIPEvaluator
from prunekit.evaluation.comparison import Prompts
from prunekit.evaluation.features import Features, load_evaluator
from prunekit.evaluation.figures import REAL_STATISTICS, Seen, figures
from prunekit.evaluation.generate import read_pictures
from prunekit.evaluation.metrics import frechet_distance, pick_scores
from prunekit.evaluation.protocols import PICK_SCORE, load_data_config, load_protocol
from prunekit.jobs.run import start
from prunekit.runtime.digests import Digests

AS_THE_RUN = ("steps=2", "batch_size=2")
FIGURES = ("cmmd", "kid", "clip_score", "top1", "top5")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with a finished run of two experts, its pipeline, captioned pictures, and a CLIP model."""
    folder = tmp_path_factory.mktemp("world")
    content = {
        **write_world(folder),
        "prune": {"budget": 0.7},
        "methods": {"aptp": {"experts": 2, "warmup": 2, "search": {"steps": 6, **TRAINING}}},
        "fine_tune": {"steps": 1, **TRAINING},
        "evaluation": {"num_images": 6, "steps": 2, "batch_size": 2, "num_predictions": 8, "num_pictures": 2},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    start(folder / "small.yaml", (), folder / "run")
    (folder / "photos").mkdir()
    for index, caption in enumerate(CAPTIONS):
        color = (20 * index, 255 - 20 * index, 128)
        Image.new("RGB", (40, 48), color).save(folder / "photos" / f"{index:02d}.png")
        (folder / "photos" / f"{index:02d}.txt").write_text(caption)
    write_clip(folder / "clip")
    (folder / "routed").mkdir()
    (folder / "routed" / "model_index.json").write_text("{}")
    shutil.copytree(folder / "clip", folder / "half")
    whole = load_file(folder / "clip" / "model.safetensors")
    texts = {name: value for name, value in whole.items() if not name.startswith("vision")}
    save_file(texts, folder / "half" / "model.safetensors", {"format": "pt"})
    return folder


def captions(world, *settings):
    """Return changes of a protocol's settings so that small models can follow it."""
    names = (f"{key}={world / 'clip'}" for key in ("clip_model", "cmmd_model", "pick_model", "feature_model"))
    return [*names, "steps=2", "batch_size=4", "resolution=32", "compare_at=24", *settings]


@pytest.fixture(scope="module")
def evaluated(world):
    """Evaluate the run and its pipeline."""
    return pk.evaluate([world / "run", world / "model"], "emoji", None, 6, AS_THE_RUN, world / "first")


def test_a_run_gets_the_figures_of_its_own_table(world, evaluated):
    rows = {row["name"]: row for row in evaluated.rows}
    assert list(rows) == ["run dense", "run aptp", "model"]
    table = json.loads((world / "run" / "results.json").read_text())["table"]["rows"]
    for own in table:
        found = rows[f"run {own['name']}"]
        keys = [key for key in FIGURES if key in own]  # figures that the evaluator can judge
        assert {"cmmd", "kid"} <= set(keys)
        assert {key: found["figures"][key]["value"] for key in keys} == {key: own[key] for key in keys}
        assert found["params"] == own["params"] and found["images"] == 6
        assert found["figures"]["cmmd"]["count"] == 6 and found["figures"]["top1"]["count"] == 3
        if own["name"] != "aptp":  # aptp's mean is over other prompts
            assert found["macs"] == own["macs"] and found["macs_ratio"] == own["macs_ratio"]
    assert rows["model"]["figures"] == rows["run dense"]["figures"] and rows["model"]["macs_ratio"] is None
    assert 0 < rows["run aptp"]["macs_ratio"] < 1
    for figure in rows["run aptp"]["figures"].values():
        assert figure["high"] - figure["value"] == pytest.approx(1.96 * figure["error"])


def test_what_is_there_is_not_made_again(world, evaluated):
    folder = evaluated.folder
    kept = {path: path.stat().st_mtime_ns for name in ("pictures", "features") for path in (folder / name).rglob("*.*")}
    lost = folder / evaluated.rows[0]["pictures"] / "00003.png"
    content = lost.read_bytes()
    lost.unlink()
    again = pk.evaluate([world / "run", world / "model"], "emoji", None, 6, AS_THE_RUN, folder, say=lambda text: None)
    assert again.rows == evaluated.rows and lost.read_bytes() == content
    now = {path: path.stat().st_mtime_ns for path in kept}
    changed = {path for path in kept if now[path] != kept[path]}
    assert lost in changed and changed <= {lost, lost.with_name("00002.png")}  # the other picture of its batch


def test_captions_of_a_folder_under_other_settings(world):
    metrics = "metrics=[cmmd,kid,frechet,clip_score,pick_score]"
    statistics = world / "real.npz"
    real = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.savez(statistics, mu=real.mean(0).numpy(), sigma=real.T.cov().numpy())
    settings = captions(world, "metrics=[clip_score,pick_score,cmmd]")
    command = ["evaluate", world / "model", *settings, "--protocol", "aptp", "--data", world / "photos"]
    result = CliRunner().invoke(app, [*map(str, command), "--output", str(world / "photos-out")])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "There are 12 prompts, fewer than num_images=30,000" in result.stdout and "PickScore" in result.stdout
    content = json.loads((world / "photos-out" / "results.json").read_text())
    (row,) = content["rows"]
    assert row["images"] == 12 and content["references"] == 12 and content["protocol"]["scheduler"] == "pndm"
    table = (world / "photos-out" / "table.md").read_text()
    assert "32 px, measured at 24 px; PNDM, 2 steps" in table and "kind=folder" in table
    paths = sorted((world / "photos-out" / row["pictures"]).glob("*.png"))
    assert Image.open(paths[0]).size == (32, 32)
    pictures = read_pictures(paths, 24)
    asked = json.loads((paths[0].parent / "request.json").read_text())["prompts"]
    assert sorted(asked) == sorted(CAPTIONS)
    clip = CLIPEvaluator.from_pretrained(world / "clip")
    logits = logits_of(world / "clip", clip, pictures, asked)
    scale = float(clip.logit_scale.exp())
    assert row["figures"]["pick_score"]["value"] == pytest.approx(float(logits.mean()), rel=1e-5)
    expected = 100 * float(logits.clamp(min=0).mean()) / scale
    assert row["figures"]["clip_score"]["value"] == pytest.approx(expected, rel=1e-5)
    # A Fréchet distance needs ten pictures per feature, so statistics of 8 features need 80 generated pictures.
    few = refused(*command, "--output", world / "photos-out", metrics, f"statistics={statistics}")
    assert "8 features needs at least 80 pictures" in few and "there are 12 pictures to draw" in few


def logits_of(folder, clip, pictures, texts):
    """Return the logits (n,) of each picture and its text by transformers' model."""
    model = CLIPModel.from_pretrained(folder).eval()
    side = model.config.vision_config.image_size
    pixels = torch.nn.functional.interpolate(pictures.float() / 255, (side, side), mode="bicubic", antialias=True)
    tokens = clip.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=(pixels.clamp(0, 1) - clip.mean) / clip.deviation)
    return output.logits_per_image.diagonal()


def test_prompts_of_a_file(world, tmp_path):
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\na "red" ball\tArts\nblue star\tArts\ngreen cube\tArts\n')
    settings = captions(world, f"prompts={parti}", "metrics=[pick_score]")
    done = pk.evaluate(str(world / "model"), "aptp", overrides=settings, output=tmp_path / "out")
    assert done.rows[0]["figures"]["pick_score"]["count"] == 3
    asked = json.loads((done.folder / done.rows[0]["pictures"] / "request.json").read_text())["prompts"]
    assert asked == ['a "red" ball', "blue star", "green cube"]
    assert "real" in refused("evaluate", world / "model", f"prompts={parti}", "--protocol", "aptp")


def test_frechet_distance_to_pictures_and_to_their_statistics(world, tmp_path):
    """The figure is the same with real pictures and with a file of their statistics."""
    photos = load_data(load_data_config(world / "photos"), 0, tmp_path)
    draws, paths = torch.Generator().manual_seed(0), [tmp_path / f"{index}.png" for index in range(20)]
    for path in paths:
        Image.fromarray(torch.randint(0, 256, (24, 24, 3), dtype=torch.uint8, generator=draws).numpy()).save(path)
    clip = CLIPEvaluator.from_pretrained(world / "clip")
    real = clip.features(photos.pixels(range(photos.num_images), 24)).double()
    prompts = Prompts(photos, [""] * 20, torch.zeros(20, dtype=torch.long), 0, [0] * 20, torch.zeros(20, 1))
    found = []
    for more in ((), (f"statistics={tmp_path / REAL_STATISTICS}",)):  # the first evaluation writes this file
        protocol = load_protocol("bksdm", ["metrics=[frechet]", f"feature_model={world / 'clip'}", *more])
        features = Features(tmp_path / "features", Digests())
        found.append(figures(Seen(protocol, features, prompts, paths, 24))["frechet"])
    expected = frechet_distance(real, clip.features(read_pictures(paths)))
    assert [figure["value"] for figure in found] == pytest.approx([expected] * 2, rel=1e-6)
    assert found[0]["error"] == pytest.approx(found[1]["error"]) and found[0]["error"] > 0 and found[0]["count"] == 20


def refused(*arguments) -> str:
    """Run a command that must fail, and return its only line on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit) and result.exit_code not in (0, None), repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("prunekit: "), result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("emoji", "--protocol", "emoij"), "no protocol 'emoij'; did you mean 'emoji'?"),
        (("emoji", "stepz=3"), "unknown setting stepz; did you mean 'steps'?"),
        (("emoji", "steps=0"), "steps=0: Input should be greater than 0"),
        (("emoji", "metrics=[fid]"), "Input should be 'cmmd', 'kid', 'frechet'"),
        (("emoji", "metrics=[frechet]"), "384 features needs at least 3,840 pictures"),
        (("emoji", "metrics=[frechet]", "--images", "5000"), "there are 2,309 pictures to draw"),
        (("emoji", "ask=captions"), "top1, top5 need pictures requested by name"),
        (("emoji", "--protocol", "aptp"), "protocol aptp needs captioned pictures: give --data"),
        (("emoji", "--data", "{kind: coko}"), "data.kind='coko'"),
        (("emoji", "--data", "{kind: coco, paht: x}"), "unknown setting data.paht; did you mean 'path'?"),
        (("emoji", "--data", "nowhere"), "no data at nowhere"),
        (
            ("emoji", "prompts=nothing.txt", "ask=captions", "metrics=[clip_score]"),
            "prompts=nothing.txt cannot be read",
        ),
        (("{world}",), "cannot be evaluated"),
        (("{world}/nothing",), "no directory"),
        (("{world}/routed",), "has no unet/: of routed experts that were exported, evaluate their run"),
        (("{world}/first", "steps=1"), "cannot be evaluated"),
        (("emoji", "--data", "{world}/bare"), "a.png has no caption"),
        (("emoji", "clip_model={world}/model"), "cannot load the evaluator"),
        (("emoji", "clip_model={world}/half"), "weights are missing"),
        (("steps=1",), "nothing to evaluate: give a run"),
    ],
)
def test_bad_input_is_one_line(arguments, message, world, evaluated, tmp_path):
    (world / "bare").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(world / "bare" / "a.png")
    given = [argument.format(world=world) if "{world}" in argument else argument for argument in arguments]
    assert message in refused("evaluate", *given, "--output", tmp_path)
    assert not (tmp_path / "pictures").exists()


def at_hand(name):
    """Load an evaluator, or skip the test with the reason why it is missing."""
    try:
        return load_evaluator(name)
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))


def test_inception_equals_clean_fid():
    ours, pictures = at_hand("inception"), some_pictures()
    from cleanfid.features import build_feature_extractor
    from cleanfid.resize import build_resizer

    resize = build_resizer("legacy_pytorch")
    resized = [torch.from_numpy(resize(p.permute(1, 2, 0).numpy())).permute(2, 0, 1) for p in pictures]
    theirs = build_feature_extractor("legacy_pytorch", torch.device("cpu"), use_dataparallel=False)
    with torch.no_grad():
        expected = theirs(torch.stack(resized).float())
    torch.testing.assert_close(ours.features(pictures), torch.as_tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-336", PICK_SCORE])
def test_clip_scores_equal_the_logits_of_published_models(name):
    clip, pictures, texts = at_hand(name), some_pictures(), ["a red ball", "noise", "a photo"]
    scores = pick_scores(clip.embed_images(pictures), clip.embed_texts(texts), float(clip.logit_scale.exp()))
    torch.testing.assert_close(scores, logits_of(name, clip, pictures, texts).double(), rtol=1e-4, atol=1e-4)


def some_pictures():
    return torch.randint(0, 256, (3, 3, 80, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(importlib.util.find_spec("cleanfid") is not None, reason="the extra metrics is installed")
def test_inception_names_its_extra(tmp_path):
    message = refused("evaluate", "emoji", "feature_model=inception", "metrics=[frechet]", "--output", tmp_path)
    assert "pip install 'prunekit[metrics]'" in message
