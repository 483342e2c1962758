"""Choose the expert that serves a prompt: the architecture predictor (Eq. 4) and inference routing (Eq. 22).

The predictor starts with the default weights of torch's linear layer; the published code starts with orthogonal
weights. The paper names no start, and which start is better is not measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.methods.relaxation import Relaxation
from prunekit.runtime.errors import UserError
from prunekit.runtime.randomness import generator
from prunekit.runtime.run_directory import ROUTER
from prunekit.runtime.tensors import read_tensors, write_tensors

if TYPE_CHECKING:  # imports that do not go into an export's file
    from prunekit.core.space import UnitSpace

_CHUNK = 1 << 22  # products held at once, 32 MB
GRID = 64  # a `RandomRouter` rounds the components of an embedding to 1 / GRID
MOST_CLUSTERED = 16_384  # most prompts whose embeddings are clustered
ROWS_AT_ONCE = 1 << 16  # embeddings that are read from disk at once: 200 MB for 768 numbers each


class ArchitecturePredictor(nn.Linear):
    """e = W z + b, from a prompt's embedding z (B, Z) to an architecture embedding e (B, D) (Eq. 4)."""

    def __init__(self, embedding_size: int, num_units: int):
        super().__init__(embedding_size, num_units)


def cosine_scores(embeddings: Tensor, codes: Tensor) -> Tensor:
    """Return the cosine similarity of architecture embeddings e (B, D) and codes a (N, D), (B, N), at least float32."""
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.normalize(embeddings.to(dtype), dim=1) @ F.normalize(codes.to(dtype), dim=1).T


