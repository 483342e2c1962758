"""Train an AutoencoderKL: L1 errors of pixels and edges, and a small KL term (as Rombach et al., 2022, no critic)."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.evaluation.ceiling import to_unit
from prunekit.runtime.randomness import epoch_indices, generator

KL_WEIGHT = 5e-4  # keeps the decoder smooth around each latent, so that small sampling errors stay small
EDGE_WEIGHT = 0.5  # of the differences of neighboring pixels, for sharp outlines and letters


@dataclass
class AutoencoderObjective:
    """Reconstruct `images`, uint8 (n, 3, H, W); the latent's noise is keyed by (seed, step)."""

    autoencoder: AutoencoderKL
    images: Tensor
    batch_size: int
    seed: int
    device: torch.device
    decoder_only: bool = False  # the encoder, and so every latent, stays as it is

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Return the modules that are trained, by the names that checkpoints give them."""
        if self.decoder_only:
            return {"decoder": self.autoencoder.decoder, "post_quant_conv": self.autoencoder.post_quant_conv}
        return {"autoencoder": self.autoencoder}

    def batch(self, step: int) -> tuple[Tensor, int]:
        """Return (image indices (B,), step)."""
        return epoch_indices(len(self.images), self.batch_size, self.seed, step), step

    def shared_loss(self, batch: tuple[Tensor, int]) -> dict[str, Tensor]:
        """Return no terms: none of them needs the whole batch."""
        return {}

    def micro_loss(self, batch: tuple[Tensor, int], positions: Tensor) -> dict[str, Tensor]:
        """Return the terms summed over `positions`, divided by the batch size."""
        indices, step = batch
        share = len(positions) / len(indices)
        target = to_unit(self.images[indices[positions]]).to(self.device)  # (b, 3, H, W)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.decoder_only):
            posterior = self.autoencoder.encode(target).latent_dist
        noise = torch.randn(len(indices), *posterior.mean.shape[1:], generator=generator(self.seed, "latent", step))
        latents = posterior.mean + posterior.std * noise[positions].to(self.device)
        output = self.autoencoder.decode(latents).sample.float()
        edges = torch.stack([F.l1_loss(output.diff(dim=d), target.diff(dim=d)) for d in (2, 3)]).sum()
        terms = {"l1": share * F.l1_loss(output, target), "edges": share * EDGE_WEIGHT * edges}
        if not self.decoder_only:
            terms["kl"] = share * KL_WEIGHT * posterior.kl().float().mean() / posterior.mean[0].numel()
        return terms


@torch.no_grad()
def calibrate_scale(autoencoder: AutoencoderKL, images: Tensor, device: torch.device) -> None:
    """Set `scaling_factor` so that the latents of `images` have unit variance."""
    autoencoder.register_to_config(scaling_factor=float(1 / latent_means(autoencoder, images, device).std()))


@torch.no_grad()
def latent_means(autoencoder: AutoencoderKL, images: Tensor, device: torch.device) -> Tensor:
    """Return the unscaled posterior means (n, C, h, w) of uint8 `images` (n, 3, H, W)."""
    return torch.cat([autoencoder.encode(to_unit(part).to(device)).latent_dist.mean for part in images.split(64)])
