"""`prunekit generate` gives the same bytes in any order, by several processes and after kills, in bounded memory."""

import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from launching import finish, launch
from PIL import Image
from small_disk import full_at, small_disk
from small_mixture import PROMPTS, write_mixture
from small_model import TRAINING, write_world
from typer.testing import CliRunner

from prunekit import PromptRoutedPipeline, discover, slice_unet
from prunekit.cli import app
from prunekit.jobs.recipe import dump_recipe, parse_recipe
from prunekit.methods import PruneResult
from prunekit.models import load_pipeline
from prunekit.runtime.errors import UserError
from prunekit.runtime.executors import LocalExecutor
from prunekit.serving.bulk import Request, generate_to, read_metadata
from prunekit.serving.prompts import extreme_prompts, prompt_lists, shipped_prompts
from prunekit.serving.routed_directory import recipe_hash

STEPS = 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture") / "run", 4)


@pytest.fixture(scope="module")
def pipeline(run):
    pipeline = PromptRoutedPipeline.from_pretrained(run, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pictures(pipeline, tmp_path_factory):
    """Return the 64 pictures of a single process, by prompt."""
    return drawn(pipeline, tmp_path_factory.mktemp("whole"), PROMPTS[:64])


def drawn(pipeline, folder, prompts, **options):
    made = generate_to(folder, pipeline, Request(list(prompts), [0] * len(prompts), STEPS, **options))
    assert sorted(path.name for path, _ in made) == sorted(path.name for path in folder.glob("0*.*"))
    return {prompt: path.read_bytes() for prompt, (path, _) in zip(prompts, made, strict=True)}


def started(run, folder, prompts, *options):
    file = folder.parent / f"{folder.name}.txt"
    file.write_text("\n".join(prompts))
    arguments = ["generate", run, "--prompts-file", file, "--output", folder, "--steps", STEPS, *options]
    return launch(["-m", "prunekit", *arguments])[0]


def by_prompt(folder, prompts):
    return {prompt: (folder / f"{index:05d}.png").read_bytes() for index, prompt in enumerate(prompts)}


@pytest.mark.parametrize(("batch_size", "count"), [(1, 64), (4, 24)])
def test_order_changes_no_byte(pipeline, pictures, tmp_path, batch_size, count):
    prompts = PROMPTS[:count]
    expected = pictures if batch_size == 1 else drawn(pipeline, tmp_path / "in order", prompts, batch_size=batch_size)
    assert len(set(pipeline.route(prompts).tolist())) == 4
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = [prompts[row] for row in order]
    assert drawn(pipeline, tmp_path / "shuffled", shuffled, batch_size=batch_size) == expected


def test_batches_differ_by_rounding_alone(pipeline, pictures, tmp_path):
    def pixels(content):
        return np.asarray(Image.open(io.BytesIO(content))).astype(int)

    for prompt, content in drawn(pipeline, tmp_path / "eight", PROMPTS[:64], batch_size=8).items():
        assert np.abs(pixels(content) - pixels(pictures[prompt])).max() <= 2


def test_three_processes_share_the_work(run, pictures, tmp_path):
    running = [started(run, tmp_path / "out", PROMPTS[:64]) for _ in range(3)]
    for process in running:
        assert "64 pictures by aptp (4 experts)" in finish([process])[0]
    assert by_prompt(tmp_path / "out", PROMPTS[:64]) == pictures


@pytest.mark.long
def test_of_two_processes_one_is_killed(run, pipeline, pictures, tmp_path):
    folder = tmp_path / "out"
    first, second = (started(run, folder, PROMPTS[:64]) for _ in range(2))
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send(signal.SIGKILL)
    first.wait()
    finish([second])
    assert by_prompt(folder, PROMPTS[:64]) == pictures
    for index in (0, 5, 40):  # as if the other process was also killed; only missing pictures are generated
        (folder / f"{index:05d}.png").unlink()
    before = (folder / "00001.png").stat().st_mtime_ns
    assert drawn(pipeline, folder, PROMPTS[:64]) == pictures
    assert (folder / "00001.png").stat().st_mtime_ns == before


def test_a_disk_that_gets_full_stops_with_one_line_and_the_same_command_goes_on(run, pipeline, pictures, tmp_path):
    prompts = PROMPTS[:64]
    with small_disk(tmp_path) as disk:
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        folder = disk.folder / "out"
        words = ["generate", run, "--prompts-file", tmp_path / "prompts.txt", "--output", folder, "--steps", STEPS]
        for place in ("out/.work/request.json", "out/000?7.png"):
            with full_at(disk, place, left=0) as met:
                result = CliRunner().invoke(app, [str(word) for word in words])
            assert met and result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
            (said,) = result.stderr.strip().splitlines()
            assert said.startswith("prunekit: ") and f"{disk.full}: " in said and f"'{met[0]}'" in said
            assert not met[0].exists()
        kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
        assert 0 < len(kept) < len(prompts)
        assert drawn(pipeline, folder, prompts) == pictures
        assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_another_request_for_the_same_directory_is_refused(pipeline, tmp_path):
    drawn(pipeline, tmp_path / "out", PROMPTS[:2])
    with pytest.raises(ValueError, match="made with other prompts, seeds, steps"):
        generate_to(tmp_path / "out", pipeline, Request(PROMPTS[:3], [0] * 3, 5))


def test_an_executor_needs_the_source_that_it_opens(pipeline, tmp_path):
    with pytest.raises(UserError, match="executor is given without source"):
        generate_to(tmp_path / "out", pipeline, Request(PROMPTS[:1], [0], STEPS), executor=LocalExecutor())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("picture_format", ["png", "webp"])
def test_pictures_say_how_they_were_made(run, pipeline, tmp_path, picture_format):
    prompts = ["赤いりんご 🍎", "a " * 5000, ""]
    drawn(pipeline, tmp_path / "out", prompts, picture_format=picture_format)
    experts = pipeline.route(prompts).tolist()
    for index, prompt in enumerate(prompts):
        found = read_metadata(tmp_path / "out" / f"{index:05d}.{picture_format}")
        assert (found["prompt"], found["seed"], found["expert"]) == (prompt, 0, experts[index])
        assert found["recipe"] == recipe_hash(run) and found["method"] == "aptp" and found["macs"] > 0
    png = tmp_path / "png"
    drawn(pipeline, png, prompts)
    with Image.open(png / "00000.png") as one, Image.open(tmp_path / "out" / f"00000.{picture_format}") as other:
        assert np.array_equal(np.asarray(one.convert("RGB")), np.asarray(other.convert("RGB")))
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="not a picture of `prunekit generate`"):
        read_metadata(tmp_path / "plain.png")


