"""Train the embedded models from scratch.

`prunekit run recipes/pretrain_emoji.yaml` trains an autoencoder, then its decoder alone, then a UNet with its text
encoder, and an evaluator. `prunekit run recipes/pretrain_emoji_sd3.yaml` trains a transformer with the first model's
frozen autoencoder and text encoder. Each run writes the float16 pipeline that `prunekit/assets/` holds, and
`curve.json`, the quality over the number of samples seen.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel

from prunekit.core.registry import denoiser_of, process_of
from prunekit.data.config import DataConfig, load_data
from prunekit.data.encoded import encode
from prunekit.data.images import CaptionedImages
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.denoisers.sd3 import miniature as sd3_miniature
from prunekit.denoisers.unet import miniature
from prunekit.embedded.autoencoder_training import AutoencoderObjective, calibrate_scale, latent_means
from prunekit.embedded.evaluator_training import train_evaluator
from prunekit.embedded.sd3_training import FlowObjective
from prunekit.embedded.unet_training import CaptionTable, PretrainingObjective
from prunekit.evaluation.ceiling import text_figures
from prunekit.evaluation.evaluator import Evaluator
from prunekit.evaluation.features import load_evaluator
from prunekit.evaluation.generate import generate
from prunekit.models import emoji_model, emoji_sd3, load_pipeline, quiet_libraries
from prunekit.runtime.files import append_row, read_json, write_folder, write_json
from prunekit.runtime.progress import console
from prunekit.runtime.randomness import generator
from prunekit.runtime.run_directory import LOG
from prunekit.training.trainer import Log, Objective, Trainer, TrainerConfig


class DrawingSettings(Protocol):
    """Settings of the pictures of the quality curve: number, sampling steps, guidance, and pictures per call."""

    num_images: int
    steps: int
    guidance: float
    batch_size: int


class PretrainSettings(Protocol):
    """Settings of a recipe with `job: pretrain` that the training reads."""

    seed: int
    data: DataConfig
    transformer: emoji_sd3.EmojiSD3Config | None
    shapes: emoji_model.EmojiModelConfig
    autoencoder: TrainerConfig | None
    decoder: TrainerConfig | None
    diffusion: TrainerConfig
    evaluator: TrainerConfig | None
    caption_dropout: float
    timestep_shift: float
    milestones: list[int]

    @property
    def evaluation(self) -> DrawingSettings:
        """Settings of the pictures of the quality curve."""
        ...


def pretrain(recipe: PretrainSettings, directory: Path) -> Path:
    """Run the stages that are not done yet; return the directory.

    The stages use only pictures with a training caption: no held-out pictures, and no pictures whose only caption is
    held out.
    """
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_data(recipe.data, recipe.seed).training_pictures()

    def log(row: dict[str, Any]) -> None:
        append_row(directory / LOG, row)

    if recipe.transformer is not None:
        train_transformer(recipe, recipe.transformer, data, directory, device, log)
        draw = partial(transformer_pipeline, recipe.transformer, directory, device=device)
        curve(recipe, data, directory, load_evaluator("emoji"), draw)
        export(directory, "emoji_sd3_model", draw("final"))
        return directory
    assert recipe.evaluator is not None, "a UNet's recipe has one"
    images = data.pixels(range(data.num_images), recipe.shapes.image_size)
    train_autoencoder(recipe, images, directory, device, log)
    autoencoder = train_decoder(recipe, images, directory, device, log)
    train_diffusion(recipe, data, autoencoder, images, directory, device, log)
    evaluator = directory / "evaluator" / "evaluator"
    if not evaluator.is_dir():
        train_evaluator(data, recipe.evaluator, directory / "evaluator", recipe.seed, log)
    curve(recipe, data, directory, Evaluator.from_pretrained(evaluator), partial(pipeline_of, directory, device=device))
    export(directory, "emoji_model", pipeline_of(directory, "final", torch.device("cpu")))
    return directory


def train_autoencoder(
    recipe: PretrainSettings, images: Tensor, directory: Path, device: torch.device, log: Log
) -> AutoencoderKL:
    """Train encoder and decoder together on uint8 `images` (n, 3, H, W), and set the latents' scale."""
    folder = directory / "autoencoder"
    if not (folder / "vae").is_dir():
        torch.manual_seed(recipe.seed)
        assert recipe.autoencoder is not None, "a UNet's recipe has one"
        model = emoji_model.build_autoencoder(recipe.shapes).to(device)
        objective = AutoencoderObjective(model, images, recipe.autoencoder.batch_size, recipe.seed, device)
        trainer = Trainer(recipe.autoencoder, objective, folder / "checkpoints", "autoencoder", log)
        trainer.fit()
        calibrate_scale(model, images, device)
        write_folder(folder / "vae", model.save_pretrained)
        trainer.checkpoints.clear()
    return AutoencoderKL.from_pretrained(folder / "vae").to(device)


