"""The plan of a recipe that trains the embedded model from nothing."""

from typing import Any

import torch

from prunekit.jobs.plan.amounts import Work
from prunekit.jobs.plan.footprints import HOW, checkpoint_bytes
from prunekit.jobs.plan.planned_models import PlannedModel
from prunekit.jobs.plan.planned_parts import PNDM, Parts, build_scheduler
from prunekit.jobs.plan.rehearsal import FLOAT32, LOWERED, training_bytes
from prunekit.jobs.recipe import PretrainRecipe
from prunekit.models import PipelineShape, TokenizerShape, emoji_model
from prunekit.training.trainer import TrainerConfig


def plan_pretraining(recipe: PretrainRecipe) -> tuple[PlannedModel, dict[str, Any], list[Work]]:
    """Return the model that is trained, its sizes, and the work."""
    shapes = recipe.shapes
    with torch.device("meta"):
        unet, autoencoder = emoji_model.build_unet(shapes).eval(), emoji_model.build_autoencoder(shapes).eval()
    latent = (unet.config.sample_size,) * 2
    shape = PipelineShape(recipe.name, unet, shapes.image_size // latent[0], TokenizerShape(emoji_model.TOKENS))
    model = PlannedModel(shape, Parts(autoencoder, (), build_scheduler(PNDM)))
    (encoding, decoding), dense, params = model.picture_macs(latent), model.dense_macs(), model.params
    calls = model.parts.calls(recipe.evaluation.steps, recipe.evaluation.guidance)
    images = recipe.evaluation.num_images * (len(recipe.milestones) + 1)
    work = [
        _training("autoencoder", recipe.autoencoder, 3 * (encoding + decoding), "forward, backward"),
        _training("decoder", recipe.decoder, encoding + 3 * decoding, "encoder; decoder forward, backward"),
        _training("diffusion", recipe.diffusion, 3 * dense, "UNet forward, backward"),
        _training("evaluator", recipe.evaluator, None, "not counted"),
        Work("quality curve: generation", images, calls * dense + decoding, f"{calls} UNet calls, decoder"),
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
