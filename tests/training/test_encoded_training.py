"""Training on the cache: encoders run only for uncached parts, moments are sampled by law 4, and keys are complete."""

from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import data_layouts
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from encode_world import KEPT, encoded, write
from small_data import encoded_for, stub
from small_sdxl import write as write_family
from unets import build

from prunekit.core.discovery import discover
from prunekit.core.registry import process_of
from prunekit.data.cache_config import CacheConfig
from prunekit.data.encoded import encode
from prunekit.data.encoders import FrozenEncoders
from prunekit.data.fingerprint import Fingerprint
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.denoisers.unet.family import StableDiffusion
from prunekit.evaluation.agreement import agreement_samples, data_samples
from prunekit.methods import APTP
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective, fine_tune
from prunekit.slicing import slice_unet
from prunekit.training.diffusion import NoisePlan

MODES = {
    "kept": {},
    "moments": {"latents": "moments"},
    "half": {"precision": "float16"},
    "live pictures": {"latents": "off"},
    "live text": {"text": False},
}


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def world(request, tmp_path_factory):
    folder = write(tmp_path_factory.mktemp(request.param), data_layouts.webdataset)
    if request.param == "sdxl":
        write_family(folder / "model", "sdxl")
    return folder


@pytest.fixture(scope="module")
def pipeline(world):
    return DiffusionPipeline.from_pretrained(world / "model")


def frozen(pipeline) -> dict[str, torch.nn.Module]:
    names = ("vae", "text_encoder", "text_encoder_2")
    modules = {name: getattr(pipeline, name, None) for name in names}
    return {name: module for name, module in modules.items() if module is not None}


@pytest.fixture(scope="module")
def reference(world, pipeline, tmp_path_factory):
    """Return losses and weights of training on data in memory."""
    return tune(pipeline, encoded(world, None, pipeline), tmp_path_factory.mktemp("reference"))


@pytest.fixture
def calls(pipeline):
    """Return a counter of the frozen encoders' forward passes."""
    counts: Counter[str] = Counter()

    def count(name):
        return lambda *_: counts.update([name])

    hooked = {**frozen(pipeline), "vae": pipeline.vae.encoder}
    handles = [module.register_forward_pre_hook(count(name)) for name, module in hooked.items()]
    yield counts
    for handle in handles:
        handle.remove()


def tune(pipeline, data, folder, **settings):
    """Run two fine-tuning steps on a slice of the UNet; return their losses and the weights."""
    space = discover(pipeline.unet)
    torch.manual_seed(0)
    student = slice_unet(pipeline.unet, space.random(keep=0.9, seed=0))
    config, rows = FineTuneConfig(steps=2, batch_size=4, learning_rate=1e-3, log_every=1, **settings), []
    fine_tune(student, pipeline.unet, data, config, folder, scheduler=pipeline.scheduler, log=rows.append)
    losses = torch.tensor([row["loss"] for row in rows])
    return losses, torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


@pytest.mark.parametrize("mode", MODES)
def test_encoders_run_in_a_step_only_where_nothing_is_kept(mode, world, pipeline, reference, calls, tmp_path):
    settings, data = MODES[mode], None
    for _ in range(2):
        calls.clear()
        data = encoded(world, tmp_path / "cache", pipeline, **settings)
    starts = dict(calls)
    assert "live" in mode or not starts, "a second start ran an encoder"
    calls.clear()
    losses, weights = tune(pipeline, data, tmp_path / "tune")
    ran = set(calls)
    expected = {"vae"} if mode == "live pictures" else set(frozen(pipeline)) - {"vae"} if mode == "live text" else set()
    assert ran == expected
    assert mode != "kept" or torch.equal(weights, reference[1])
    assert mode == "moments" or torch.allclose(losses, reference[0], rtol=1e-2)