def train_decoder(
    recipe: PretrainSettings, images: Tensor, directory: Path, device: torch.device, log: Log
) -> AutoencoderKL:
    """Continue to train the decoder alone: pictures get sharper, and latents do not change."""
    folder = directory / "decoder"
    if not (folder / "vae").is_dir():
        assert recipe.decoder is not None, "a UNet's recipe has one"
        model = train_autoencoder(recipe, images, directory, device, log)
        objective = AutoencoderObjective(model, images, recipe.decoder.batch_size, recipe.seed + 1, device, True)
        trainer = Trainer(recipe.decoder, objective, folder / "checkpoints", "decoder", log)
        trainer.fit()
        write_folder(folder / "vae", model.save_pretrained)
        trainer.checkpoints.clear()
    return AutoencoderKL.from_pretrained(folder / "vae").to(device)


def train_diffusion(
    recipe: PretrainSettings,
    data: CaptionedImages,
    autoencoder: AutoencoderKL,
    images: Tensor,
    directory: Path,
    device: torch.device,
    log: Log,
) -> None:
    """Train UNet and text encoder on the encoder's latents; keep the averaged weights of every milestone."""
    folder = directory / "diffusion"
    if (folder / "final").is_dir():
        return
    torch.manual_seed(recipe.seed)
    tokenizer = emoji_model.build_tokenizer(data.captions, recipe.shapes.vocabulary)
    text_encoder = emoji_model.build_text_encoder(recipe.shapes, tokenizer).to(device)
    unet = emoji_model.build_unet(recipe.shapes).to(device)
    objective = PretrainingObjective(
        model=unet,
        text_encoder=text_encoder,
        process=denoiser_of(unet).family.process(emoji_model.training_scheduler()),
        latents=latent_means(autoencoder, images, device).float().cpu() * autoencoder.config.scaling_factor,
        captions=CaptionTable(data, tokenizer),
        batch_size=recipe.diffusion.batch_size,
        seed=recipe.seed,
        caption_dropout=recipe.caption_dropout,
        timestep_shift=recipe.timestep_shift,
        device=device,
    )

    def keep(name: str) -> None:
        def write(temporary: Path) -> None:
            for part, model in (("unet", unet), ("text_encoder", text_encoder)):
                copy.deepcopy(model).half().save_pretrained(temporary / part)
            tokenizer.save_pretrained(temporary / "tokenizer")

        write_folder(folder / name, write)

    _fit(recipe, objective, folder, keep, log)


def train_transformer(
    recipe: PretrainSettings,
    shapes: emoji_sd3.EmojiSD3Config,
    data: CaptionedImages,
    directory: Path,
    device: torch.device,
    log: Log,
) -> None:
    """Train a transformer on the embedded model's latents and texts; keep the averaged weights of every milestone."""
    folder = directory / "diffusion"
    if (folder / "final").is_dir():
        return
    base = load_pipeline("emoji").to(device)
    torch.manual_seed(recipe.seed)
    transformer = emoji_sd3.build_transformer(shapes, emoji_sd3.BaseShape.of(base)).to(device)
    pipeline = emoji_sd3.assemble(base, transformer, shapes.shift).to(device)
    objective = FlowObjective(
        model=transformer,
        process=process_of(pipeline),
        data=encode(pipeline, data, load_prompt_encoder("emoji"), recipe.shapes.image_size),
        batch_size=recipe.diffusion.batch_size,
        seed=recipe.seed,
        caption_dropout=recipe.caption_dropout,
        device=device,
    )

    def keep(name: str) -> None:
        saved = copy.deepcopy(transformer).half()
        write_folder(folder / name, lambda temporary: saved.save_pretrained(temporary / "transformer"))

    _fit(recipe, objective, folder, keep, log)