def test_shipped_lists(pipeline):
    assert {name: len(shipped_prompts(name)) for name in prompt_lists()} == {
        "aptp-cc3m": 16,
        "aptp-coco": 16,
        "aptp-parti": 20,
    }
    with pytest.raises(ValueError, match="aptp-coco"):
        shipped_prompts("aptp-cocoo")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a finished run on a data set, pruned by Norm."""
    folder = tmp_path_factory.mktemp("world")
    recipe = parse_recipe(
        {
            **write_world(folder),
            "methods": {"norm": {"samples": 2}},
            "prune": {"budget": 0.7},
            "fine_tune": {"steps": 1, **TRAINING},
        }
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    unet = load_pipeline(folder / "model").unet
    architecture = discover(unet).random(0.7)
    PruneResult([architecture]).save(folder / "methods" / "norm")
    slice_unet(unet, architecture).save_pretrained(folder / "methods" / "norm" / "experts" / "0" / "unet")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_validation_prompts_and_lists_by_command(trained, tmp_path):
    options = ["--method", "norm", "--steps", 1, "--output", tmp_path / "out"]
    result = invoke("generate", trained, "--validation", 2, "--list", "aptp-parti", "--format", "webp", *options)
    assert result.exit_code == 0, result.output
    prompts = [read_metadata(path)["prompt"] for path in sorted((tmp_path / "out").glob("*.webp"))]
    assert len(prompts) == 22 and prompts[:20] == shipped_prompts("aptp-parti")
    assert all("number" in prompt for prompt in prompts[20:])
    for arguments, expected in (
        (["--validation", 500], "has 3 held-out captions"),
        (["--extremes", 1], "go to one expert"),
        (["--list", "aptp"], "Near names"),
        (["--prompt", "a", "--format", "gif"], "png, webp"),
        ([], "nothing to draw"),
    ):
        line = invoke("generate", trained, *options, *arguments).stderr.strip()
        assert expected in line and "\n" not in line


def test_prompts_of_the_cheapest_and_the_dearest_expert(pipeline):
    pipeline.mixture.info["result"]["macs"] = [4, 1, 3, 2]
    experts = pipeline.route(extreme_prompts(pipeline, PROMPTS, 2)).tolist()
    assert set(experts[:-2]) == {1} and experts[-2:] == [0, 0]


def test_serving_calls_unets_as_the_experts_alone_would(pipeline, monkeypatch):
    """64 mixed prompts need the UNet calls of the stock pipeline on each expert's batches. benchmarks/ has times."""
    prompts, options = PROMPTS[:64], {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    experts = pipeline.route(prompts).tolist()
    groups = [[p for p, own in zip(prompts, experts, strict=True) if own == expert] for expert in range(4)]

    def routed():
        pipeline(prompts, seeds=0, batch_size=8, **options)

    def alone():
        for expert, own in enumerate(groups):
            with pipeline.mixture.experts.use(expert) as unet:
                stock = pipeline.parts.pipeline(unet)
                stock.set_progress_bar_config(disable=True)
                for start in range(0, len(own), 8):
                    batch = sorted(own)[start : start + 8]
                    stock(batch, generator=[torch.Generator().manual_seed(0) for _ in batch], **options)

    batches, counts, forward = [], [], UNet2DConditionModel.forward

    def counted(self, sample, *given, **named):
        batches.append((self.num_parameters(), len(sample)))
        return forward(self, sample, *given, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    for call in (alone, routed):
        batches.clear()
        call()
        counts.append(sorted(batches))
    assert counts[0] == counts[1] and len(counts[0]) >= 4 * 64 // 8


PEAK = """
import json, resource, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from prunekit import PromptRoutedPipeline
pipeline = PromptRoutedPipeline.from_pretrained(sys.argv[1], device="cpu", max_resident=1)
pipeline.set_progress_bar_config(disable=True)
prompts = json.loads(sys.argv[2])
experts = pipeline(prompts, num_inference_steps=1, output_type="np", height=16, width=16).experts
print(json.dumps([len(set(experts)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.long
def test_one_resident_expert_bounds_the_memory(tmp_path):
    """Four experts with at most one in memory need no more memory than the largest expert alone."""
    write_mixture(tmp_path / "run", 4, channels=(64, 128, 192, 192))
    pipeline = PromptRoutedPipeline.from_pretrained(tmp_path / "run", device="cpu", max_resident=1)
    pipeline.save_pretrained(tmp_path / "saved")
    routed = pipeline.route(PROMPTS).tolist()
    largest = max(range(4), key=pipeline.mixture.experts.size)
    size = pipeline.mixture.experts.size(largest)
    one = [prompt for prompt, expert in zip(PROMPTS, routed, strict=True) if expert == largest][:4]
    mixed = [PROMPTS[routed.index(expert)] for expert in (0, 1, 2, 3)]
    peaks = []
    for prompts in (one, mixed):
        arguments = [sys.executable, "-c", PEAK, str(tmp_path / "saved"), json.dumps(prompts)]
        count, peak = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
        assert count == len({routed[PROMPTS.index(prompt)] for prompt in prompts})
        peaks.append(peak * 1024)
    assert size > 15e6 and peaks[1] - peaks[0] <= 0.2 * size, (peaks, size)
