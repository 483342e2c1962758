"""A plain, unoptimized search step and fine-tuning step with the same mathematics as prunekit's.

Every step runs everything in float32: the autoencoder on the pictures, the text encoder on the captions, and the
gated UNet with all gates open as the teacher. A Python loop goes over the experts.
`tests/training/test_plain_step.py` compares the losses with prunekit's; `step.py` times both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from prunekit.core.cost import CostModel
from prunekit.core.gates import Gates


def encode(pipeline: Any, pictures: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1], and text states (B, T, E) of captions."""
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures).latent_dist.mean * pipeline.vae.config.scaling_factor
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = pipeline.tokenizer(captions, max_length=pipeline.tokenizer.model_max_length, **options).input_ids
        return latents, pipeline.text_encoder(ids.to(latents.device))[0]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine similarities (A, B) of the rows of `a` and `b`."""
    return (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T


def gate(logits: Tensor, noise: Tensor, config: Any) -> Tensor:
    """Return Gumbel-sigmoid gates (APTP paper, Eq. 9)."""
    return torch.sigmoid((logits + config.offset + noise) / config.temperature)


def search_loss(
    unet: UNet2DConditionModel,
    gates: Gates,
    predictor: nn.Linear,
    codes: Tensor,
    cost: CostModel,
    scheduler: DDPMScheduler,
    config: Any,
    latents: Tensor,
    text: Tensor,
    prompts: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    code_noise: Tensor,
    embedding_noise: Tensor,
) -> Tensor:
    """Return the loss of APTP's search on a batch after the warm-up (APTP paper, Eq. 25)."""
    embeddings = predictor(prompts)
    with torch.no_grad():  # Eq. 5-7, 20-21
        q = torch.exp(cosine(embeddings, codes).T / config.epsilon)
        for _ in range(config.sinkhorn_iterations):
            q = q / q.sum(1, keepdim=True) / len(q)
            q = q / q.sum(0, keepdim=True) / q.shape[1]
        expert = q.argmax(0)
    r = torch.softmax(cosine(prompts, prompts) / config.contrastive_temperature, 1)  # Eq. 12-14
    soft = gate(embeddings, embedding_noise, config)
    s = torch.softmax(cosine(soft, soft) / config.contrastive_temperature, 1)
    loss = config.contrastive_weight * F.binary_cross_entropy(s, r)
    code_gates = gate(codes, code_noise, config)
    mean = torch.stack([cost.macs(code_gates)[i] * (expert == i).sum() for i in range(len(codes))]).sum() / len(expert)
    loss = loss + config.resource_weight * (mean.log() - torch.log(torch.tensor(config.budget * cost.dense_macs))).abs()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        gates.set(torch.ones(len(latents), cost.space.size))
        teacher = unet(noisy, timesteps, text).sample
    gates.set(code_gates[expert])
    prediction = unet(noisy, timesteps, text).sample
    target = (
        noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    )
    used = expert.unique().tolist()
    for i in used:
        own = expert == i
        denoising = F.mse_loss(prediction[own], target[own])
        loss = loss + (denoising + config.distillation_weight * F.mse_loss(prediction[own], teacher[own])) / len(used)
    return loss


def fine_tuning_loss(
    student: UNet2DConditionModel,
    unet: UNet2DConditionModel,
    gates: Gates,
    scheduler: DDPMScheduler,
    config: Any,
    latents: Tensor,
    text: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """Return the fine-tuning loss of a sliced student on a batch (APTP paper, Eq. 30), without feature distillation."""
    noisy = scheduler.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        gates.set(torch.ones(len(latents), gates.space.size))
        teacher = unet(noisy, timesteps, text).sample
    prediction = student(noisy, timesteps, text).sample
    target = (
        noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    )
    loss = config.denoising_weight * F.mse_loss(prediction, target)
    return loss + config.distillation_weight * F.mse_loss(prediction, teacher)
