"""Inception's features for FID and KID, with the arithmetic of clean-fid's mode `legacy_pytorch`.

The network and its weights are clean-fid's (its `InceptionV3` is pytorch-fid's); they come with the extra `metrics`,
since they need torchvision.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekit.evaluation.evaluator import in_batches
from prunekit.runtime.errors import MissingPackageError, UserError

SIDE = 299  # side in pixels of the pictures that the network was trained on


class InceptionFeatures:
    """The pooled features of FID's Inception network; it embeds no texts, so only `kid` and `frechet` can use it."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls) -> "InceptionFeatures":
        """Load the network; raise ImportError without the extra `metrics`, ValueError if its weights are missing."""
        try:
            from cleanfid.inception_pytorch import InceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another version of torch
            raise MissingPackageError(
                "Inception features need clean-fid: pip install 'prunekit[metrics]'; or set "
                f"feature_model=emoji or a CLIP model, or remove kid and frechet from metrics ({error})"
            ) from error
        try:
            model = InceptionV3(output_blocks=[3], resize_input=False)
        except OSError as error:
            raise UserError(f"clean-fid cannot fetch the weights of its Inception network: {error}") from error
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return features (n, 2048), float32, on the CPU, of uint8 pictures (n, 3, H, W)."""
        return in_batches(self._pool, images)

    def _pool(self, images: Tensor) -> Tensor:
        pixels = images.to(self.device).float()
        pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False).clamp(0, 255)
        return self.model(pixels / 255)[0].flatten(1)
