"""What pipelines do around a denoiser: the protocol of a family, which `Denoiser.family` names."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor, nn


class NoiseProcess(Protocol):
    """How latents are noised, and what a denoiser then predicts.

    Latents and noise are (B, C, h, w). Timesteps are (B,) in the unit that the denoiser takes, from 0, clean, to
    `num_timesteps`, noise: integers where the process is discrete.
    """

    num_timesteps: int

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the timesteps of a training batch, (count,)."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return latents at the timesteps, (B, C, h, w)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict, (B, C, h, w).

        Raises:
            UserError: the scheduler asks for a prediction that is not supported.

        """
        ...

    def weights(self, timesteps: Tensor, gamma: float, form: str) -> Tensor:
        """Return the min-SNR weight of each sample's error, (B,) (Hang et al., 2023).

        gamma: where the weights are cut off. form: "velocity" or "published", as the setting `snr_form` says.
        """
        ...


class Family(Protocol):
    """What a pipeline does around its denoiser; it holds no state.

    negative: the text that guidance leads away from, where a pipeline's call must name one; None: the pipeline has it.
    scale: pixels of a side per latent position, of the autoencoder that most models of the family have.
    """

    negative: ClassVar[str | None]
    scale: ClassVar[int]

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a loaded pipeline is not supported, as "NAME has" goes on; None if it is."""
        ...

    def process(self, scheduler: Any | None) -> NoiseProcess:
        """Return the noise process of a pipeline's scheduler; of None, the one that most models of the family have."""
        ...

    def moments(self, autoencoder: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of pictures' latents, (n, C, h, w) each, as the denoiser takes them.

        pixels: (n, 3, H, W) from -1 to 1, on the autoencoder's device and in its dtype.
        """
        ...

    def reconstruct(self, autoencoder: nn.Module, pixels: Tensor) -> Tensor:
        """Return pictures, (n, 3, H, W) from about -1 to 1, encoded and decoded; latents are the posterior's means."""
        ...

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the conditions that texts give, by role: "text" (n, T, E), and "pooled" (n, P) where there is one."""
        ...

    def null_states(self, pipeline: Any) -> dict[str, Tensor]:
        """Return the conditions of the empty text, (1, …), as the pipeline guides away from it."""
        ...

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return a pipeline's keyword arguments that take the place of its texts.

        Args:
            pipeline: whose text encoders run.
            texts: a prompt for each picture.
            negatives: as many negative prompts; None: the pipeline's own, which may differ from the empty text.
            guided: with those of the negative prompts.
            options: of the pipeline's `encode_prompt`, such as `clip_skip`.

        """
        ...

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the keyword arguments of a pipeline's calls for a guidance scale, beside texts, sizes and steps."""
        ...

    def texts(self, guidance: float, options: Mapping[str, Any] = ...) -> int:
        """Return how many texts of a picture a pipeline runs the denoiser on at every step: 2 where it leads away.

        options: the plain settings of the pipeline, and further ones of its call; see `registry.texts_of`.
        """
        ...

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the tokens of a text, by the most that each of a pipeline's tokenizers gives.

        lengths: by the tokenizer's name in the pipeline, such as "tokenizer_2"; one that is not known is left out.
        """
        ...

    def sizes(self, height: int, width: int) -> Tensor:
        """Return the condition "sizes", (6,) float32, of uncropped pictures of a height and width in pixels."""
        ...

    def pictures(self, output: Any) -> Any:
        """Return the pictures, or latents, of what a pipeline's call returns, one of each text."""
        ...

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the samples of one denoiser call of a pipeline that draws pictures, with guidance or without."""
        ...


class Guided:
    """The part of a `Family` whose pipelines guide by a second text of a picture, in the same call of the denoiser.

    Their autoencoder is an AutoencoderKL of pictures.
    """

    negative: ClassVar[str | None] = None
    scale: ClassVar[int] = 8

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the keyword arguments of a pipeline's calls for a guidance scale."""
        return {"guidance_scale": guidance}

    def texts(self, guidance: float, options: Mapping[str, Any] = MappingProxyType({})) -> int:
        """Return 2 where a call is guided: the picture's text and the one that it leads away from; else 1."""
        return 2 if guidance > 1 else 1

    def reconstruct(self, autoencoder: Any, pixels: Tensor) -> Tensor:
        """Return pictures, (n, 3, H, W), encoded and decoded by an AutoencoderKL."""
        reconstructed: Tensor = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mean).sample
        return reconstructed

    def pictures(self, output: Any) -> Any:
        """Return the pictures of what a pipeline's call returns."""
        return output.images

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the samples of one denoiser call: both texts of a picture are in it."""
        return 2 * pictures if guided else pictures
