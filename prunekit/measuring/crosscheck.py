"""The check of `prunekit macs --check`: our MACs beside other counters', with every difference explained in numbers."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunekit.core.call import predict, zeros
from prunekit.core.cost import CostModel
from prunekit.core.discovery import discover
from prunekit.core.registry import denoiser_of

MOST_TRACED_MACS = 10**10  # fvcore has to run the model; above this it runs at a latent of SMALL x SMALL instead
SMALL = 8
CHARGED = ("group_norm", "layer_norm", "upsample_nearest2d", "einsum")  # by fvcore, though not multiply-adds
_MISSING = "not installed; it comes with the extra `check`: pip install 'prunekit[check]'"


@dataclass(frozen=True)
class Row:
    """The result of one counter, batch 1.

    counter: name of the counter.
    sample_size: the latent (h, w) at which it counted.
    macs: its count; None if it is not installed.
    ours: the exact MACs by CostModel at that latent.
    unexplained: the rest of the difference after all corrections that `explanation` names; 0 means agreement.
    """

    counter: str
    sample_size: tuple[int, int]
    macs: int | None
    ours: int
    explanation: str
    unexplained: int | None = None

    @property
    def difference(self) -> int | None:
        """The counter's MACs minus ours."""
        return None if self.macs is None else self.macs - self.ours


def crosscheck(model: ModelMixin, sample_size: int | tuple[int, int] | None = None, text_length: int = 77) -> list[Row]:
    """Count a model's MACs, stock or pruned, with FlopCounterMode, thop and fvcore beside CostModel.

    The model itself is only read: the counters work on copies without weights. sample_size and text_length are as in
    CostModel. A counter whose package is missing has a row that says what to install.
    """
    space = discover(model, depth="none")
    exact = CostModel(model, space, sample_size, text_length)
    size, ours = exact.sample_size, exact.dense_macs
    rows = [Row("prunekit, exact", size, ours, ours, "convolutions, linear layers, QKᵀ and AV", 0)]
    rows.append(_flop_counter_row(model, size, text_length, ours))
    attention = ours - CostModel(model, space, size, text_length, "conv_linear").dense_macs
    rows.append(_thop_row(model, size, text_length, ours, attention))
    if ours > MOST_TRACED_MACS:
        size = (SMALL, SMALL)
        ours = CostModel(model, space, size, text_length).dense_macs
    rows.append(_fvcore_row(model, size, text_length, ours, is_smaller=size != exact.sample_size))
    return rows


class _Called(nn.Module):
    """A copy of a model, without weights, that takes a single tensor, because counters pass positional arguments."""

    def __init__(self, model: ModelMixin, size: tuple[int, int], text_length: int, device: str):
        super().__init__()
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        with torch.device("meta"):
            self.model = type(model)(**config).eval()
        if device != "meta":  # every weight is a view of one zero: the model runs, and weights take no memory
            for module in self.model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    zero = nn.Parameter(torch.zeros((), device=device).expand(parameter.shape), requires_grad=False)
                    setattr(module, name, zero)
            denoiser_of(model).fill_tables(self.model)
        self.denoiser, self.timesteps = denoiser_of(model), torch.ones(1, dtype=torch.long, device=device)
        self.call = self.denoiser.example(self.model, 1, size, text_length, zeros(device), self.timesteps)
        self.noisy = self.denoiser.noisy(self.call)

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        return predict(self.model, self.denoiser.at(self.call, noisy, self.timesteps))


def _flops(model: ModelMixin, size: tuple[int, int], text_length: int) -> FlopCounterMode:
    """Return torch's own counter after one call on the meta device."""
    called = _Called(model, size, text_length, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        called(called.noisy)
    return counter


def _flop_counter_row(model: ModelMixin, size: tuple[int, int], text_length: int, ours: int) -> Row:
    flops = _flops(model, size, text_length).get_total_flops()
    assert flops % 2 == 0
    explanation = "torch's own counter, halved; on the meta device, since on the CPU it misses fused attention"
    return Row("torch FlopCounterMode / 2", size, flops // 2, ours, explanation, flops // 2 - ours)


def _thop_row(model: ModelMixin, size: tuple[int, int], text_length: int, ours: int, attention: int) -> Row:
    try:
        import thop
    except ImportError:
        return Row("thop", size, None, ours, _MISSING)
    called = _Called(model, size, text_length, "meta")
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        macs, _ = thop.profile(called, (called.noisy,), custom_ops={nn.LayerNorm: _no_cost}, verbose=False)
    explanation = f"omits QKᵀ and AV, {attention:,}; its charge for LayerNorm, not multiply-adds, is switched off"
    return Row("thop", size, int(macs), ours, explanation, int(macs) + attention - ours)


def _no_cost(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    """Charge nothing for a layer, as a custom operation of thop."""


def _fvcore_row(model: ModelMixin, size: tuple[int, int], text_length: int, ours: int, is_smaller: bool) -> Row:
    try:
        from fvcore.nn import FlopCountAnalysis
        from fvcore.nn.jit_handles import get_shape
    except ImportError:
        return Row("fvcore", size, None, ours, _MISSING)

    def attention_macs(inputs: list, outputs: list) -> int:
        *_, heads, queries, channels = get_shape(inputs[0])
        return 2 * heads * queries * channels * get_shape(inputs[1])[-2]

    called = _Called(model, size, text_length, "cpu")
    analysis = FlopCountAnalysis(called, (called.noisy,)).tracer_warnings("none")
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_macs)
    with torch.no_grad():
        operators = {name: int(count) for name, count in analysis.by_operator().items()}
    attention = operators.pop("scaled_dot_product_attention", 0)
    total = sum(operators.values())
    extra = {name: operators[name] for name in CHARGED if name in operators}
    charged = ", ".join(f"{name} {count:,}" for name, count in extra.items())
    explanation = f"omits QKᵀ and AV, {attention:,}; charges also {charged}"
    found, counts = analysis.by_module(), _flops(model, size, text_length).get_flop_counts()
    leaves = [name for name, module in called.named_modules() if not any(module.children())]
    run = {name: sum(counts.get(f"{_Called.__name__}.{name}", {}).values()) // 2 for name in leaves}
    unread = sum(macs - int(found[name]) for name, macs in run.items() if macs > found[name])
    if unread:
        explanation += f"; omits layers whose output nothing reads, {unread:,}"
    if is_smaller:
        explanation = f"at a latent of {size[0]} x {size[1]}, since it has to run the model; {explanation}"
    return Row("fvcore", size, total, ours, explanation, total + attention + unread - sum(extra.values()) - ours)
