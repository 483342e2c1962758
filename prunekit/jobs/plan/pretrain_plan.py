"""The plan of a recipe that trains the embedded model from scratch."""

from typing import Any

import torch

from prunekit.core.registry import texts_of
from prunekit.jobs.plan.amounts import Work
from prunekit.jobs.plan.footprints import HOW, checkpoint_bytes
from prunekit.jobs.plan.planned_models import PlannedModel
from prunekit.jobs.plan.planned_parts import PNDM, Parts, build_scheduler
from prunekit.jobs.plan.rehearsal import FLOAT32, LOWERED, training_bytes
from prunekit.jobs.recipe import PretrainRecipe
from prunekit.models import PipelineShape, emoji_model, emoji_sd3
from prunekit.training.trainer import TrainerConfig


def plan_pretraining(recipe: PretrainRecipe) -> tuple[PlannedModel, dict[str, Any], list[Work]]:
    """Return the model to train, its sections of the plan (model, memory, disk), and the work of each stage."""
    shapes = recipe.shapes
    with torch.device("meta"):
        autoencoder, tokens = emoji_model.build_autoencoder(shapes).eval(), emoji_model.TOKENS
        if recipe.transformer is None:
            denoiser = emoji_model.build_unet(shapes).eval()
        else:
            base = emoji_sd3.BaseShape(shapes.text_width, shapes.image_size // 8, shapes.latent_channels)
            denoiser = emoji_sd3.build_transformer(recipe.transformer, base).eval()
            tokens += emoji_sd3.ZERO_TOKENS
    latent = (shapes.image_size // 8,) * 2
    shape = PipelineShape(recipe.name, denoiser, shapes.image_size // latent[0], tokens)
    model = PlannedModel(shape, Parts(autoencoder, (), build_scheduler(PNDM)))
    (encoding, decoding), dense, params = model.picture_macs(latent), model.dense_macs(), model.params
    calls = model.parts.calls(recipe.evaluation.steps, texts_of(shape, recipe.evaluation.guidance))
    images = recipe.evaluation.num_images * (len(recipe.milestones) + 1)
    trainings = (
        ("autoencoder", recipe.autoencoder, 3 * (encoding + decoding), "forward, backward"),
        ("decoder", recipe.decoder, encoding + 3 * decoding, "encoder; decoder forward, backward"),
        ("diffusion", recipe.diffusion, 3 * dense, "denoiser forward, backward"),
        ("evaluator", recipe.evaluator, None, "not counted"),
    )
    work = [
        *(_training(stage, config, macs, passes) for stage, config, macs, passes in trainings if config is not None),
        Work("quality curve: generation", images, calls * dense + decoding, f"{calls} denoiser calls, decoder"),
    ]
    samples = recipe.diffusion.micro_batch or recipe.diffusion.batch_size
    step = model.rehearsal.training(latent, model.tokens, samples, recipe.diffusion)
    checkpoints = (recipe.diffusion.keep_checkpoints + 1) * checkpoint_bytes(params, recipe.diffusion)
    milestones = (len(recipe.milestones) + 1) * LOWERED * params
    content = {
        "model": model.describe(),
        "memory": {
            "dense_weights": {"float32": FLOAT32 * params, "float16": LOWERED * params},
            "peak": {"diffusion": training_bytes(params, recipe.diffusion) + step},
            "how": HOW,
        },
        "disk": {"checkpoints": checkpoints, "milestones": milestones, "total": checkpoints + milestones},
    }
    return model, content, work


def _training(stage: str, config: TrainerConfig, macs: float | None, passes: str) -> Work:
    return Work(stage, config.steps * config.batch_size, macs, passes)
