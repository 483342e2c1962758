"""A mixture as one diffusers pipeline where prunekit is not installed.

An export of a mixture holds two files that are generated from prunekit's sources. `pipeline.py`, from this module, has
the pipeline's class. `experts/mixture.py`, from `experts_folder`, has the component that holds experts, router and
prompt encoder. `model_index.json` names both.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline, ModelMixin

from prunekit.core.registry import family_named
from prunekit.export.bundle import Key, bundle
from prunekit.runtime.errors import UserError
from prunekit.runtime.files import read_json, write_json
from prunekit.serving import experts_folder
from prunekit.serving.routed_call import RoutedCall

if TYPE_CHECKING:  # these imports do not go into an export's file
    from prunekit.core.family import Family
    from prunekit.export.pipeline_parts import Parts
    from prunekit.serving.experts_folder import ExpertsFolder

CLASS = "PromptRoutedDiffusion"  # diffusers has no class of this name, so servers take the class from the folder
PIPELINE_FILE, EXPERTS_FILE = "pipeline", "mixture"  # modules of an export's own code
_TITLE = """A mixture of pruned models and its router as one pipeline: {name}, for diffusers.

Written by prunekit {version} from its own sources; do not edit. It needs torch, diffusers and sentence-transformers.
License: Apache-2.0.
"""


class RoutedFolder(RoutedCall):
    """Base class of an export's pipeline; see `routed_pipeline`.

    denoiser: name of the denoiser in the stock pipeline: "unet" or "transformer". experts: the folder of the experts.
    settings: plain arguments of the stock pipeline's constructor.
    """

    denoiser: str
    experts: ExpertsFolder
    settings: Mapping[str, Any]

    def stock_pipeline(self, expert: int) -> DiffusionPipeline:
        """Return a stock pipeline around one expert; the expert stays in memory while the stock pipeline exists."""
        with self.mixture.experts.use(expert) as model:
            return self._around(model)

    def save_pretrained(self, *arguments: Any, **options: Any) -> None:
        """Raise UserError: the experts are in the folder that was opened; copy this folder instead."""
        raise UserError(f"copy {self.experts.folder.parent}: diffusers cannot save this pipeline")

    def _around(self, model: ModelMixin | None) -> DiffusionPipeline:
        names = _parameters(self.kind).keys() - {self.denoiser, *self.settings}
        parts = {name: getattr(self, name) for name in names}
        return self.kind(**parts, **{self.denoiser: model}, **self.settings)

    def _latent_size(self, model: ModelMixin) -> tuple[int, int]:
        return self.experts.latent_size


def routed_pipeline(kind: type[DiffusionPipeline], denoiser: str, family: Family, module: str) -> type:
    """Return the class of an export's pipeline: a stock pipeline's parts, with `experts` in place of the denoiser.

    Its constructor, and so `from_pretrained`, also takes `max_resident`, the largest number of experts in memory (by
    default all), and `preload`: load all experts at once, instead of each when it is first used.

    Args:
        kind: the stock pipeline's class.
        denoiser: name of the denoiser in the stock pipeline: "unet" or "transformer".
        family: the stock pipeline's family.
        module: name of the module that defines the class.

    """
    stock = _parameters(kind)
    plain = [name for name, item in stock.items() if item.default is not item.empty]
    plain = [name for name in plain if name not in kind._optional_components]  # the other parts are modules

    def construct(
        self: Any, experts: ExpertsFolder, max_resident: int | None = None, preload: bool = False, **given: Any
    ) -> None:
        super(made, self).__init__()
        given = {**{name: item.default for name, item in stock.items() if item.default is not item.empty}, **given}
        given.pop(denoiser, None)
        self.register_modules(experts=experts, **{name: part for name, part in given.items() if name not in plain})
        self.settings = {name: given[name] for name in plain}
        self.register_to_config(**self.settings)
        self.mixture = experts.mixture(self.vae.device, self.vae.dtype, max_resident)
        if preload and max_resident is not None and max_resident < self.num_experts:
            raise UserError(f"preload loads all {self.num_experts} experts, and max_resident={max_resident} forbids it")
        self._prepare()
        for index in range(self.num_experts if preload else 0):
            with self.mixture.experts.use(index):
                pass

    own = [item for item in inspect.signature(construct).parameters.values() if item.kind is not item.VAR_KEYWORD]
    taken = [item.replace(annotation=item.empty) for name, item in stock.items() if name != denoiser]
    taken = sorted(own[:2] + taken + own[2:], key=lambda item: item.default is not item.empty)
    vars(construct)["__signature__"] = inspect.Signature(
        [item.replace(annotation=item.empty, kind=item.POSITIONAL_OR_KEYWORD) for item in taken]
    )
    content = {
        "__doc__": f"A {kind.__name__} that draws each prompt with the expert that the router chooses.",
        "__init__": construct,
        "__module__": module,
        "_optional_components": [name for name in kind._optional_components if name != denoiser],
        "kind": kind,
        "family": family,
        "denoiser": denoiser,
    }
    made: Any = type(CLASS, (RoutedFolder, DiffusionPipeline), content)
    return made


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a pipeline's constructor, by name."""
    return dict(list(inspect.signature(kind.__init__).parameters.items())[1:])  # type: ignore[misc]


def write_own_code(parts: Parts, folder: Path) -> None:
    """Write the files with which diffusers opens a mixture's directory as one pipeline; the parts must be there."""
    own, called = type(family_named(parts.kind.__name__)), routed_pipeline.__name__
    roots = [(own.__module__, own.__name__), (__name__, called)]
    made = f'{called}(diffusers.{parts.kind.__name__}, "{parts.denoiser}", {own.__name__}(), __name__)'
    _write(folder / f"{PIPELINE_FILE}.py", CLASS, roots, f"import diffusers\n\n{CLASS} = {made}")
    component = experts_folder.ExpertsFolder
    roots, name = [(component.__module__, component.__name__)], component.__name__
    _write(folder / "experts" / f"{EXPERTS_FILE}.py", name, roots)
    path = folder / DiffusionPipeline.config_name
    index = {key: value for key, value in read_json(path).items() if key != parts.denoiser}
    write_json(path, {**index, "_class_name": CLASS, "experts": [EXPERTS_FILE, name]})


def _write(path: Path, name: str, roots: list[Key], last: str = "") -> None:
    title = _TITLE.format(name=name, version=version("prunekit"))
    path.write_text(bundle(roots, {}, title, last, name), encoding="utf-8")
