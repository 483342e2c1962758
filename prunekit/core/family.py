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

    Latents and noise are (B, C, h, w). Timesteps are (B,), from 0 (clean) to `num_timesteps` (noise): integers if the
    process is discrete.
    """

    num_timesteps: int

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the timesteps of a training batch, (count,)."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the latents noised to the timesteps, (B, C, h, w)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict, (B, C, h, w).

        Raises:
            UserError: the scheduler asks for a prediction that is not supported.

        """
        ...

    def weights(self, timesteps: Tensor, gamma: float, form: str) -> Tensor:
        """Return the min-SNR weight of each sample's error, (B,) (Hang et al., 2023).

        gamma: value at which the SNR is clipped.
        form: "velocity" or "published", as the setting `snr_form` says.
        """
        ...


class Family(Protocol):
    """What a pipeline does around its denoiser; it holds no state.

    negative: negative prompt that must be passed to a pipeline's calls; None: the pipeline has a default.
    scale: pixels per latent position along a side, for the autoencoder of most models of the family.
    """

    negative: ClassVar[str | None]
    scale: ClassVar[int]

    def refusal(self, pipeline: Any) -> str | None:
        """Return why a loaded pipeline is not supported, as words that follow "NAME has"; None if it is supported."""
        ...

    def process(self, scheduler: Any | None) -> NoiseProcess:
        """Return the noise process of a pipeline's scheduler; for None, the process of most models of the family."""
        ...

    def moments(self, autoencoder: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of pictures' latents, (n, C, h, w) each, as the denoiser takes them.

        pixels: (n, 3, H, W) from -1 to 1, on the autoencoder's device and in its dtype.
        """
        ...

    def reconstruct(self, autoencoder: nn.Module, pixels: Tensor) -> Tensor:
        """Encode and decode pictures, (n, 3, H, W) from about -1 to 1; the latents are the posterior's means."""
        ...

    def states(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """Return the conditions of texts, by role: "text" (n, T, E), and "pooled" (n, P) if the family has it."""
        ...

    def null_states(self, pipeline: Any) -> dict[str, Tensor]:
        """Return the conditions of the empty text, (1, …), in the form in which the pipeline uses them for guidance."""
        ...

    def embeddings(
        self, pipeline: Any, texts: list[str], negatives: list[str] | None, guided: bool, **options: Any
    ) -> dict[str, Tensor]:
        """Return the keyword arguments that replace the texts in a pipeline's call by their embeddings.

        Args:
            pipeline: pipeline whose text encoders run.
            texts: one prompt per picture.
            negatives: one negative prompt per picture; None: the pipeline's default, which may differ from the empty
                text.
            guided: whether to include the embeddings of the negative prompts.
            options: options of the pipeline's `encode_prompt`, such as `clip_skip`.

        """
        ...

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the keyword arguments of a pipeline's calls at a guidance scale, except texts, sizes and steps."""
        ...

    def draws_one_step(self, pipeline: Any) -> bool:
        """Return whether a pipeline, with its scheduler, can draw with a single scheduler step."""
        ...

    def texts(self, guidance: float, options: Mapping[str, Any] = ...) -> int:
        """Return the number of texts per picture on which the denoiser runs at every step: 2 with a negative text.

        options: the pipeline's plain settings, and further options of its call; see `registry.texts_of`.
        """
        ...

    def text_length(self, lengths: Mapping[str, int]) -> int:
        """Return the number of text tokens that the denoiser takes, from the tokenizers' largest lengths.

        lengths: largest number of tokens by the tokenizer's name in the pipeline, such as "tokenizer_2"; unknown ones
            are left out.
        """
        ...

    def sizes(self, height: int, width: int) -> Tensor:
        """Return the condition "sizes", (6,) float32, of uncropped pictures of a height and width in pixels."""
        ...

    def pictures(self, output: Any) -> Any:
        """Return the pictures, or latents, from the output of a pipeline's call, one per text."""
        ...

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the number of samples in one denoiser call that draws `pictures` pictures, guided or not."""
        ...


class Guided:
    """The part of a `Family` whose pipelines guide with a second text per picture, in the same denoiser call.

    Their autoencoder is an AutoencoderKL of pictures.
    """

    negative: ClassVar[str | None] = None
    scale: ClassVar[int] = 8

    def call_options(self, pipeline: Any, guidance: float) -> dict[str, Any]:
        """Return the keyword arguments of a pipeline's calls at a guidance scale."""
        return {"guidance_scale": guidance}

    def draws_one_step(self, pipeline: Any) -> bool:
        """Return True, as for most pipelines."""
        return True

    def texts(self, guidance: float, options: Mapping[str, Any] = MappingProxyType({})) -> int:
        """Return 2 for a guided call, which runs the prompt and the negative prompt; else 1."""
        return 2 if guidance > 1 else 1

    def reconstruct(self, autoencoder: Any, pixels: Tensor) -> Tensor:
        """Encode and decode pictures, (n, 3, H, W), with an AutoencoderKL."""
        reconstructed: Tensor = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mean).sample
        return reconstructed

    def pictures(self, output: Any) -> Any:
        """Return the pictures from the output of a pipeline's call."""
        return output.images

    def call_batch(self, pictures: int, guided: bool) -> int:
        """Return the number of samples in one denoiser call; a guided call holds both texts of each picture."""
        return 2 * pictures if guided else pictures
