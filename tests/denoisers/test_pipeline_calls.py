"""A family's calls equal those of the stock pipeline: the same arguments with the same names at every step."""

import copy
import inspect
import math

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from small_transformer_pipelines import make
from small_transformers import CONFIGS
from unets import relative_error

from prunekit.core.call import predict
from prunekit.core.registry import denoiser_of, family_of, process_of, scale_of, text_length, texts_of
from prunekit.data.encoders import FrozenEncoders
from prunekit.denoisers.flow_matching import FlowMatching
from prunekit.embedded.sd3_training import AsManyTokens
from prunekit.models import load_pipeline
from prunekit.runtime.errors import UserError

TEXTS = ["red apple", "a blue house"]
NAMES = ["sd35", "flux", "pixart", "qwen_image", "flux2", "flux2_klein", "flux2_klein_base", "z_image", "sana15", "wan"]
GUIDED = ("sd35", "pixart", "z_image", "sana15")  # pipelines with a second text in the same call, for guidance


@pytest.fixture(scope="module")
def base():
    return load_pipeline("emoji")


def calls_of(pipeline, texts, options):
    """Run the stock pipeline; return the transformer's arguments and output at every step."""
    seen = []

    names = list(inspect.signature(pipeline.transformer.forward).parameters)

    def look(module, args, kwargs, output):
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        copied = {k: v.clone() if torch.is_tensor(v) else v for k, v in given.items()}
        seen.append((copied, output[0].clone() if torch.is_tensor(output[0]) else output[0]))

    handle = pipeline.transformer.register_forward_hook(look, with_kwargs=True)
    prompt = {} if "prompt_embeds" in options else {"prompt": texts}
    with torch.no_grad():
        pipeline(**prompt, num_inference_steps=2, output_type="latent", **options)
    handle.remove()
    return seen


