"""A CLIP model of transformers with the evaluator's methods, for data sets of photographs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekit.evaluation.evaluator import in_batches
from prunekit.runtime.errors import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels that OpenAI's CLIP was trained on
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
TOKENIZERS = {  # tokenizers of models that are published without one
    "yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}


class CLIPEvaluator:
    """The methods of `Evaluator` over a `CLIPModel` and its tokenizer.

    Pictures are resized bicubically to the model's size (a picture that is not square is squeezed) and normalized as
    OpenAI's CLIP expects. `features` are the image embeddings before normalization, on which CMMD is defined. The model
    of PickScore is a CLIP model too: its score is the cosine times exp(`logit_scale`).
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.device = next(model.parameters()).device
        self.mean, self.deviation = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (MEAN, DEVIATION))

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "CLIPEvaluator":
        """Load a folder or a hub name such as "openai/clip-vit-large-patch14-336" (CMMD's)."""
        from transformers import AutoTokenizer, CLIPModel

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS.get(str(name), name))
            model, info = CLIPModel.from_pretrained(name, output_loading_info=True)
            if info["missing_keys"]:  # for example in a pipeline's text encoder: these weights would be random
                raise UserError(f"it is not a complete CLIP model, {len(info['missing_keys'])} weights are missing")
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(": ")
            raise UserError(
                f'cannot load the evaluator {str(name)!r}: use "emoji", a folder of a CLIP model, or its name on the '
                f"hub ({reason})"
            ) from error
        return cls(model.to(device), tokenizer)

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of the factor for cosines, a scalar."""
        return self.model.logit_scale

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return image embeddings (n, E), not normalized, of uint8 pictures (n, 3, H, W)."""
        return in_batches(self._project, images)

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed uint8 pictures (n, 3, H, W) as unit vectors (n, E), float32, on the CPU."""
        return F.normalize(self.features(images), dim=-1)

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return `features` and `embed_images` of pictures, from one forward pass."""
        features = self.features(images)
        return features, F.normalize(features, dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Embed texts as unit vectors (n, E), float32, on the CPU; long texts are cut at the model's maximum length."""
        length = self.model.config.text_config.max_position_embeddings
        embeddings = []
        for start in range(0, len(texts), 256):
            tokens = self.tokenizer(
                texts[start : start + 256],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            hidden = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            embeddings.append(self.model.text_projection(hidden.pooler_output).float().cpu())
        return F.normalize(torch.cat(embeddings), dim=-1)

    def _project(self, images: Tensor) -> Tensor:
        side = self.model.config.vision_config.image_size
        pixels = F.interpolate(images.to(self.device).float() / 255, (side, side), mode="bicubic", antialias=True)
        pixels = (pixels.clamp(0, 1) - self.mean) / self.deviation
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
