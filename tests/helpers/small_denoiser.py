"""A denoiser that is not a UNet: a tiny transformer whose arguments have other names, and its description."""

from contextlib import contextmanager

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from prunekit.core import registry
from prunekit.core.call import Call
from prunekit.denoisers.unet.family import StableDiffusion


class TinyTransformer(ModelMixin, ConfigMixin):
    """Two layers over latent positions; the text embedding shifts the positions."""

    @register_to_config
    def __init__(self, channels: int = 4, text_width: int = 6, side: int = 4):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(channels, channels) for _ in range(2)])
        self.text = nn.Linear(text_width, channels)

    def forward(self, hidden_states, timestep, context, return_dict=True):
        """(B, C, h, w), (B,), (B, T, E) -> (B, C, h, w)."""
        x = hidden_states.movedim(1, -1) + self.text(context).mean(1)[:, None, None]
        for layer in self.layers:
            x = x + layer(x).tanh() * (1 + timestep.float().view(-1, 1, 1, 1) / 1000)
        output = x.movedim(-1, 1)
        return {"sample": output} if return_dict else (output,)


class Tiny:
    """The library's description of how to call the model."""

    family = StableDiffusion()

    def call(self, noisy, timesteps, conditions):
        """Return the call with this model's argument names."""
        return Call({"hidden_states": noisy, "timestep": timesteps, "context": conditions["text"]})

    def example(self, model, batch, latent, text_length, fill, timesteps=None):
        """Return a call with valid shapes."""
        noisy = fill("noisy", (batch, model.config.channels, *latent))
        text = fill("text", (batch, text_length, model.config.text_width))
        return self.call(noisy, torch.tensor(1) if timesteps is None else timesteps, {"text": text})

    def at(self, call, noisy, timesteps):
        """Return the call with other noisy latents."""
        return call.replace(hidden_states=noisy, timestep=timesteps)

    def noisy(self, call):
        """Return the noisy latents."""
        return call["hidden_states"]

    def latent_size(self, model):
        """Return the latent's size."""
        return (model.config.side, model.config.side)

    def blocks(self, model, inner=True):
        """Return all layers."""
        return {f"layers.{index}": layer for index, layer in enumerate(model.layers)}

    def hidden(self, output):
        """Return a layer's output, which is its hidden states."""
        return output


@contextmanager
def registered():
    """Register the description while the context is open."""
    attributes = list(registry._ATTRIBUTES)
    registry.register_denoiser([TinyTransformer], Tiny(), "transformer")
    try:
        yield
    finally:
        registry._LOADERS.pop("TinyTransformer")
        registry._LOADED.pop("TinyTransformer", None)
        registry._ATTRIBUTES[:] = attributes