def test_a_search_step_runs_no_encoder(world, pipeline, calls, tmp_path):
    encoded(world, tmp_path, pipeline)
    data = encoded(world, tmp_path, pipeline, latents="moments")
    calls.clear()
    search = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    APTP(budget=0.8, experts=2, warmup=1, search=search).prune(pipeline, data, tmp_path / "search")
    assert not calls


def test_live_rows_are_those_that_would_be_kept(world, pipeline, tmp_path):
    kept, live = encoded(world, None, pipeline), encoded(world, None, pipeline, latents="off", text=False)
    index = torch.tensor([5, 0, 5, KEPT - 1])
    for name in ("latents", "text", "pooled"):
        one, other = getattr(kept, name), getattr(live, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            torch.testing.assert_close(other[index], one[index], rtol=1e-4, atol=1e-5)
    assert torch.equal(kept.null_text, live.null_text) and kept.key != live.key


def test_moments_are_the_posterior(world, pipeline, tmp_path):
    data, means = encoded(world, tmp_path, pipeline, latents="moments"), encoded(world, tmp_path, pipeline)
    assert torch.equal(data.latents[:], means.latents[:]) and means.deviations is None
    pairs = torch.tensor([3, 9])
    assert torch.equal(means.draw_latents(pairs, None), means.latents[means.image_index[pairs]])
    pixels = data.images.pixels(data.image_index[pairs].tolist(), 16)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels.float() / 127.5 - 1).latent_dist
    scale = pipeline.vae.config.scaling_factor
    draws = 4000
    noise = torch.randn(draws * 2, *data.latents.shape[1:], generator=torch.Generator().manual_seed(0))
    sampled = data.draw_latents(pairs.repeat(draws), noise).view(draws, 2, *data.latents.shape[1:])
    error = (sampled.mean(0) - posterior.mean * scale).abs() / (posterior.std * scale)
    assert float(error.max()) < 5 / draws**0.5
    assert torch.allclose(sampled.std(0), posterior.std * scale, rtol=0.06)


def test_draws_are_keyed_by_step_and_position():
    def plan(step, sampled):
        return NoisePlan.draw(step, 7, 8, 20, (4, 3, 3), StableDiffusion().process(None), sampled)

    for name in ("indices", "timesteps", "noise", "choice", "drop"):
        assert torch.equal(getattr(plan(3, True), name), getattr(plan(3, False), name)), name
    assert plan(3, False).posterior_at(torch.arange(8)) is None
    first, second = plan(3, True).posterior, plan(4, True).posterior
    assert torch.equal(plan(3, True).posterior_at(torch.tensor([6, 1])), first[[6, 1]])
    assert not torch.equal(first, second) and not torch.equal(first, plan(3, True).noise)


@pytest.mark.parametrize("shape", ["sd2", "sdxl"])
def test_a_step_with_moments_is_the_sum_of_its_parts(shape):
    teacher = build(shape)
    data = encoded_for(teacher)
    data = replace(data, deviations=torch.rand_like(data.latents))
    config = FineTuneConfig(steps=1, batch_size=6, learning_rate=1e-3)
    process = process_of(stub(teacher))
    pairs, device = data.training_pairs(), torch.device("cpu")
    objective = FineTuningObjective(teacher, teacher, process, data, pairs, config, 0, device)
    with torch.no_grad():
        batch = objective.batch(0)
        whole = objective.micro_loss(batch, torch.arange(6))
        parts = [objective.micro_loss(batch, part) for part in torch.arange(6).split(2)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-5, atol=1e-7)


def test_agreement_reads_only_what_it_draws(world, pipeline, tmp_path):
    data = encoded(world, tmp_path, pipeline)
    own, conditions = data_samples(data, pipeline, 3, 10), data.conditions(torch.arange(KEPT))
    whole = agreement_samples(data.latents[data.image_index], conditions, pipeline, 3, 10)
    assert torch.equal(own.indices, whole.indices) and own.call.keys() == whole.call.keys()
    for values, others in zip(own.call.tensors(), whole.call.tensors(), strict=True):
        assert torch.equal(values, others)


