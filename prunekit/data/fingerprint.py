"""Keys of cached results: digests of weights, pictures, captions, tensors and settings."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.core.emptied import state_in_files
from prunekit.data.pictures import Pictures
from prunekit.runtime.digests import Digests


class Fingerprint:
    """A digest that parts are added to; the same parts in the same order give the same key."""

    def __init__(self, *values: Any):
        self._digest = hashlib.blake2b(digest_size=16)
        self.add(*values)

    def add(self, *values: Any) -> "Fingerprint":
        """Add plain values, by their repr."""
        self._digest.update("\0".join(map(repr, values)).encode())
        return self

    def add_tensor(self, value: Tensor) -> "Fingerprint":
        """Add a tensor's values, whatever its device."""
        self._digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return self

    def add_module(self, module: nn.Module) -> "Fingerprint":
        """Add a module's state: names as in files, and values as float32."""
        for name, value in sorted(state_in_files(module).items()):
            self._digest.update(name.encode())
            self.add_tensor(value.float())
        return self

    def add_encoders(self, pipeline: Any) -> "Fingerprint":
        """Add a pipeline's autoencoder and text encoders; parts that the pipeline lacks are skipped."""
        encoders = (
            getattr(pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
        )
        for encoder in filter(None, encoders):
            self.add_module(encoder)
        return self

    def add_pictures(self, encoded: Sequence[bytes], digests: Digests | None = None) -> "Fingerprint":
        """Add compressed pictures; for pictures on disk, their files' digests, which `digests` may have cached."""
        if isinstance(encoded, Pictures):
            self.add(*(digests or Digests()).of(encoded.files), *encoded.identity())
            return self
        for picture in encoded:
            self._digest.update(hashlib.blake2b(picture, digest_size=16).digest())
        return self

    def add_texts(self, texts: list[str]) -> "Fingerprint":
        """Add texts."""
        self._digest.update("\0".join(texts).encode())
        return self

    def add_data(self, data: Any) -> "Fingerprint":
        """Add a data set by its `key` if it has one (EncodedData made by `encode`).

        Without a key, add a dataclass field by field, tensors and pictures by content, and other values by their repr.
        """
        if getattr(data, "key", ""):
            return self.add(data.key)
        if isinstance(data, Tensor):
            return self.add(tuple(data.shape)).add_tensor(data)
        if isinstance(data, Pictures) or (isinstance(data, list) and data and isinstance(data[0], bytes)):
            return self.add_pictures(data)
        if not is_dataclass(data) or isinstance(data, type):
            return self.add(data)
        for field in fields(data):
            if field.compare:
                self.add(field.name).add_data(getattr(data, field.name))
        return self

    def key(self) -> str:
        """Return the digest so far, as 32 hexadecimal digits."""
        return self._digest.hexdigest()
