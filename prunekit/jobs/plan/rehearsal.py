"""The memory that a stage takes, from a rehearsal of its step: the real code runs on tensors that have no content.

PyTorch's fake tensors know shapes alone, so a step of a full-size model takes about a second and no memory, and every
storage that it would make is counted while it lives. What this does not see: the allocator's gaps and the scratch
space of kernels.
"""

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunekit.core.call import Call, predict, zeros
from prunekit.core.gates import gated
from prunekit.core.registry import denoiser_of, family_of
from prunekit.core.space import UnitSpace
from prunekit.training.memory import held
from prunekit.training.trainer import TrainerConfig

FLOAT32, LOWERED = 4, 2  # bytes of a number; frozen weights are held in both
KEPT_IN_FLOAT32 = (nn.GroupNorm, nn.LayerNorm)  # by CUDA's autocast, which there is no GPU to ask


class LiveMemory(TorchDispatchMode):
    """A context: `now` and `peak` are the bytes of the storages that operations in it made and that still live.

    known: tensors that were there before and are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self._seen.discard(key)


class Rehearsal:
    """A pipeline's denoiser and autoencoder as fake tensors; methods return the bytes of a step beyond the weights.

    latent: (h, w). samples: of one forward pass on one device.
    """

    def __init__(self, model: ModelMixin, autoencoder: AutoencoderKL):
        """Take the shapes of parts that may be on the meta device."""
        self.mode = FakeTensorMode()
        with self.mode:
            self.model = type(model).from_config(model.config).eval()
            self.autoencoder = type(autoencoder).from_config(autoencoder.config).eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, KEPT_IN_FLOAT32):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    def search(
        self, space: UnitSpace, latent: tuple[int, int], tokens: int, samples: int, config: TrainerConfig
    ) -> int:
        """A step that learns soft gates: forward, backward to the gates. A teacher's pass before it takes less."""
        self.model.requires_grad_(False)
        memory = LiveMemory(self.model.parameters())
        with self.mode, memory, _held(config, self.model), gated(self.model, space) as gates:
            call = zero_call(self.model, latent, tokens, samples)
            gates.set(torch.rand(samples, space.size, requires_grad=True))
            with autocast(config.precision):
                prediction = predict(self.model, call)
            prediction.float().square().mean().backward()
        return memory.peak

    def training(self, latent: tuple[int, int], tokens: int, samples: int, config: TrainerConfig | None = None) -> int:
        """A step that trains the weights; their gradients are not counted. config None: float32, nothing recomputed."""
        config = config or TrainerConfig(steps=1, batch_size=samples, learning_rate=1.0, precision="float32")
        self.model.requires_grad_(True)
        with self.mode, _held(config, self.model):
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with LiveMemory([*self.model.parameters(), *(p.grad for p in self.model.parameters())]) as memory:
                call = zero_call(self.model, latent, tokens, samples)
                with autocast(config.precision):
                    prediction = predict(self.model, call)
                prediction.float().square().mean().backward()
            self.model.zero_grad(set_to_none=True)
        return memory.peak

    @torch.no_grad()
    def sampling(self, latent: tuple[int, int], tokens: int, samples: int, guided: bool, precision: str) -> int:
        """A pipeline's call: the denoiser on all samples, twice under guidance, and the decoder on all samples."""
        channels = self.autoencoder.config.latent_channels
        rows = family_of(self.model).call_batch(samples, guided)
        with self.mode, LiveMemory(self.autoencoder.parameters()) as decoding, autocast(precision):
            self.autoencoder.decode(torch.zeros(samples, channels, *latent))
        return max(self.forward(latent, tokens, rows, precision), decoding.peak)

    @torch.no_grad()
    def forward(self, latent: tuple[int, int], tokens: int, samples: int, precision: str) -> int:
        """The denoiser's pass without gradients."""
        with self.mode, LiveMemory(self.model.parameters()) as memory, autocast(precision):
            predict(self.model, zero_call(self.model, latent, tokens, samples))
        return memory.peak

    @torch.no_grad()
    def encoding(self, pixels: tuple[int, int], samples: int) -> int:
        """The encoder on pictures of (height, width) pixels."""
        with self.mode, LiveMemory(self.autoencoder.parameters()) as memory:
            self.autoencoder.encode(torch.zeros(samples, 3, *pixels))
        return memory.peak


def autocast(precision: str) -> torch.autocast:
    """Return the context of a forward pass in a resolved precision; bfloat16 and float16 take the same memory."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32")


def zero_call(model: ModelMixin, latent: tuple[int, int], tokens: int, samples: int, device: str = "cpu") -> Call:
    """Return a call of zeros, at timestep 1; latent: (h, w)."""
    timesteps = torch.ones(samples, dtype=torch.long, device=device)
    return denoiser_of(model).example(model, samples, latent, tokens, zeros(device), timesteps)


def training_bytes(params: int, config: TrainerConfig) -> int:
    """Bytes of the weights in training: float32 weight, gradient, AdamW's two moments, and an average where kept."""
    return params * FLOAT32 * (4 + (config.ema is not None))


def _held(config: TrainerConfig, model: ModelMixin) -> AbstractContextManager:
    """Hold the denoiser as a training does; fake tensors cannot change their layout, which has no size."""
    return held(config.model_copy(update={"channels_last": False}), model)
