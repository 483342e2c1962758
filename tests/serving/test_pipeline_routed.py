"""PromptRoutedPipeline: each image is its expert's, in any batch, thread and process, and memory is bounded."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from small_mixture import PROMPTS, write_mixture
from small_transformer_pipelines import write

from prunekit import CostModel, PromptRoutedPipeline, discover
from prunekit.export.model_folder import load_denoiser
from prunekit.models import load_pipeline
from prunekit.runtime.errors import UserError
from prunekit.serving.drawer import Drawer
from prunekit.serving.experts import Experts

STEPS = 2
FAMILIES = ("sd2", "sd1", "sdxl")


@pytest.fixture(
    scope="module", params=["sd2", *(pytest.param(name, marks=pytest.mark.long) for name in FAMILIES if name != "sd2")]
)
def run(request, tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp(request.param) / "run", 2, request.param)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("four") / "run", 4)


def opened(directory, **options):
    pipeline = PromptRoutedPipeline.from_pretrained(directory, device="cpu", **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def served(four):
    """Return a pipeline for tests that do not change it."""
    return opened(four)


def stock_image(run, expert, prompt, seed, scheduler=None, **options):
    """Return the image that plain diffusers generates with one expert in the base pipeline."""
    pipeline = load_pipeline(run / "model")
    pipeline.unet = load_denoiser(run / "methods" / "aptp" / "experts" / str(expert) / "unet")
    if scheduler is not None:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np", **options}
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]


def test_experts_in_memory_are_frozen_and_draw_as_the_saved_ones(four, served):
    experts = [load_denoiser(four / "methods" / "aptp" / "experts" / str(i) / "unet") for i in range(4)]
    for expert in experts:
        expert.train().requires_grad_(True)
    pipeline = PromptRoutedPipeline.from_experts(load_pipeline(four / "model"), experts, served.mixture.router)
    pipeline.set_progress_bar_config(disable=True)
    for expert in experts:
        assert not any(part.training for part in expert.modules())
        assert not any(weight.requires_grad for weight in expert.parameters())
    ours, theirs = (p(PROMPTS[0], seeds=0, num_inference_steps=1, output_type="np") for p in (pipeline, served))
    assert ours.experts == theirs.experts and np.array_equal(ours.images, theirs.images)
    with pytest.raises(ValueError, match="give as many experts as the router has"):
        PromptRoutedPipeline.from_experts(load_pipeline(four / "model"), experts[:3], served.mixture.router)


@pytest.mark.parametrize("negative", [None, "a dog"])
def test_an_image_is_the_one_that_plain_diffusers_draws(run, negative):
    pipeline = opened(run)
    prompts = [*PROMPTS[:5], ""]
    drawn = pipeline(prompts, negative, STEPS, 3.0, seeds=range(6), output_type="np")
    assert set(drawn.experts) == {0, 1}
    for row in (0, drawn.experts.index(1 - drawn.experts[0]), 5):
        own = stock_image(run, drawn.experts[row], prompts[row], row, negative_prompt=negative)
        assert np.array_equal(own, drawn.images[row])
    backwards = pipeline(prompts[::-1], negative, STEPS, 3.0, seeds=range(5, -1, -1), output_type="np")
    assert np.array_equal(backwards.images[::-1], drawn.images)
    together = pipeline(prompts, negative, STEPS, 3.0, seeds=range(6), output_type="np", batch_size=4)
    assert np.abs(together.images - drawn.images).max() <= 2 / 255 and together.experts == drawn.experts


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_any_scheduler(four, scheduler):
    pipeline = opened(four)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    drawn = pipeline(PROMPTS[:3], None, STEPS, 3.0, seeds=4, output_type="np")
    own = stock_image(four, drawn.experts[2], PROMPTS[2], 4, scheduler)
    assert np.array_equal(own, drawn.images[2])


def test_macs_are_those_of_the_unet_calls(run):
    pipeline = opened(run)
    drawn = pipeline(PROMPTS[:6], None, 3, 3.0, height=32, width=48, seeds=0, output_type="latent")
    scale = pipeline.parts.pipeline(None).vae_scale_factor
    counted = []
    with pipeline.mixture.experts.use(drawn.experts[0]) as unet:
        hook = unet.register_forward_pre_hook(lambda module, inputs, options: counted.append(1), with_kwargs=True)
        pipeline(PROMPTS[0], None, 3, 3.0, height=32, width=48, seeds=0, output_type="latent")
        hook.remove()
        cost = CostModel(unet, discover(unet, "none"), (32 // scale, 48 // scale), pipeline.tokenizer.model_max_length)
    assert drawn.macs[0] == 2 * len(counted) * cost.dense_macs
    assert drawn.images.shape[-2:] == (32 // scale, 48 // scale)
    unguided = pipeline(PROMPTS[0], None, 3, 1.0, height=32, width=48, seeds=0, output_type="latent")
    assert 2 * unguided.macs[0] == drawn.macs[0]


def test_experts_may_be_named(four, served):
    options = {"seeds": 1, "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    drawn = served([PROMPTS[0], PROMPTS[0]], experts=[2, 0], num_images_per_prompt=2, **options)
    assert drawn.experts == [2, 2, 0, 0] and drawn.seeds == [1, 2, 1, 2]
    for row, (expert, seed) in enumerate(zip(drawn.experts, drawn.seeds, strict=True)):
        assert np.array_equal(stock_image(four, expert, PROMPTS[0], seed), drawn.images[row])


def test_arguments_of_the_stock_pipelines(served):
    pipeline = served
    plain = pipeline(PROMPTS[:2], seeds=[5, 6], num_inference_steps=STEPS, output_type="np")
    for kind, check in {
        "pt": lambda images: torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(plain.images)),
        "pil": lambda images: np.array_equal(np.asarray(images[1]), (plain.images[1] * 255).round().astype("uint8")),
    }.items():
        given = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        assert check(pipeline(PROMPTS[:2], generator=given, num_inference_steps=STEPS, output_type=kind).images)
    several = pipeline(PROMPTS[0], seeds=5, num_images_per_prompt=3, num_inference_steps=STEPS, output_type="np")
    assert several.seeds == [5, 6, 7] and np.array_equal(several.images[0], plain.images[0])
    one = [pipeline(PROMPTS[:2], generator=torch.Generator().manual_seed(1), num_inference_steps=1) for _ in range(2)]
    assert one[0].seeds == one[1].seeds and len(set(one[0].seeds)) == 2
    assert len(set(pipeline(PROMPTS[:2], num_inference_steps=1).seeds)) == 2
    images, experts, *_ = pipeline(PROMPTS[:2], seeds=[5, 6], num_inference_steps=1, return_dict=False)
    assert len(images) == 2 and experts == plain.experts


def test_the_length_of_a_text_needs_no_expert(four):
    pipeline = opened(four)
    assert pipeline.text_length == pipeline.tokenizer.model_max_length
    assert pipeline.mixture.experts.resident == []


@pytest.mark.parametrize("name", ["sd35", "flux", "pixart"])
def test_transformers(name, tmp_path):
    pipeline = opened(write(tmp_path / "model", name, load_pipeline("emoji")))
    options = {"use_resolution_binning": False} if name == "pixart" else {}
    seen, drawer = [], Drawer(pipeline)
    drawn = pipeline(
        PROMPTS[:2], num_inference_steps=2, guidance_scale=3.0, height=16, width=32, seeds=0, batch_size=2, **options
    )
    assert all(image.size == (32, 16) for image in drawn.images) and drawn.macs[0] > 0
    assert drawer.multiple == (16 if name == "sd35" else 8)
    if name != "pixart":  # PixArt uses sizes from a fixed table
        size, negatives = (drawer.multiple, 2 * drawer.multiple), ["", "a dog"]
        pictures = drawer.draw(PROMPTS[:2], [0, 1], 0, 2, 3.0, negatives, size, lambda *given: seen.append(given))
        assert seen == [(1, 2), (2, 2)] and {picture.image.size for picture in pictures} == {size[::-1]}


def test_a_single_step_is_drawn_or_refused_in_one_line(tmp_path):
    """With a single step, PixArt-α uses a second output of the scheduler, which its own scheduler does not return."""
    pipeline = opened(write(tmp_path / "model", "pixart", load_pipeline("emoji")))
    options = {"num_inference_steps": 1, "height": 16, "width": 16, "seeds": 0, "output_type": "np"}
    with pytest.raises(UserError, match=r"^num_inference_steps=1: .* needs at least 2$"):
        pipeline("red apple", **options)
    assert np.isfinite(pipeline("red apple", **{**options, "num_inference_steps": 2}).images).all()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert np.isfinite(pipeline("red apple", **options).images).all()


def test_callbacks_see_each_batch(served):
    seen, pipeline = [], served

    def callback(stock, step, timestep, tensors):
        seen.append((tuple(stock.image_indices), step, tensors["latents"].shape[0]))
        return {"latents": torch.zeros_like(tensors["latents"])}

    drawn = pipeline(
        PROMPTS[:8],
        seeds=0,
        num_inference_steps=STEPS,
        batch_size=2,
        callback_on_step_end=callback,
        output_type="latent",
    )
    rows = [row for indices, step, _ in seen if step == 0 for row in indices]
    assert sorted(rows) == list(range(8)) and all(len(indices) == size for indices, _, size in seen)
    assert not drawn.images.any()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"prompt": []}, "at least one"),
        ({"prompt": ["a", 3]}, "list of texts"),
        ({"prompt": ["a", "b"], "seeds": [1, 2, 3]}, "3 entries for 2 prompts"),
        ({"prompt": "a", "seeds": 1, "generator": torch.Generator()}, "both given"),
        ({"prompt": ["a", "b"], "generator": [torch.Generator()] * 3}, "3 entries for 2 images"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "1 texts for 2 prompts"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "at least 1"),
        ({"prompt": "a", "batch_size": 0}, "at least 1"),
        ({"prompt": "a", "experts": [0, 1]}, "experts has 2 entries for 1 prompts"),
        ({"prompt": "a", "experts": [4]}, "expert 4: there are 4"),
        ({"prompt": "a", "output_type": "jpg"}, "pil, np, pt, latent"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1)}, "batches prompts by expert"),
        ({"prompt": "a", "guidence": 3}, "not an argument of StableDiffusionPipeline"),
    ],
)
def test_what_does_not_fit_is_refused(served, arguments, expected):
    with pytest.raises(ValueError, match=expected) as error:
        served(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", ["", "ab " * 3400, "赤いりんご", "красное яблоко", "🍎" * 40, "\n\t"])
def test_any_prompt_works(served, prompt):
    drawn = served([prompt, PROMPTS[0]], seeds=1, num_inference_steps=1, output_type="np")
    assert np.isfinite(drawn.images).all() and drawn.images[0].std() > 0


def test_threads_equal_the_serial_result(four):
    pipeline = opened(four, max_resident=2)
    parts = [PROMPTS[start : start + 8] for start in range(0, 64, 8)]
    options = {"num_inference_steps": 1, "seeds": 3, "output_type": "np"}
    serial = [pipeline(part, **options) for part in parts]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda part: pipeline(part, **options), parts))
    for first, second in zip(serial, threaded, strict=True):
        assert np.array_equal(first.images, second.images) and first.experts == second.experts
    assert len(pipeline.mixture.experts.resident) <= 2


def test_the_least_recently_used_expert_goes(four):
    experts = opened(four, max_resident=2).mixture.experts
    for index in (0, 1, 0, 2):
        with experts.use(index) as unet:
            kept = weakref.ref(unet)
        del unet
    assert experts.resident == [0, 2] and kept() is not None
    with experts.use(1):
        assert experts.resident == [2, 1]
    gc.disable()  # memory must be freed at once, not by the garbage collector
    try:
        with experts.use(3):
            assert kept() is None
    finally:
        gc.enable()


def test_experts_stay_within_bytes(four):
    sizes = [opened(four).mixture.experts.size(index) for index in range(4)]
    experts = opened(four, max_bytes=max(sizes) + min(sizes)).mixture.experts
    for index in (0, 1, 2, 3, 1, 0):
        with experts.use(index):
            total = sum(sizes[resident] for resident in experts.resident)
            assert total <= max(sizes) + min(sizes) or len(experts.resident) == 1
    for wrong in ({"max_resident": 0}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            opened(four, **wrong)


def test_the_bound_holds_while_threads_use_experts(four):
    unet, loads, lock, most = torch.nn.Linear(2, 2), [], threading.Lock(), [0, 0]

    def load(index, device, dtype):
        loads.append(index)
        return unet

    experts = Experts(load, lambda index: 1, 4, torch.device("cpu"), torch.float32, max_resident=2)

    def work(seed):
        order = torch.randint(4, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        for index in order:
            with experts.use(index):
                resident = len(experts.resident)
                with lock:
                    most[0] = max(most[0], resident)
                    most[1] += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert most == [2, 320] and set(loads) == set(range(4))


def test_saved_and_opened_again(run, tmp_path):
    pipeline = opened(run)
    drawn = pipeline(PROMPTS[:5], seeds=0, num_inference_steps=STEPS, output_type="np")
    pipeline.save_pretrained(tmp_path / "model.v1")
    kinds = {path.suffix for path in (tmp_path / "model.v1").rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".py"}
    again = opened(tmp_path / "model.v1", max_resident=1)
    same = again(PROMPTS[:5], seeds=0, num_inference_steps=STEPS, output_type="np")
    assert np.array_equal(same.images, drawn.images) and same.experts == drawn.experts and same.macs == drawn.macs
    assert again.mixture.info == pipeline.mixture.info and again.mixture.info["recipe"]
    with pytest.raises(ValueError, match="is not empty; give a new"):
        pipeline.save_pretrained(tmp_path / "model.v1")


def test_an_export_under_a_relative_path_asks_no_hub(served, tmp_path, monkeypatch):
    """Once, `model/prompt_encoder` was looked up as a model's name on the hub."""
    served.save_pretrained(tmp_path / "model")
    asked = []
    monkeypatch.setattr("sentence_transformers.base.model_card.get_model_info", asked.append)
    monkeypatch.chdir(tmp_path)
    assert opened("model").route(PROMPTS).tolist() == served.route(PROMPTS).tolist() and asked == []


def test_other_types_and_devices(four):
    pipeline = opened(four)
    expected = pipeline(PROMPTS[:3], seeds=0, num_inference_steps=1, output_type="np")
    pipeline.to(torch.float64)
    wide = pipeline(PROMPTS[:3], seeds=0, num_inference_steps=1, output_type="np")
    assert wide.experts == expected.experts and pipeline.dtype == torch.float64
    half = opened(four, dtype=torch.bfloat16)
    assert half(PROMPTS[:1], seeds=0, num_inference_steps=1, output_type="pt").images.isfinite().all()
