"""The memory of a stage, from a rehearsal of its step: the real code runs on tensors without content.

PyTorch's fake tensors have shapes but no data, so a step of a full-size model takes about a second and no memory. Every
storage that the step would allocate is counted while it lives. Gaps of the allocator and scratch space of kernels are
not counted.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunekit.core.call import Call, predict, zeros
from prunekit.core.description import Description
from prunekit.core.gates import gated
from prunekit.core.registry import denoiser_of, family_of
from prunekit.core.renumbering import fewer_layers
from prunekit.core.slicing import PrunedModel
from prunekit.core.space import UnitSpace
from prunekit.recovery.fine_tuning import FineTuneConfig
from prunekit.recovery.low_rank import LAYERS, LoraConfig
from prunekit.training.memory import held, lower
from prunekit.training.trainer import TrainerConfig

FLOAT32, LOWERED = 4, 2  # bytes per number; frozen weights are held in either dtype
# Blocks of one kind in a list: up to MOST_BLOCKS are all rehearsed; of more, only FEW_BLOCKS or MORE_BLOCKS are
MOST_BLOCKS, FEW_BLOCKS, MORE_BLOCKS = 8, 2, 3
KEPT_IN_FLOAT32 = (nn.GroupNorm, nn.LayerNorm)  # by CUDA's autocast, which the rehearsal on the CPU imitates


class LiveMemory(TorchDispatchMode):
    """A context that counts the bytes of the live storages made in it: at present (`now`) and at most (`peak`).

    known: tensors that existed before and are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the storages of its results."""
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


@dataclass(frozen=True)
class Size:
    """A denoiser to rehearse: the changed settings of its config, and the factor of its memory in the total."""

    changes: Mapping[str, Any]
    share: float


def sizes_of(model: ModelMixin) -> list[Size]:
    """Return the denoisers to rehearse for a model: the model, or shorter ones whose weighted memory adds up to it.

    Blocks of one kind have the same shapes and are in the same list. The first shorter denoiser has FEW_BLOCKS of every
    kind with more than MOST_BLOCKS. For each such kind, one further denoiser has MORE_BLOCKS of it.
    """
    denoiser, whole = denoiser_of(model), [Size({}, 1.0)]
    if not isinstance(denoiser, Description) or isinstance(model, PrunedModel):
        return whole
    live: dict[str, list[int]] = {path: [] for path in denoiser.lists}
    kinds: dict[tuple[str, Hashable], list[int]] = {}
    for path in denoiser.lists:
        blocks: Any = model.get_submodule(path)
        for index, block in enumerate(blocks):
            shapes = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
            kinds.setdefault((path, shapes), []).append(index)
    many = {kind: indices for kind, indices in kinds.items() if len(indices) > MOST_BLOCKS}
    for kind, indices in kinds.items():
        live[kind[0]] += indices[:FEW_BLOCKS] if kind in many else indices

    def size(share: float, more: tuple[str, Hashable] | None = None) -> Size | None:
        left = {path: list(indices) for path, indices in live.items()}
        if more is not None:
            left[more[0]] += many[more][FEW_BLOCKS:MORE_BLOCKS]
        counts, named = denoiser.layers_in_config, denoiser.indices_in_config
        ordered = {path: sorted(indices) for path, indices in left.items()}
        config = fewer_layers(dict(model.config), ordered, counts, named)
        return None if config is None else Size({key: config[key] for key in (*counts, *named)}, share)

    steps = {kind: (len(indices) - FEW_BLOCKS) / (MORE_BLOCKS - FEW_BLOCKS) for kind, indices in many.items()}
    sizes = [size(1.0 - sum(steps.values())), *(size(share, kind) for kind, share in steps.items())]
    found = [one for one in sizes if one is not None]
    return found if many and len(found) == len(sizes) else whole


class Rehearsal:
    """A pipeline's denoiser and autoencoder as fake tensors; methods return the bytes of a step beyond the weights.

    A transformer with long lists of equal blocks is rehearsed with a few of them; the measured memory per further block
    is added for the rest.

    In all methods, latent is the latent size (h, w), and samples is the batch of one forward pass on one device.
    """

    def __init__(self, model: ModelMixin, autoencoder: AutoencoderKL, lowered: bool = False, whole: bool = False):
        """Store the shapes of a denoiser and an autoencoder, which may be on the meta device.

        lowered: frozen weights are held in bfloat16. whole: rehearse all blocks, also of long lists.
        """
        self.mode, self.lowered, self._kind, self._config = FakeTensorMode(), lowered, type(model), model.config
        self._sizes = [Size({}, 1.0)] if whole else sizes_of(model)
        self._built: dict[Hashable, Any] = {}
        with self.mode:
            self.autoencoder = type(autoencoder).from_config(autoencoder.config).eval().requires_grad_(False)

    def _measured(self, phases: Callable[[Any], list[int]], lowered: bool, lora: LoraConfig | None = None) -> int:
        """Return the largest peak of a step over its phases, computed from the peaks of the shorter denoisers.

        phases: runs the step of a denoiser and returns the peak of each phase (forward, backward) in bytes. These peaks
            are linear in the number of blocks, but their maximum is not.
        """
        measured = [phases(self._model(size, lowered, lora)) for size in self._sizes]
        shares = [size.share for size in self._sizes]
        return round(max(sum(map(mul, shares, peaks)) for peaks in zip(*measured, strict=True)))

    def _model(self, size: Size, lowered: bool, lora: LoraConfig | None) -> Any:
        key = (tuple(size.changes.items()), lowered, lora and lora.rank)
        if key not in self._built:
            with self.mode:
                model = self._kind.from_config({**self._config, **size.changes}).eval()
                if lowered:
                    lower(model)
                if lora is not None:
                    _add_low_rank(model.requires_grad_(False), lora)
            for module in model.modules():
                if isinstance(module, KEPT_IN_FLOAT32):
                    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            self._built[key] = model
        return self._built[key]

    def search(
        self, space: UnitSpace, latent: tuple[int, int], tokens: int, samples: int, config: TrainerConfig
    ) -> int:
        """Return the memory of a search step: forward, backward to the gates. A teacher's forward pass takes less."""

        def step(model: Any) -> list[int]:
            model.requires_grad_(False)
            there = {name for name, _ in model.named_modules()}
            units = UnitSpace(group for group in space.groups if group.path in there)
            memory = LiveMemory(model.parameters())
            with self.mode, memory, _held(config, model), gated(model, units) as gates:
                call = zero_call(model, latent, tokens, samples)
                gates.set(torch.rand(samples, units.size, requires_grad=True))
                return _phases(model, call, config, memory)

        return self._measured(step, self.lowered)

    def training(self, latent: tuple[int, int], tokens: int, samples: int, config: TrainerConfig | None = None) -> int:
        """Return the memory of a step that trains all weights, without weights and gradients; config None: float32."""
        config = config or TrainerConfig(steps=1, batch_size=samples, learning_rate=1.0, precision="float32")
        step = partial(self._step, latent=latent, tokens=tokens, samples=samples, config=config)
        return self._measured(lambda model: step(model.requires_grad_(True)), lowered=False)

    def low_rank(self, latent: tuple[int, int], tokens: int, samples: int, config: FineTuneConfig) -> int:
        """Return the memory of a step that trains low-rank changes; weights and gradients are not counted."""
        step = partial(self._step, latent=latent, tokens=tokens, samples=samples, config=config)
        return self._measured(step, self.lowered, config.lora)

    def _step(self, model: Any, latent: tuple[int, int], tokens: int, samples: int, config: TrainerConfig) -> list[int]:
        with self.mode, _held(config, model):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            with LiveMemory([*model.parameters(), *(parameter.grad for parameter in trained)]) as memory:
                peaks = _phases(model, zero_call(model, latent, tokens, samples), config, memory)
            model.zero_grad(set_to_none=True)
        return peaks

    @torch.no_grad()
    def sampling(self, latent: tuple[int, int], tokens: int, samples: int, guided: bool, precision: str) -> int:
        """Return the memory of a pipeline's call: the larger of its denoiser calls and of decoding all samples."""
        channels = self.autoencoder.config.latent_channels
        rows = family_of(self._model(self._sizes[0], self.lowered, None)).call_batch(samples, guided)
        with self.mode, LiveMemory(self.autoencoder.parameters()) as decoding, autocast(precision):
            self.autoencoder.decode(torch.zeros(samples, channels, *latent))
        return max(self.forward(latent, tokens, rows, precision), decoding.peak)

    @torch.no_grad()
    def forward(self, latent: tuple[int, int], tokens: int, samples: int, precision: str) -> int:
        """Return the memory of the denoiser's forward pass without gradients."""

        def run(model: Any) -> list[int]:
            with self.mode, LiveMemory(model.parameters()) as memory, autocast(precision):
                predict(model, zero_call(model, latent, tokens, samples))
            return [memory.peak]

        return self._measured(run, self.lowered)

    @torch.no_grad()
    def encoding(self, pixels: tuple[int, int], samples: int) -> int:
        """Return the memory of encoding pictures of (height, width) pixels."""
        with self.mode, LiveMemory(self.autoencoder.parameters()) as memory:
            self.autoencoder.encode(torch.zeros(samples, 3, *pixels))
        return memory.peak