class Router:
    """Router that sends a prompt to the expert whose code has the highest cosine similarity to e(z) (Eq. 22).

    Experts that no training prompt was routed to (`unused`) were not fine-tuned, so no prompt is sent to them.

    The norm of e does not change which code is nearest, so the score folds to z.(W^T a/|a|) + b.a/|a|: N vectors of
    length Z and N offsets. After `shifted` the norm matters, because the shift is added to |e| times the cosine.

    Weights and offsets are kept in float64 on the CPU, and a score is a fixed tree of element-wise sums: the same
    prompt gets the same bits in any batch, on any machine and with any number of threads.

    Args:
        weight: (N, Z), row i is W^T a_i / |a_i|.
        bias: (N,), b.a_i / |a_i|.
        fallback: expert of a prompt without an embedding (z = 0: no known word), e.g. the most used one.
        info: JSON values kept with the router, e.g. the name of the prompt encoder.
        unused: experts that no prompt is sent to, whatever their score.

    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        fallback: int = 0,
        info: dict | None = None,
        unused: Sequence[int] = (),
    ):
        self.weight = weight.detach().to("cpu", torch.float64).contiguous()  # (N, Z)
        self.bias = bias.detach().to("cpu", torch.float64).contiguous()  # (N,)
        if self.weight.ndim != 2 or self.bias.shape != self.weight.shape[:1] or 0 in self.weight.shape:
            raise UserError(
                "a router needs weight (experts, embedding) and bias (experts,); "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        if not (self.weight.isfinite().all() and self.bias.isfinite().all()):
            raise UserError("a router's weight and bias must be finite; got NaN or infinite entries")
        self.info = dict(info or {})
        self.unused = self._checked_unused(unused)
        self.fallback = self._checked(fallback)

    @classmethod
    def from_codes(cls, predictor: nn.Linear, codes: Tensor, fallback: int = 0, info: dict | None = None) -> Router:
        """Fold a predictor (Z -> D) and codes a (N, D) into a router.

        Raises:
            ValueError: codes that do not fit the predictor, or a code that is all zero (it has no direction).

        """
        codes = codes.detach().to("cpu", torch.float64)
        if codes.ndim != 2 or codes.shape[1] != predictor.out_features:
            raise UserError(f"codes must be (experts, {predictor.out_features}); got {tuple(codes.shape)}")
        norms = codes.norm(dim=1, keepdim=True)
        if not (norms > 0).all():
            raise UserError(f"codes {(norms[:, 0] == 0).nonzero()[:, 0].tolist()} are zero, so they have no direction")
        directions = codes / norms  # (N, D)
        weight = predictor.weight.detach().to("cpu", torch.float64)  # (D, Z)
        bias = codes.new_zeros(len(weight)) if predictor.bias is None else predictor.bias.detach().to(codes)  # (D,)
        return cls(directions @ weight, directions @ bias, fallback, info)

    @property
    def num_experts(self) -> int:
        """Return the number of experts, N, unused ones included."""
        return len(self.bias)

    @property
    def embedding_size(self) -> int:
        """Return the width of a prompt's embedding, Z."""
        return self.weight.shape[1]

    def scores(self, z: Tensor) -> Tensor:
        """Return each prompt's cosine similarity to each code, times the prompt's |e|, plus any shift, (B, N) float64.

        Unused experts have scores as well; `route` ignores them.

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
        parts = [self._similarities(part) + self.bias for part in self._chunks(z)]
        return torch.cat(parts) if parts else z.new_empty(0, self.num_experts)

    def _similarities(self, z: Tensor) -> Tensor:
        """Return the scores of checked embeddings (B, Z) without the bias, (B, N)."""
        return _tree_sum(z[:, None, :] * self.weight)

    def route(self, z: Tensor) -> Tensor:
        """Return the expert of each prompt, LongTensor (B,): the lowest index on a tie; `fallback` where z is all zero.

        An unused expert gets no prompt. Args and errors as in `scores`.
        """
        scores = self.scores(z)
        scores[:, list(self.unused)] = -torch.inf
        experts = scores.argmax(dim=1)
        experts[(z == 0).all(dim=1).cpu()] = self.fallback
        return experts

    def scores_of(self, prompts: Any, rows: Tensor) -> Tensor:
        """Return the `scores` of rows (R,) of all prompts, (R, N); read the embeddings in parts.

        prompts: (P, Z), a tensor or `Rows` on disk.
        """
        return torch.cat([self.scores(prompts[part]) for part in rows.split(ROWS_AT_ONCE)])

    def route_rows(self, prompts: Any, rows: Tensor) -> Tensor:
        """Return the `route` of rows (R,) of all prompts, LongTensor (R,); arguments as in `scores_of`."""
        return torch.cat([self.route(prompts[part]) for part in rows.split(ROWS_AT_ONCE)])

    def with_fallback(self, fallback: int) -> Router:
        """Return the same router with another expert for prompts without an embedding."""
        other = copy(self)
        other.fallback = self._checked(fallback)
        return other

    def shifted(self, shift: Tensor) -> Router:
        """Return the same router with `shift` (N,) added to the experts' scores.

        A score is |e| times the cosine, so the shift counts for less where e is long. Whether a shift of the cosines
        themselves would route better is not measured.
        """
        other = copy(self)
        other.bias = self.bias + shift.to(self.bias)
        return other

    def without(self, unused: Sequence[int]) -> Router:
        """Return the same router without the experts `unused`; its fallback must be another expert."""
        other = copy(self)
        other.unused = self._checked_unused(unused)
        other.fallback = other._checked(self.fallback)
        return other

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file with JSON in its header; a path that is not a `.safetensors` is a directory."""
        unused = {"unused": list(self.unused)} if self.unused else {}  # without the entry, older versions read the file
        metadata = {"fallback": self.fallback, "info": self.info, **unused, **self._form()}
        return write_tensors(_file(path), "router", self._tensors(), metadata)

    @staticmethod
    def load(path: str | Path) -> Router:
        """Read a file that `save` wrote; raise ValueError for any other file."""
        tensors, metadata = read_tensors(_file(path), "router")
        kind: Any = HardenedRouter if "codes" in tensors else RandomRouter if "shares" in tensors else Router
        router: Router = kind(**tensors, **metadata)
        return router

    def _tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}

    def _form(self) -> dict[str, Any]:
        """Return the part of the file's metadata that is specific to this class of router."""
        return {}

    def _chunks(self, z: Tensor) -> Iterator[Tensor]:
        size = max(1, _CHUNK // self.weight.numel())
        return (z[start : start + size] for start in range(0, len(z), size))

    def _checked(self, fallback: int) -> int:
        if not 0 <= fallback < self.num_experts:
            raise UserError(f"fallback must be one of the experts 0..{self.num_experts - 1}; got {fallback}")
        if fallback in self.unused:
            raise UserError(f"fallback={fallback}: the router sends no prompts to this expert; give another one")
        return int(fallback)

    def _checked_unused(self, unused: Sequence[int]) -> tuple[int, ...]:
        experts = tuple(sorted({int(expert) for expert in unused}))
        if not set(experts) < set(range(self.num_experts)):
            raise UserError(
                f"unused={list(experts)}: some of the experts 0..{self.num_experts - 1}, but not all of them"
            )
        return experts


class HardenedRouter(Router):
    """Router to the expert whose hardened gates are nearest to the prompt's hardened gates, as in the published code.

    A prompt's logits e(z) and the codes become gates at 0 or 1 (`Hardening`). The score is the cosine similarity of the
    gates. The published code adds Gumbel noise that depends on a prompt's position in its batch; here there is none.
    The score does not fold to N vectors, so the predictor is kept whole. A fixed order of additions in float64, as in
    `Router`, gives the same prompt the same bits in every batch.

    Args:
        weight: (D, Z), the predictor's weight. offset: (D,), the predictor's bias.
        bias: (N,), added to the scores.
        codes: (N, D), the experts' hardened gates of length 1.
        over: (W, L) and sizes: (D,), of the `Hardening`.
        relaxation: settings of the `Relaxation`, by name.
        fallback, info, unused: as in `Router`.

    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        offset: Tensor,
        codes: Tensor,
        over: Tensor,
        sizes: Tensor,
        relaxation: dict[str, Any],
        fallback: int = 0,
        info: dict | None = None,
        unused: Sequence[int] = (),
    ):
        self.predictor = Router(weight, offset)  # its scores are the logits e(z), (B, D)
        super().__init__(codes, bias, fallback, info, unused)
        self.hardening = Hardening(over.cpu(), sizes.cpu())
        self.relaxation = Relaxation(**relaxation)

    @classmethod
    def of(cls, predictor: nn.Linear, codes: Tensor, hardening: Hardening, relaxation: Relaxation) -> HardenedRouter:
        """Return the router of a predictor (Z -> D) and codes a (N, D)."""
        hardening = Hardening(hardening.over.cpu(), hardening.sizes.cpu())
        hardened = F.normalize(hardening.of_logits(codes.detach().to("cpu", torch.float64), relaxation), dim=1)
        bias = hardened.new_zeros(len(hardened))
        return cls(
            predictor.weight,
            bias,
            offset=predictor.bias,
            codes=hardened,
            over=hardening.over,
            sizes=hardening.sizes,
            relaxation=asdict(relaxation),
        )

    @property
    def embedding_size(self) -> int:
        """Return the width of a prompt's embedding, Z."""
        return self.predictor.embedding_size

    def _similarities(self, z: Tensor) -> Tensor:
        gates = self.hardening.of_logits(self.predictor.scores(z), self.relaxation)  # (B, D)
        length = _tree_sum(gates.square())[:, None].sqrt().clamp_min(1e-12)
        return super()._similarities(gates / length)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "weight": self.predictor.weight,
            "bias": self.bias,
            "offset": self.predictor.bias,
            "codes": self.weight,
            "over": self.hardening.over,
            "sizes": self.hardening.sizes,
        }

    def _form(self) -> dict[str, Any]:
        return {"relaxation": asdict(self.relaxation)}


