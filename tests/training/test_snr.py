"""min-SNR weights: both forms on Stable Diffusion's schedule, their source, and the meaning of earlier records."""

import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from small_model import RECIPE

from prunekit.denoisers.unet.family import DDPM
from prunekit.jobs.recipe import dump_recipe, load_recipe, load_recorded, parse_recipe, resolve_recipe
from prunekit.jobs.shipped import find_recipe
from prunekit.methods import APTP
from prunekit.recovery.fine_tuning import FineTuneConfig
from prunekit.training.diffusion import denoising_errors, per_sample_mse

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FIFTHS = {  # mean weight of each fifth of the schedule, gamma 5, v-prediction
    "velocity": (0.49, 0.59, 0.28, 0.088, 0.016),
    "published": (0.54, 1, 1, 1, 1),
}


@pytest.mark.parametrize("form", FIFTHS)
def test_both_forms_on_the_schedule_of_stable_diffusion(form):
    velocity = DDPM(DDPMScheduler(**SD, prediction_type="v_prediction"))
    weights = velocity.weights(torch.arange(1000), 5.0, form)
    assert weights.view(5, 200).mean(dim=1).tolist() == pytest.approx(FIFTHS[form], abs=0.005)
    noise = DDPMScheduler(**SD, prediction_type="epsilon")
    snr = noise.alphas_cumprod / (1 - noise.alphas_cumprod)
    assert torch.allclose(DDPM(noise).weights(torch.arange(1000), 5.0, form), snr.clamp(max=5) / snr)


@pytest.mark.parametrize("form", FIFTHS)
def test_the_weight_multiplies_the_error(form):
    process, steps = DDPM(DDPMScheduler(**SD, prediction_type="v_prediction")), torch.tensor([100, 900])
    prediction, latents, noise = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = per_sample_mse(prediction, process.target(latents, noise, steps))
    assert torch.equal(denoising_errors(prediction, process, latents, noise, steps, None, form), plain)
    weighted = denoising_errors(prediction, process, latents, noise, steps, 5.0, form)
    assert torch.allclose(weighted, plain * process.weights(steps, 5.0, form))


def test_the_library_has_the_velocity_form_and_the_papers_recipes_the_published_one():
    assert APTP().config.snr_form == "velocity"
    assert FineTuneConfig(steps=1, batch_size=1, learning_rate=1).snr_form == "velocity"
    assert {APTP(preset=preset).config.snr_form for preset in ("paper", "published_code")} == {"published"}
    for name in ("aptp_coco_base", "uniarch_coco", "norm_coco", "bksdm_coco"):
        recipe = load_recipe(find_recipe(name))
        (method,) = recipe.methods
        config = recipe.method(method).config
        assert getattr(config, "snr_form", "published") == recipe.fine_tuning(method).snr_form == "published"
    assert recipe.method("bksdm").config.own_distillation and recipe.fine_tuning("bksdm").snr_gamma is None


def test_a_record_from_before_the_setting_means_the_form_of_its_time(tmp_path):
    methods = {"aptp": {"preset": "paper", "search": {"steps": 600, "batch_size": 8, "learning_rate": 0.01}}}
    content = parse_recipe({**RECIPE, "methods": methods}).model_dump(mode="json")
    content["fine_tune"].pop("snr_form")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    earlier = load_recorded(tmp_path / "recipe.yaml")
    config = earlier.method("aptp").config
    assert earlier.fine_tune.snr_form == config.snr_form == "velocity"
    assert (config.depth_gates, config.similarity, config.routing) == ("cumulative", "hardened", "cosine")
    assert (config.search.weight_decay, config.search.max_grad_norm) == (0.01, 1.0)
    now = resolve_recipe(parse_recipe({**RECIPE, "methods": methods}), torch.device("cpu"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(now))
    recorded = load_recorded(tmp_path / "recipe.yaml")
    assert recorded == now and recorded.method("aptp").config.snr_form == "published"
    assert recorded.method("aptp").config.depth_gates == "independent"