def _phases(model: ModelMixin, call: Call, config: TrainerConfig, memory: LiveMemory) -> list[int]:
    """Run a step; return the peaks of its forward and of its backward pass, in bytes."""
    with autocast(config.precision):
        prediction = predict(model, call)
    forward, memory.peak = memory.peak, memory.now
    prediction.float().square().mean().backward()
    return [forward, memory.peak]


def _add_low_rank(model: nn.Module, config: LoraConfig) -> None:
    """Add to each layer the low-rank change that peft adds; peft's own layers cannot be made of fake tensors."""
    for layer in [module for module in model.modules() if isinstance(module, LAYERS)]:
        if isinstance(layer, nn.Linear):
            down: nn.Module = nn.Linear(layer.in_features, config.rank, bias=False)
            up: nn.Module = nn.Linear(config.rank, layer.out_features, bias=False)
        else:
            sizes: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding")}
            down = nn.Conv2d(layer.in_channels, config.rank, bias=False, **sizes)
            up = nn.Conv2d(config.rank, layer.out_channels, 1, bias=False)
        layer.add_module("change", nn.Sequential(down, up))
        layer.register_forward_hook(lambda module, inputs, output: output + module.change(inputs[0].float()))


def autocast(precision: str) -> torch.autocast:
    """Return the context of a forward pass in a resolved precision; bfloat16 and float16 take the same memory."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32")


def zero_call(model: ModelMixin, latent: tuple[int, int], tokens: int, samples: int, device: str = "cpu") -> Call:
    """Return a call of zeros, at timestep 1; latent: (h, w)."""
    timesteps = torch.ones(samples, dtype=torch.long, device=device)
    return denoiser_of(model).example(model, samples, latent, tokens, zeros(device), timesteps)


def training_bytes(params: int, config: TrainerConfig) -> int:
    """Return the bytes of trained weights in float32: weight, gradient, AdamW's two moments, and an EMA if kept."""
    return params * FLOAT32 * (4 + (config.ema is not None))


def _held(config: TrainerConfig, model: ModelMixin) -> AbstractContextManager:
    """Hold the denoiser as a training does, but not in channels_last: fake tensors cannot change their layout."""
    return held(config.model_copy(update={"channels_last": False}), model)