class RandomRouter(Router):
    """Router to a random expert, with given shares of the prompts: a control for routers that use the prompt's content.

    The draw is a hash of the prompt's embedding and the seed, so a prompt goes to the same expert everywhere.

    Args:
        shares: (N,), fraction of the prompts per expert, summing to 1; an expert with a share of 0 gets no prompts.
        embedding_size: Z, the width of a prompt's embedding.
        seed: seed of the random assignment.
        fallback, info, unused: as in `Router`.

    """

    def __init__(
        self,
        shares: Tensor,
        embedding_size: int,
        seed: int = 0,
        fallback: int = 0,
        info: dict | None = None,
        unused: Sequence[int] = (),
    ):
        self.shares, self.seed = shares.detach().to("cpu", torch.float64), seed
        weight = self.shares.new_zeros(len(shares), embedding_size)
        super().__init__(weight, self.shares.new_zeros(len(shares)), fallback, info, unused)

    def _similarities(self, z: Tensor) -> Tensor:
        rows = (z * GRID).round().int().contiguous().numpy()  # so that the last bits of an embedding do not matter
        digests = (hashlib.blake2b(row.tobytes(), digest_size=8, key=str(self.seed).encode()) for row in rows)
        draws = [int.from_bytes(digest.digest(), "big") / 2**64 for digest in digests]
        bounds = self.shares.cumsum(0)
        experts = torch.searchsorted(bounds, bounds.new_tensor(draws), right=True).clamp_max(self.num_experts - 1)
        return F.one_hot(experts, self.num_experts).double()

    def _tensors(self) -> dict[str, Tensor]:
        return {"shares": self.shares}

    def _form(self) -> dict[str, Any]:
        return {"embedding_size": self.embedding_size, "seed": self.seed}


