"""Which expert serves a prompt: the architecture predictor (Eq. 4) and inference routing (Eq. 22)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.errors import UserError
from prunekit.methods.storage import read_tensors, write_tensors

FILE_NAME = "router.safetensors"
_CHUNK = 1 << 22  # products held at once, 32 MB
ROWS_AT_ONCE = 1 << 16  # of embeddings that are read from disk, 200 MB of 768 numbers


class ArchitecturePredictor(nn.Linear):
    """e = W z + b, from a prompt's embedding z (B, Z) to an architecture embedding e (B, D) (Eq. 4)."""

    def __init__(self, embedding_size: int, num_units: int):
        super().__init__(embedding_size, num_units)


def cosine_scores(embeddings: Tensor, codes: Tensor) -> Tensor:
    """Cosine similarity of architecture embeddings e (B, D) and codes a (N, D): (B, N), never below float32."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.normalize(embeddings.to(dtype), dim=1) @ F.normalize(codes.to(dtype), dim=1).T


class Router:
    """Sends a prompt to the expert whose code has the highest cosine similarity to e(z) (Eq. 22).

    The norm of e does not change which expert wins, so the score folds to z.(W^T a/|a|) + b.a/|a|: N vectors of
    length Z and N offsets. They are kept in float64 on the CPU, and a score is a fixed tree of element-wise sums:
    the same prompt gets the same bits whatever else is in its batch, on any machine and number of threads.

    Args:
        weight: (N, Z), row i is W^T a_i / |a_i|.
        bias: (N,), b.a_i / |a_i|.
        fallback: expert of a prompt without an embedding (z = 0: no known word), e.g. the most used one.
        info: JSON values kept with the router, e.g. the name of the prompt encoder.

    """

    def __init__(self, weight: Tensor, bias: Tensor, fallback: int = 0, info: dict | None = None):
        self.weight = weight.detach().to("cpu", torch.float64).contiguous()  # (N, Z)
        self.bias = bias.detach().to("cpu", torch.float64).contiguous()  # (N,)
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1] or 0 in self.weight.shape:
            raise UserError(
                "a router needs weight (experts, embedding) and bias (experts,); "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise UserError("a router's weight and bias must be finite; got NaN or infinite entries")
        self.fallback = self._checked(fallback)
        self.info = dict(info or {})

    @classmethod
    def from_codes(cls, predictor: nn.Linear, codes: Tensor, fallback: int = 0, info: dict | None = None) -> "Router":
        """Fold a predictor (Z -> D) and codes a (N, D) into a router.

        Raises:
            ValueError: codes that do not fit the predictor, or a code that is all zero (it has no direction).

        """
        codes = codes.detach().to("cpu", torch.float64)
        if codes.ndim != 2 or codes.shape[1] != predictor.out_features:
            raise UserError(f"codes must be (experts, {predictor.out_features}); got {tuple(codes.shape)}")
        norms = codes.norm(dim=1, keepdim=True)
        if not (norms > 0).all():
            raise UserError(f"codes {(norms[:, 0] == 0).nonzero()[:, 0].tolist()} are zero: they have no direction")
        directions = codes / norms  # (N, D)
        weight = predictor.weight.detach().to("cpu", torch.float64)  # (D, Z)
        bias = codes.new_zeros(len(weight)) if predictor.bias is None else predictor.bias.detach().to(codes)  # (D,)
        return cls(directions @ weight, directions @ bias, fallback, info)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.weight)

    @property
    def embedding_size(self) -> int:
        """Z, the width of a prompt's embedding."""
        return self.weight.shape[1]

    def scores(self, z: Tensor) -> Tensor:
        """(B, N) float64: each prompt's cosine similarity to each code, times |e|, which is common to a row.

        Args:
            z: (B, Z) prompt embeddings of any floating type and device.

        Raises:
            ValueError: another shape, or entries that are not finite.

        """
        if z.ndim != 2 or z.shape[1] != self.embedding_size:
            raise UserError(f"z must be (prompts, {self.embedding_size}); got {tuple(z.shape)}")
        z = z.detach().to("cpu", torch.float64)
        if not z.isfinite().all():
            raise UserError("z must be finite; got NaN or infinite entries")
        parts = [_tree_sum(part[:, None, :] * self.weight) + self.bias for part in self._chunks(z)]
        return torch.cat(parts) if parts else z.new_empty(0, self.num_experts)

    def route(self, z: Tensor) -> Tensor:
        """LongTensor (B,): the expert of each prompt, the lowest index of a tie; `fallback` where z is all zero.

        Args and errors as in `scores`.
        """
        experts = self.scores(z).argmax(dim=1)
        experts[(z == 0).all(dim=1).cpu()] = self.fallback
        return experts

    def scores_of(self, prompts: Any, rows: Tensor) -> Tensor:
        """`scores` of rows (R,) of all prompts, (R, N); embeddings are read a part at a time.

        prompts: (P, Z), a tensor or `Rows` that lie on disk.
        """
        return torch.cat([self.scores(prompts[part]) for part in rows.split(ROWS_AT_ONCE)])

    def route_rows(self, prompts: Any, rows: Tensor) -> Tensor:
        """`route` of rows of all prompts, LongTensor (R,); read as in `scores_of`."""
        return torch.cat([self.route(prompts[part]) for part in rows.split(ROWS_AT_ONCE)])

    def with_fallback(self, fallback: int) -> "Router":
        """The same router with another expert for prompts without an embedding."""
        return Router(self.weight, self.bias, fallback, self.info)

    def shifted(self, shift: Tensor) -> "Router":
        """The same router with `shift` (N,) added to the experts' scores."""
        return Router(self.weight, self.bias + shift.to(self.bias), self.fallback, self.info)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with JSON in its header; a path that is not a `.safetensors` is a directory."""
        tensors = {"weight": self.weight, "bias": self.bias}
        return write_tensors(_file(path), "router", tensors, {"fallback": self.fallback, "info": self.info})

    @classmethod
    def load(cls, path: str | Path) -> "Router":
        """Read what `save` wrote; a ValueError for a file that is something else."""
        tensors, metadata = read_tensors(_file(path), "router")
        return cls(**tensors, **metadata)

    def _chunks(self, z: Tensor) -> Iterator[Tensor]:
        size = max(1, _CHUNK // self.weight.numel())
        return (z[start : start + size] for start in range(0, len(z), size))

    def _checked(self, fallback: int) -> int:
        if not 0 <= fallback < self.num_experts:
            raise UserError(f"fallback must be one of the experts 0..{self.num_experts - 1}; got {fallback}")
        return int(fallback)


def _tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis in halves, so that the order of additions depends on its length alone."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        odd = x[..., 2 * half :]
        x = torch.cat([x[..., :half] + x[..., half : 2 * half], odd], dim=-1)
    return x[..., 0]


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == Path(FILE_NAME).suffix else path / FILE_NAME
