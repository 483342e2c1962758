"""A comparison's compute column equals the compute of its cells: each call of denoisers and encoders is counted."""

import copy
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import yaml
from small_model import TRAINING, write_world
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from prunekit.core.call import predict
from prunekit.core.registry import denoiser_in, denoiser_of, is_denoiser
from prunekit.jobs.compare.comparing import Comparison, claim
from prunekit.jobs.recipe import load_recipe
from prunekit.methods import obs
from prunekit.methods.calibration import layer_values
from prunekit.recovery import closed_form
from prunekit.recovery.low_rank import merge

FEW = ("norm", "aptp", "refitted")


@pytest.fixture(scope="module", params=[FEW, pytest.param(None, marks=pytest.mark.long)], ids=["few", "all"])
def comparison(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("charged")
    search = {"steps": 3, **TRAINING}
    refit, cut = {"samples": 4, "batch_size": 2, "layers_at_once": 5}, {"fine_tune": False}
    content = {
        "job": "compare",
        **write_world(folder),
        "budgets": [{"budget": 0.7}],
        "methods": {
            "norm": {"samples": 4},
            "taylor_sp": {"samples": 4, "batch_size": 2, "num_timesteps": 3},
            "random": {},
            "uniarch": {"search": search},
            "aptp": {"experts": 2, "warmup": 1, "search": search},
            "aptp-random": {"method": "aptp", "experts": 2, "warmup": 1, "search": search, "partition": "random"},
            "undistilled": {"method": "norm", "samples": 4, "distillation": False},
            "obs": {"samples": 4, "batch_size": 2, "layers_at_once": 3},
            "refitted": {"method": "norm", "samples": 4, "closed_form": refit},
            "refitted-alone": {"method": "norm", "samples": 4, "closed_form": {**refit, "inputs": "dense"}, **cut},
            "cut": {"method": "norm", "samples": 4, **cut},
            "low-rank": {"method": "norm", "samples": 4, "lora": {"rank": 2}},
        },
        "fine_tune": {"steps": 3, **TRAINING},
        "evaluation": {"num_images": 4, "steps": 1, "batch_size": 4, "num_predictions": 4},
    }
    content["methods"] = {name: row for name, row in content["methods"].items() if not request.param or name in FEW}
    path = folder / "charged.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    recipe = claim(folder / "run", load_recipe(path))
    return Comparison(recipe, folder / "run")


class Counted:
    """Counts of encoder calls and of denoiser passes per sample, in units of a forward pass of the dense model."""

    def __init__(self, stages):
        self.stages, self.passes, self.encoder_calls, self.known = stages, 0.0, 0, {}
        self.watching = True
        dense = denoiser_in(stages.pipeline)
        self.dense_macs = self.macs(dense)
        assert self.dense_macs == stages.cost.dense_macs

    def macs(self, model) -> int:
        """Count a model's MACs on one sample by running it."""
        if id(model) not in self.known:
            samples, _ = self.stages.agreement
            call = samples.call.take(slice(1)).to("meta")
            self.watching = False
            plain = copy.deepcopy(model).to("meta")
            merge(plain)  # low-rank changes are not counted
            with FlopCounterMode(display=False) as counter, torch.no_grad():  # no fused attention on the CPU
                predict(plain, call)
            self.watching = True
            self.known[id(model)] = (counter.get_total_flops() // 2, model)  # keeping the model keeps its id unique
        return self.known[id(model)][0]

    def __call__(self, module, arguments, output) -> None:
        if module in (self.stages.pipeline.vae, self.stages.pipeline.text_encoder):
            self.encoder_calls += self.watching
        if not self.watching or not is_denoiser(module):
            return
        result = output[0] if isinstance(output, tuple) else output.sample
        if result.device.type == "meta":
            return
        backward = 0
        if result.requires_grad:
            trained = {name for name, p in module.named_parameters() if p.requires_grad}
            backward = 2 if trained and not all("lora_" in name for name in trained) else 1
        self.passes += len(result) * (1 + backward) * self.ratio(module)

    def values(self, model, paths, call):
        """Count a pass that ends early at a layer as a whole pass."""
        self.passes += len(denoiser_of(model).noisy(call)) * self.ratio(model)
        self.watching = False
        found = layer_values(model, paths, call)
        self.watching = True
        return found

    def ratio(self, module) -> float:
        """Return a model's MACs divided by the dense model's; a gated model counts as the dense model."""
        return self.macs(module) / self.dense_macs if module.config.get("pruning") else 1.0


@contextmanager
def counting(stages):
    counted = Counted(stages)
    handle = register_module_forward_hook(counted)
    with patch.object(closed_form, "layer_values", counted.values), patch.object(obs, "layer_values", counted.values):
        try:
            yield counted
        finally:
            handle.remove()


def test_every_pass_is_charged_and_no_other(comparison):
    runner, recipe, totals, searched = comparison.runner, comparison.recipe, {}, set()
    for cell in comparison.cells:
        if cell.label == "dense":
            continue
        with counting(comparison.stages) as counted:
            candidate, chosen = runner.candidate(cell)
        assert counted.encoder_calls == 0, "the encoders' work is every row's, and done before"
        method = recipe.method(cell.label, 0.7, cell.seed)
        charged = method.work(chosen.space).dense_passes
        before = charged if method.name in searched else 0  # a method's rows share its choice; each is charged for it
        searched.add(method.name)
        assert counted.passes == pytest.approx(candidate.training_passes - before, rel=1e-6), cell.title
        totals[cell.label, cell.protocol] = candidate.training_passes
    most = max(passes for (_, protocol), passes in totals.items() if protocol != "equal_steps")
    for (label, protocol), passes in totals.items():
        if protocol == "equal_total":
            assert 0.85 * most < passes, (label, passes, most)