class Louder:
    """A prompt encoder that differs slightly from the embedded one."""

    def encode(self, prompts):
        return 1.001 * load_prompt_encoder().encode(prompts)


@contextmanager
def nudged(module):
    """Change one weight of a module slightly within the context."""
    parameter = next(module.parameters())
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3
        yield
        parameter.copy_(original)


@contextmanager
def configured(part, **settings):
    """Change settings of a pipeline or an autoencoder within the context."""
    original = {name: part.config.get(name) for name in settings}
    part.register_to_config(**settings)
    yield
    part.register_to_config(**original)


@contextmanager
def shorter(pipeline):
    """Make a pipeline's tokenizers truncate captions one token earlier within the context."""
    tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer")]
    for tokenizer in tokenizers:
        tokenizer.model_max_length -= 1
    yield
    for tokenizer in tokenizers:
        tokenizer.model_max_length += 1


EVERY = {"latents", "text", "null", "prompts"}


def test_every_input_is_part_of_a_key(world, pipeline, tmp_path):
    """After a change, only the parts that depend on it are encoded again."""
    images, folders, seen = encoded(world, None, pipeline).images, set(), set()
    second = replace(images, captions=["another", *images.captions[1:]])
    third = replace(images, held_out=~images.held_out)

    def made(images=images, prompts=None, resolution=16, **settings):
        cache = (tmp_path, CacheConfig(**settings))
        data = encode(pipeline, images, prompts or load_prompt_encoder(), resolution, *cache)
        new = {path.name for path in tmp_path.glob("*-*")} - folders
        folders.update(new)
        assert new or data.key not in seen or not settings
        seen.add(data.key)
        return {name.split("-")[0] for name in new}

    def check(expected, changed, **changes):
        known = len(seen)
        with changed:
            assert made(**changes) == expected, changes
        assert len(seen) == known + 1, f"not part of the key: {changes}"

    check(EVERY, nullcontext())
    assert made() == set() and len(seen) == 1
    check({"latents"}, nullcontext(), resolution=32)
    check({"latents"}, nullcontext(), latents="moments")
    check({"pictures"}, nullcontext(), latents="off")
    check(set(), nullcontext(), text=False)
    check(EVERY, nullcontext(), precision="float16")
    check(EVERY, nullcontext(), shard_size=8)
    check({"latents", "text", "prompts"}, nullcontext(), images=images.without({3: "is left out"}))
    check({"text", "prompts"}, nullcontext(), images=second)
    check(set(), nullcontext(), images=third)
    check({"prompts"}, nullcontext(), prompts=Louder())
    check({"latents"}, nudged(pipeline.vae))
    check({"latents"}, configured(pipeline.vae, scaling_factor=0.5))
    if "force_zeros_for_empty_prompt" in pipeline.config:
        check({"text", "null"}, configured(pipeline, force_zeros_for_empty_prompt=False))
    check({"text", "null"}, shorter(pipeline))
    for name in set(frozen(pipeline)) - {"vae"}:
        check({"text", "null"}, nudged(getattr(pipeline, name)))
    scheduler, pipeline.scheduler = pipeline.scheduler, DDIMScheduler()
    assert made() == set(), "the noise schedule is no part of it"
    pipeline.scheduler = scheduler


def test_scores_are_keyed_by_the_data_without_reading_it(world, pipeline, tmp_path):
    first, again = (encoded(world, tmp_path / "cache", pipeline) for _ in range(2))
    other = encoded(world, tmp_path / "cache", pipeline, latents="moments")
    digests = [Fingerprint().add_data(data).key() for data in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]


def test_autoencoder_batches_shrink_with_the_resolution(pipeline):
    sizes = {side: FrozenEncoders(pipeline, side).batch for side in (64, 256, 512, 768, 1024, 4096)}
    assert sizes == {64: 64, 256: 64, 512: 16, 768: 7, 1024: 4, 4096: 1}