def timesteps_of(name, arguments):
    """Return the timesteps of a stock call in the unit of the noise process."""
    if name == "z_image":
        return 1000 * (1 - arguments["t"].float())
    scale = 1000 if name.startswith("flux") or name == "qwen_image" else 1
    return arguments["timestep"].reshape(-1).float() * scale


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_calls_are_the_pipelines(name, base):
    pipeline, options = make(name, base)
    pipeline.set_progress_bar_config(disable=True)
    model, denoiser = pipeline.transformer, denoiser_of(pipeline.transformer)
    family = denoiser.family
    guided = name in GUIDED
    if name == "qwen_image":
        states = {"text": options["prompt_embeds"], "mask": options["prompt_embeds_mask"].bool()}
    else:
        states = family.states(pipeline, TEXTS)
        if guided:
            null = family.null_states(pipeline)
            null = {role: null[role].repeat(2, *[1] * (value.dim() - 1)) for role, value in states.items()}
            halves = (states, null) if name == "z_image" else (null, states)
            states = {role: torch.cat([half[role] for half in halves]) for role in states}
    if name == "pixart":
        states["sizes"] = family.sizes(32, 16).expand(4, -1)
    assert family.call_batch(2, guided) == (4 if guided else 2)
    one_text = name in ("flux", "flux2", "flux2_klein")
    assert texts_of(pipeline, 3.0) == (1 if one_text else 2)
    assert texts_of(pipeline, 0.0 if name == "z_image" else 1.0) == 1
    assert texts_of(pipeline, 0.0, {"true_cfg_scale": 2.0}) == (2 if name == "flux" else 1)
    assert 3.0 in family.call_options(pipeline, 3.0).values() or name == "flux2_klein"
    if name not in ("pixart", "qwen_image"):
        assert text_length(pipeline) == states["text"].shape[1]
    seen = calls_of(pipeline, TEXTS, options)
    texts = [states]  # the texts of a step's calls
    if name == "wan":
        null = family.null_states(pipeline)
        texts.append({role: value.repeat(2, *[1] * (value.dim() - 1)) for role, value in null.items()})
    assert len(seen) == 2 * len(texts)
    for (arguments, output), states in zip(seen, texts * 2, strict=True):
        height, width = (options.get(side, 64) // scale_of(pipeline) for side in ("height", "width"))
        probe = denoiser.call(
            torch.zeros(len(output), denoiser.latent_channels(model), height, width), torch.zeros(1), states
        )
        latent = arguments[denoiser.latent]
        latent = torch.stack(latent) if isinstance(latent, list) else latent
        noisy = denoiser.noisy(probe.replace(**{denoiser.latent: latent}))
        call = denoiser.call(noisy, timesteps_of(name, arguments), states)
        for key, value in call.items():
            theirs = arguments[key]
            if isinstance(theirs, list) and torch.is_tensor(theirs[0]):
                assert len(value) == len(theirs)
                assert all(torch.allclose(ours, part, atol=1e-6) for ours, part in zip(value, theirs, strict=True)), key
            elif key in call.shared:  # equal for all samples; the pipeline may repeat them
                assert torch.equal(value.expand_as(theirs), theirs.to(value.dtype)), key
            elif torch.is_tensor(value):
                assert torch.allclose(value.float(), theirs.float().reshape(value.shape), atol=1e-6), key
            elif key == "img_shapes":
                assert value[0] == theirs[0]
            else:
                assert all(
                    torch.allclose(part, theirs[inner].float().reshape(part.shape)) for inner, part in value.items()
                )
        missing = {k for k, v in arguments.items() if torch.is_tensor(v)} - call.keys()
        assert not missing
        with torch.no_grad():
            expected = output if call.finish is None else call.finish(output)
            assert relative_error(predict(model, call), expected) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_what_the_pipeline_decodes(name, base):
    """The mean of `moments`, decoded as the pipeline does at its end, is the autoencoder's reconstruction."""
    pipeline, _ = make(name, base)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4)) * 2 - 1
    vae = pipeline.vae
    with torch.no_grad():
        mean, deviation = denoiser_of(pipeline.transformer).family.moments(vae, pixels)
        assert mean.shape == deviation.shape and mean.dim() == 4
        assert bool((deviation == 0).all() if name == "sana15" else (deviation > 0).all())  # latents without noise
        expected, config = denoiser_of(pipeline.transformer).family.reconstruct(vae, pixels), vae.config
        if name in ("qwen_image", "wan"):
            scale, shift = (torch.tensor(v).view(1, -1, 1, 1) for v in (config.latents_std, config.latents_mean))
            decoded = vae.decode((mean * scale + shift).unsqueeze(2)).sample[:, :, 0]
        elif name.startswith("flux2"):
            latents = pipeline._patchify_latents(mean)
            latents = latents * torch.sqrt(vae.bn.running_var + config.batch_norm_eps).view(1, -1, 1, 1)
            latents = pipeline._unpatchify_latents(latents + vae.bn.running_mean.view(1, -1, 1, 1))
            decoded = vae.decode(latents).sample
            encoded = pipeline._encode_vae_image(pixels, None)  # the pipeline's encoding of a picture to edit
            assert torch.allclose(encoded, pipeline._patchify_latents(mean), atol=1e-5)
        else:
            latents = mean / config.scaling_factor + (config.get("shift_factor") or 0.0)
            decoded = vae.decode(latents).sample
    assert torch.allclose(decoded, expected, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_the_schedulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process, generator = FlowMatching(scheduler), torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=generator).unbind(0)
    times = scheduler.timesteps[[10, 500, 900]]
    assert torch.allclose(
        process.noised(latents, noise, times), scheduler.scale_noise(latents, times, noise), atol=1e-6
    )
    # One Euler step along the target, from the noise level to 0, gives the data.
    x, target = process.noised(latents, noise, times), process.target(latents, noise, times)
    sigma = (times / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(x - sigma * target, latents, atol=1e-5)
    drawn = process.draw(20_000, generator) / 1000
    middle = shift * 0.5 / (1 + (shift - 1) * 0.5)  # the shifted median of the logit-normal
    assert drawn.median().item() == pytest.approx(middle, abs=0.01) and drawn.min() > 0 and drawn.max() < 1
    assert torch.equal(process.weights(times, 5.0, "velocity"), torch.ones(3))


def test_a_shift_that_depends_on_the_size_is_the_middle_of_its_range():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    assert process_of_scheduler(scheduler) == pytest.approx(torch.tensor(0.825).exp().item())


def process_of_scheduler(scheduler):
    return FlowMatching(scheduler).shift


def test_flux2s_shift_is_its_pipelines(base):
    """The shift is that of 1,024 pixels and 50 steps; a schedule that depends on neither keeps its own shift."""
    family = denoiser_of(CONFIGS["flux2"][0]).family
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    shift = family.process(scheduler).shift
    assert shift == pytest.approx(math.exp(compute_empirical_mu((1024 // 16) ** 2, 50)))
    sigmas = torch.linspace(1, 1 / 50, 50)  # the pipeline's input to the scheduler, which shifts it
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=math.log(shift))
    torch.testing.assert_close(scheduler.timesteps / 1000, shift * sigmas / (1 + (shift - 1) * sigmas))
    assert family.process(FlowMatchEulerDiscreteScheduler(shift=3.0)).shift == 3.0


@pytest.mark.parametrize("name", [*(name for name in NAMES if name != "qwen_image"), "cogview4", "unet"])
@torch.no_grad()
def test_the_encoders_may_be_offloaded(name, base):  # the small Qwen-Image has no text encoder
    pipeline = copy.deepcopy(base if name == "unet" else make(name, base)[0])
    family, encoders = family_of(pipeline), FrozenEncoders(pipeline, 32)
    pixels = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)

    def encoded():
        given = family.embeddings(pipeline, TEXTS, None, True).values()
        embeddings = [part for value in given for part in (value if isinstance(value, list) else [value])]
        return [*family.states(pipeline, TEXTS).values(), *encoders.moments(pixels).values(), *embeddings]

    expected = encoded()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"))  # as enable_sequential_cpu_offload of a pipeline does
    assert pipeline.vae.device.type == "meta"
    for before, after in zip(expected, encoded(), strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


def test_dev_takes_no_negative_prompt(base):
    pipeline, _ = make("flux2", base)
    with pytest.raises(UserError, match="Flux2Pipeline takes no negative prompt"):
        denoiser_of(pipeline.transformer).family.embeddings(pipeline, TEXTS, ["", ""], False)


def test_a_pipeline_says_its_process(base):
    pipeline, _ = make("sd35", base)
    assert isinstance(pipeline, StableDiffusion3Pipeline) and process_of(pipeline).shift == 2.0


@torch.no_grad()
def test_one_token_stands_for_as_many_identical_ones(base):
    pipeline, _ = make("sd35", base)
    model, denoiser = pipeline.transformer, denoiser_of(pipeline.transformer)
    states = denoiser.family.states(pipeline, TEXTS)  # one zero token
    noisy = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    once = denoiser.call(noisy, torch.tensor([300.0, 700.0]), states)
    text = torch.cat([states["text"], states["text"].new_zeros(2, 15, 256)], dim=1)
    expected = predict(model, denoiser.call(noisy, torch.tensor([300.0, 700.0]), {**states, "text": text}))
    with AsManyTokens(64 + 17, 16):
        assert relative_error(predict(model, once), expected) <= 1e-5
    assert relative_error(predict(model, once), expected) > 1e-3