def _fit(recipe: PretrainSettings, objective: Objective, folder: Path, keep: Callable[[str], None], log: Log) -> None:
    """Train a denoiser; keep its averaged weights after every milestone and at the end."""
    milestones = {step: partial(keep, f"step-{step}") for step in recipe.milestones}
    trainer = Trainer(recipe.diffusion, objective, folder / "checkpoints", "diffusion", log, milestones)
    trainer.fit()
    keep("final")
    trainer.checkpoints.clear()


def transformer_pipeline(
    shapes: emoji_sd3.EmojiSD3Config, directory: Path, weights: str, device: torch.device
) -> StableDiffusion3Pipeline:
    """Assemble the pipeline with the transformer of one milestone ("step-1000") or of the end ("final")."""
    transformer = sd3_miniature.read(directory / "diffusion" / weights / "transformer")
    return emoji_sd3.assemble(load_pipeline("emoji"), transformer, shapes.shift).to(device)


def pipeline_of(directory: Path, weights: str, device: torch.device) -> StableDiffusionPipeline:
    """Assemble the pipeline of one milestone ("step-1000") or of the end ("final")."""
    from transformers import CLIPTokenizer

    folder = directory / "diffusion" / weights
    return emoji_model.assemble(
        AutoencoderKL.from_pretrained(directory / "decoder" / "vae"),
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        miniature.read(folder / "unet"),
    ).to(device)


def curve(
    recipe: PretrainSettings,
    data: CaptionedImages,
    directory: Path,
    evaluator: Evaluator,
    pipeline_of: Callable[[str], DiffusionPipeline],
) -> list[dict[str, float]]:
    """Draw pictures of names at each milestone, measure them, and write and return one row per milestone.

    A row has the step, the samples seen, the CLIP score, and the top-1 and top-5 accuracy. pipeline_of: returns the
    pipeline of a milestone ("step-1000", "final").
    """
    path, settings = directory / "curve.json", recipe.evaluation
    rows = read_json(path) if path.is_file() else []
    done = {row["step"] for row in rows}
    chosen = torch.randperm(data.num_images, generator=generator(recipe.seed, "names"))[: settings.num_images]
    names = [data.names[i] for i in chosen]
    for step in [*recipe.milestones, recipe.diffusion.steps]:
        if step in done:
            continue
        weights = "final" if step == recipe.diffusion.steps else f"step-{step}"
        pipeline, seeds = pipeline_of(weights), list(range(len(names)))
        options = (settings.steps, settings.guidance, settings.batch_size)
        pictures = generate(pipeline, names, seeds, *options, title=f"images of {weights}")
        figures = text_figures(evaluator, pictures, evaluator.embed_texts(data.names), chosen)
        rows.append({"step": step, "samples": step * recipe.diffusion.batch_size, **figures})
        write_json(path, rows)
        console.print(f"{weights}: {figures}", highlight=False)
    return rows


def export(directory: Path, name: str, pipeline: DiffusionPipeline) -> None:
    """Write the finished pipeline in float16 to the folder `name` in `directory`."""

    def write(temporary: Path) -> None:
        pipeline.to("cpu", torch.float16).save_pretrained(temporary)
        for path in temporary.rglob("config.json"):  # diffusers notes the folder that a part was read from
            write_json(path, {key: value for key, value in read_json(path).items() if key != "_name_or_path"})

    write_folder(directory / name, write)
    console.print(f"the pipeline: {directory / name}", highlight=False)