@dataclass(frozen=True)
class Hardening:
    """Gates rounded to 0 or 1, 0 under a removed layer, each group weighted by 1/sqrt(its size), as in APTP's code.

    The published code can also weight units by their MACs; its configuration for COCO does not.

    Args:
        over: (W, L), indices of the whole layers above each width unit, padded with the index after the last layer.
        sizes: (D,), number of units in the group of each unit.

    """

    over: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, space: UnitSpace, device: torch.device | str = "cpu") -> Hardening:
        """Return the hardening of a space's gates."""
        over = [space.depth_units_over(group.path, group.kind) for group in space.width_groups]
        none, longest = space.num_depth, max(map(len, over), default=0)  # pads rows: a layer that always stays
        padded = [[*units, *[none] * (longest - len(units))] for units in over]
        widths = [group.size for group in space.width_groups]
        rows = [row for row, size in zip(padded, widths, strict=True) for _ in range(size)]
        sizes = torch.tensor([group.size for group in space.groups for _ in range(group.size)], device=device)
        return cls(torch.tensor(rows, dtype=torch.long, device=device).view(len(rows), longest), sizes)

    def __call__(self, gates: Tensor) -> Tensor:
        """Return the hardened and weighted gates of soft gates (N, D)."""
        kept = (gates >= 0.5).to(gates)
        widths, depths = kept.split([len(self.over), kept.shape[1] - len(self.over)], dim=1)
        stay = torch.cat([depths, depths.new_ones(len(depths), 1)], dim=1)[:, self.over].prod(dim=2)  # (N, W)
        return torch.cat([widths * stay, depths], dim=1) / self.sizes.to(gates).sqrt()

    def of_logits(self, logits: Tensor, relaxation: Relaxation) -> Tensor:
        """Return the hardened gates of logits (N, D) without noise; a gate is open if score + offset >= 0."""
        return self((relaxation.scores(logits) + relaxation.offset >= 0).to(logits))


def clustered_pairs(pairs: Tensor, seed: int) -> Tensor:
    """Return the pairs whose embeddings are clustered, in order: all pairs (P,), or MOST_CLUSTERED random pairs."""
    if len(pairs) <= MOST_CLUSTERED:
        return pairs
    drawn = torch.randperm(len(pairs), generator=generator(seed, "clustered"))[:MOST_CLUSTERED]
    return pairs[drawn.sort().values]


def spherical_kmeans(embeddings: Tensor, count: int, seed: int, iterations: int = 25) -> Tensor:
    """Return `count` centers (N, D) of embeddings (P, D) by cosine similarity; deterministic.

    The start is k-means++ (Arthur & Vassilvitskii, 2007). A center has the mean length of its members; a center without
    members keeps its direction.
    """
    unit = F.normalize(embeddings.double(), dim=1)
    source = generator(seed, "kmeans")
    chosen = [int(torch.randint(len(unit), (1,), generator=source))]
    while len(chosen) < count:
        distance = (1 - unit @ unit[chosen].T).amin(1).clamp(min=0).cpu()
        if not bool(distance.sum() > 0):
            distance = torch.ones_like(distance)
        chosen.append(int(torch.multinomial(distance, 1, generator=source)))
    centers = unit[chosen]
    for _ in range(iterations):
        nearest = (unit @ centers.T).argmax(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, unit)
        counts = torch.bincount(nearest, minlength=count)[:, None]
        centers = torch.where(counts > 0, F.normalize(sums, dim=1), centers)
    nearest = (unit @ centers.T).argmax(1)
    members = torch.bincount(nearest, minlength=count).clamp(min=1)
    lengths = torch.zeros(count, dtype=unit.dtype, device=unit.device)
    lengths.index_add_(0, nearest, embeddings.double().norm(dim=1))
    return (centers * (lengths / members).clamp(min=1e-6)[:, None]).to(embeddings)


def _tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis in halves, so that the order of additions depends on its length alone."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        odd = x[..., 2 * half :]
        x = torch.cat([x[..., :half] + x[..., half : 2 * half], odd], dim=-1)
    return x[..., 0]


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == Path(ROUTER).suffix else path / ROUTER
