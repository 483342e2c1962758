"""Prompt embeddings for the router: the embedded static encoder, or any Sentence Transformer (Eq. 3 of APTP).

A Sentence Transformer runs with all its modules, so the vectors of all-mpnet-base-v2 have length 1. APTP's published
code leaves out the last module, a normalization. Its vectors have other lengths, which its trained predictors expect.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from prunekit.runtime.errors import UserError, first_line

PROMPT_ENCODER_DIRECTORY = Path(__file__).parent.parent / "assets" / "prompt_encoder"
EMBEDDED = "emoji"
STATIC_BATCH = 1024


class PromptEncoder:
    """Turns prompts into vectors; a prompt's vector does not depend on the prompts beside it.

    A static encoder averages word vectors, so batches change no bit. Any other model encodes one prompt at a time:
    padding to a batch's longest prompt would change a vector's last bits and, now and then, the prompt's expert.
    """

    def __init__(self, name: str | Path = EMBEDDED):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        self.name = str(name)
        path = PROMPT_ENCODER_DIRECTORY if self.name == EMBEDDED else name
        refuse_foreign_code(Path(path))
        device, is_here = "cpu" if self.name == EMBEDDED else None, Path(path).is_dir()
        try:  # without `local_files_only`, the library would ask the hub for a model with the folder's name
            self.model = SentenceTransformer(str(path), device=device, local_files_only=is_here)
        except Exception as error:  # a damaged folder makes libraries raise almost anything
            raise UserError(
                f'cannot load the prompt encoder {self.name!r}: use "{EMBEDDED}", a folder, or the name of a Sentence '
                f"Transformer on the hub ({first_line(error)})"
            ) from error
        self.model.float().eval()
        self.static = isinstance(self.model[0], StaticEmbedding)

    @property
    def size(self) -> int:
        """Z, the length of a prompt's vector."""
        size = self.model.get_embedding_dimension()
        assert size is not None
        return size

    def encode(self, prompts: list[str]) -> Tensor:
        """Return the vectors (n, Z), float32, on the CPU.

        The embedded encoder knows the words of Emoji-64's captions. A prompt without any known word, such as the empty
        prompt, gives the zero vector. This vector has no direction, so the router needs a fallback for it.
        """
        if not prompts:
            return torch.zeros(0, self.size)
        batch_size = STATIC_BATCH if self.static else 1
        vectors = self.model.encode(
            list(prompts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return vectors.float().cpu().clone()


def refuse_foreign_code(folder: Path) -> None:
    """Refuse a Sentence Transformer's folder that names modules from outside the package sentence_transformers.

    The library imports the classes that `modules.json` names, so a folder from a stranger could run its own code.
    Raises UserError, one line, for such a folder and for a `modules.json` that cannot be read.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [module["type"] for module in modules]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    for kind in kinds:
        if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
            raise UserError(
                f"{path} names {kind!r}, which is not a module of sentence_transformers and may run any code"
            )


def load_prompt_encoder(name: str | Path = EMBEDDED) -> PromptEncoder:
    """Load "emoji", the embedded encoder, or any Sentence Transformer by folder or hub name.

    Raises ValueError if there is no such encoder.
    """
    return PromptEncoder(name)
