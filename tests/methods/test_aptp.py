"""APTP's search on a small model is deterministic, resumable, independent of accumulation, and within its budget."""

import json
import math
from dataclasses import replace

import pytest
import torch
from small_model import CAPTIONS, SHAPES

from prunekit import CostModel, discover
from prunekit.core.gates import gated
from prunekit.data.encoded import EncodedData
from prunekit.data.images import CaptionedImages
from prunekit.denoisers.unet.family import StableDiffusion
from prunekit.evaluation.comparison import Candidate
from prunekit.methods import APTP
from prunekit.methods.aptp.expert_search import SearchObjective
from prunekit.methods.result import PruneResult, ResultInfo
from prunekit.methods.router import ArchitecturePredictor, HardenedRouter, Router, spherical_kmeans
from prunekit.methods.search import Codes
from prunekit.models import emoji_model
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective, fine_tune
from prunekit.runtime.randomness import generator
from prunekit.training.checkpoint import Checkpoints

PROCESS = StableDiffusion().process(emoji_model.training_scheduler())

SEARCH = {"steps": 6, "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 1, "log_every": 1}
SETTINGS = {"budget": 0.7, "experts": 3, "warmup": 2, "text_length": 16}


def small_space():
    return discover(emoji_model.build_unet(SHAPES), depth="aptp")


def encoded(num_images=24, seed=0):
    draw = generator(seed, "test data")
    captions = [f"{CAPTIONS[i % len(CAPTIONS)]} {i}" for i in range(num_images)]
    images = CaptionedImages(
        [b""] * num_images, captions, captions, torch.arange(num_images), torch.zeros(num_images).bool()
    )
    return EncodedData(
        latents=torch.randn(num_images, 4, 8, 8, generator=draw),
        text=torch.randn(num_images, 16, SHAPES.text_width, generator=draw),
        null_text=torch.zeros(16, SHAPES.text_width),
        prompts=torch.nn.functional.normalize(torch.randn(num_images, 10, generator=draw), dim=1),
        images=images,
    )


@pytest.fixture(scope="module")
def pipeline():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = emoji_model.build_tokenizer(CAPTIONS, SHAPES.vocabulary)
        parts = (emoji_model.build_autoencoder(SHAPES), emoji_model.build_text_encoder(SHAPES, tokenizer), tokenizer)
        return emoji_model.assemble(*parts, emoji_model.build_unet(SHAPES))


@pytest.fixture(scope="module")
def result(pipeline, tmp_path_factory):
    return APTP(**SETTINGS, search=SEARCH).prune(pipeline, encoded(), tmp_path_factory.mktemp("search"))


def test_twice_the_same(pipeline, result, tmp_path):
    again = APTP(**SETTINGS, search={**SEARCH, "checkpoint_minutes": 1e-9}).prune(pipeline, encoded(), tmp_path)
    assert again.architectures == result.architectures
    assert torch.equal(again.router.weight, result.router.weight)
    assert again.info.prompts_per_expert == result.info.prompts_per_expert


VARIANTS = {
    "paper": {"preset": "paper", "warmup": 2},
    "published code": {"preset": "published_code", "warmup": 2},
    "bfloat16": {"preset": "published_code", "warmup": 2, "search": {**SEARCH, "steps": 4, "precision": "bfloat16"}},
    "hardened": {"similarity": "hardened"},
    "codes of k-means": {"codes": "kmeans"},
    "cumulative": {"depth_gates": "cumulative"},
    "hard concrete": {"noise": "hard_concrete"},
    "spread": {"spread_weight": 0.1, "maximum_weight": 0.1},
    "normalised": {"feature_blocks": "all", "feature_scale": "normalised"},
}


BESIDE = {"bfloat16": "published code"}  # variants that are compared with a preset's search


@pytest.fixture(scope="module")
def searched(pipeline):
    """Return a cached function from changed settings to a short search's result and logged rows."""
    made = {}

    def search(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            rows = []
            short = {**SETTINGS, "search": {**SEARCH, "steps": 4}, **settings}
            made[key] = APTP(**short).prune(pipeline, encoded(), log=rows.append), rows
        return made[key]

    return search


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_searches_and_meets_the_budget(searched, name):
    settings = VARIANTS[name]
    other, rows = searched(**settings)
    assert other.info.mixture_ratio <= 0.7 and all(math.isfinite(row["loss"]) for row in rows)
    plain, usual = searched(**VARIANTS.get(BESIDE.get(name), {}))
    prompts = encoded().prompts
    changed = not torch.equal(other.router.scores(prompts), plain.router.scores(prompts))
    assert changed or name in BESIDE  # after few steps, hardened scores do not depend on the precision
    assert [row["loss"] for row in rows] != [row["loss"] for row in usual]
    assert isinstance(other.router, HardenedRouter) == (settings.get("preset") == "published_code")
    spread = settings.get("spread_weight") or settings.get("preset") == "published_code"
    assert bool(spread) == ({"spread", "maximum"} <= set(rows[-1]))


def test_a_preset_is_its_settings_and_nothing_else(searched):
    result, rows = searched(**VARIANTS["paper"])
    config = APTP(**{**SETTINGS, "search": {**SEARCH, "steps": 4}, **VARIANTS["paper"]}).config
    spelled, others = searched(**{**config.model_dump(mode="json"), "preset": "default"})
    assert spelled.architectures == result.architectures and torch.equal(spelled.router.weight, result.router.weight)
    assert [row["loss"] for row in others] == [row["loss"] for row in rows]


def test_a_preset_yields_to_what_is_given():
    config = APTP(preset="published_code", warmup=1, offset=1.0, search={**SEARCH, "max_grad_norm": 3.0}).config
    assert (config.offset, config.search.max_grad_norm, config.search.weight_decay) == (1.0, 3.0, 0.0)
    assert APTP().config.search.weight_decay == 0.01 and APTP().config.search.max_grad_norm == 1.0


def test_each_preset_is_what_its_name_says():
    names = ("depth_gates", "similarity", "routing", "feature_scale", "spread_weight", "maximum_weight")
    paper, code, default = (APTP(preset=preset).config for preset in ("paper", "published_code", "default"))
    assert [getattr(paper, name) for name in names] == ["independent", "cosine", "cosine", "sum", 0.0, 0.0]
    assert [getattr(code, name) for name in names] == ["cumulative", "hardened", "hardened", "mean", 0.1, 0.1]
    for config in (paper, code):
        assert (config.search.weight_decay, config.search.max_grad_norm) == (0.0, None)
        assert (config.feature_blocks, config.balance, config.snr_gamma, config.snr_form) == (
            "all",
            False,
            5.0,
            "published",
        )
    changed = {name for name, value in default if value != getattr(code, name)} - {"preset", "search"}
    assert changed == {*names, "feature_blocks", "balance", "snr_gamma", "snr_form"}


class StopError(Exception):
    """Ends a search like a kill, without saving its state."""


class Undecided(APTP):
    """APTP that is killed after its last checkpoint, before it chooses architectures."""

    def _decide(self, objective):
        raise StopError


@pytest.mark.parametrize("stop", [1, 2, 4, 6])
def test_killed_and_resumed_the_same(pipeline, result, tmp_path, stop):
    def kill(row):
        if row["step"] == stop + 1:
            raise StopError

    settings = {**SETTINGS, "search": {**SEARCH, "checkpoint_minutes": 1e-9}}
    with pytest.raises(StopError):
        Undecided(**settings).prune(pipeline, encoded(), tmp_path, log=kill)
    assert Checkpoints(tmp_path / "checkpoints").latest()[1]["step"] == stop
    resumed = APTP(**settings).prune(pipeline, encoded(), tmp_path)
    assert resumed.architectures == result.architectures
    assert torch.equal(resumed.router.weight, result.router.weight)
    figures, straight = (
        replace(each.info, settings={}, search={**each.info.search, "seconds": 0}) for each in (resumed, result)
    )
    assert figures == straight and "loss" in straight.search


def test_the_mixture_meets_the_budget_and_leaves_nothing_that_fits(pipeline, result):
    space = discover(pipeline.unet, depth="aptp")
    cost = CostModel(pipeline.unet, space, text_length=16)
    counts, total = result.info.prompts_per_expert, sum(result.info.prompts_per_expert)
    assert total == 24 and len(result.architectures) == 3
    spent = sum(n * cost.macs(a) for n, a in zip(counts, result.architectures, strict=True))
    assert spent * 10 <= 7 * cost.dense_macs * total
    for count, architecture in zip(counts, result.architectures, strict=True):
        for unit in torch.nonzero(~architecture.values).flatten().tolist():
            more = cost.running(architecture).change(unit)
            assert not count or more == 0 or (spent + count * more) * 10 > 7 * cost.dense_macs * total


def test_result_round_trip(pipeline, result, tmp_path):
    result.save(tmp_path)
    loaded = PruneResult.load(tmp_path, pipeline.unet)
    z = encoded().prompts
    assert loaded.architectures == result.architectures
    assert torch.equal(loaded.router.route(z), result.router.route(z))


def losses_and_gradients(pipeline, micro_batch, step, **settings):
    method = APTP(**SETTINGS, **settings, search=SEARCH)
    space = discover(pipeline.unet, depth="aptp")
    cost, data = CostModel(pipeline.unet, space, text_length=16), encoded()
    predictor, codes = method._parameters(10, space.size)
    assert isinstance(predictor, ArchitecturePredictor) and isinstance(codes, Codes)
    with gated(pipeline.unet.requires_grad_(False), space) as gates:
        args = (pipeline.unet, gates, predictor, codes, cost, PROCESS, data, method.config, torch.device("cpu"))
        objective = SearchObjective(*args)
        objective.batch(SETTINGS["warmup"])  # initializes the codes
        batch = objective.batch(step)
        terms = {name: float(value.detach()) for name, value in objective.shared_loss(batch).items()}
        sum(objective.shared_loss(objective.batch(step)).values()).backward()
        for positions in torch.arange(SEARCH["batch_size"]).split(micro_batch):
            micro = objective.micro_loss(batch, positions)
            sum(micro.values()).backward()
            for name, value in micro.items():
                terms[name] = terms.get(name, 0.0) + float(value.detach())
    gradients = [p.grad for m in objective.modules.values() for p in m.parameters() if p.grad is not None]
    return terms, torch.cat([g.flatten() for g in gradients]), batch


@pytest.mark.parametrize("step", [1, 3])
def test_accumulation_changes_neither_losses_nor_gradients(pipeline, step):
    whole, gradient, batch = losses_and_gradients(pipeline, SEARCH["batch_size"], step)
    parts, other, _ = losses_and_gradients(pipeline, 3, step)
    # Rounding in float32 is up to 1.2e-5 on processors whose kernels sum batches of 3 and 6 in different orders.
    assert whole == pytest.approx(parts, rel=3e-5)
    assert (gradient - other).norm() <= 3e-5 * gradient.norm() and gradient.norm() > 0
    assert float(batch.weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("transport", [True, False])
def test_transport_spreads_a_batch_and_without_it_the_nearest_code_wins(pipeline, transport):
    method = APTP(**SETTINGS, transport=transport, search=SEARCH)
    space = discover(pipeline.unet, depth="aptp")
    with gated(pipeline.unet, space) as gates:
        cost = CostModel(pipeline.unet, space, text_length=16)
        objective = method._objective(pipeline.unet, gates, cost, PROCESS, encoded())
        objective.codes.values.data = torch.cat([objective.codes.values.data[:1] + 1.0, -torch.ones(2, space.size)])
        torch.nn.init.constant_(objective.predictor.bias, 1.0)  # makes the first code the nearest of every prompt
        assignment = objective.batch(SETTINGS["warmup"] + 1).assignment
    assert assignment.any() if transport else not assignment.any()


class Kept(APTP):
    """APTP that keeps its objective for the test."""

    def _decide(self, objective):
        self.objective = objective
        return super()._decide(objective)


def test_the_published_codes_router_compares_the_gates_that_training_compared(pipeline, tmp_path):
    method = Kept(**{**SETTINGS, "warmup": 2}, preset="published_code", search={**SEARCH, "steps": 4})
    assert isinstance(method.prune(pipeline, encoded(), tmp_path).router, HardenedRouter)
    prompts, objective = encoded().prompts, method.objective
    with torch.no_grad():  # gates near 0 and near 1, as after a long search
        objective.codes.values.copy_(6 * torch.randn(objective.codes.values.shape, generator=generator(0, "codes")))
        objective.predictor.weight.mul_(30)
    router, expected = method._router(objective), objective.similarities(prompts)  # (B, N), as in training, no noise
    assert torch.allclose(router.scores(prompts), expected.double(), atol=1e-6)
    noisy = objective._similarities(objective.draw(3), objective.predictor(prompts).detach())
    assert torch.corrcoef(torch.stack([noisy.flatten(), expected.flatten()]))[0, 1] > 0.5
    cosine = Router.from_codes(objective.predictor, objective.codes.values)
    assert not torch.equal(cosine.route(prompts), router.route(prompts))
    loaded = Router.load(router.save(tmp_path / "router"))
    assert isinstance(loaded, HardenedRouter) and loaded.unused == router.unused
    assert torch.equal(loaded.scores(prompts), router.scores(prompts))
    one_by_one = torch.cat([loaded.scores(prompt[None]) for prompt in prompts])
    assert torch.equal(loaded.scores(prompts), one_by_one)  # independent of the batch
    shift = torch.tensor([0.0, 0.0, 9.0], dtype=torch.float64)
    assert (loaded.without(()).shifted(shift).route(prompts) == 2).all() and loaded.embedding_size == 10


def test_a_collapsed_mixture_says_so_and_never_sends_a_prompt_to_a_dead_expert(pipeline, tmp_path):
    method = APTP(**{**SETTINGS, "warmup": 2}, balance=False, transport=False, search={**SEARCH, "steps": 3})
    predictor, codes = method._parameters(10, discover(pipeline.unet, depth="aptp").size)
    with torch.no_grad():  # makes the nearest code nearly independent of the prompt
        predictor.weight.mul_(0.01)
        codes.values[0] = predictor.bias
    method._parameters = lambda *sizes: (predictor, codes)
    result = method.prune(pipeline, encoded(), tmp_path)
    counts = result.info.prompts_per_expert
    dead = [expert for expert, count in enumerate(counts) if not count]
    assert dead and sum(counts) == 24
    lines = " / ".join(result.warnings())
    assert f"experts {dead[0]}, {dead[1]} of 3 get no training prompts and are not fine-tuned" in lines
    assert f"gets {100 * max(counts) / 24:.1f} % of the training prompts" in lines
    prompts = torch.randn(500, 10, generator=generator(0, "other prompts"))
    favored = result.router.shifted(torch.tensor([9.0 * (expert in dead) for expert in range(3)]).double())
    assert favored.scores(prompts).argmax(dim=1).tolist() != favored.route(prompts).tolist()
    for router in (favored, Router.load(favored.save(tmp_path / "router")), favored.with_fallback(favored.fallback)):
        assert router.unused == tuple(dead) and not set(router.route(prompts).tolist()) & set(dead)
        assert not set(router.route(prompts * 0).tolist()) & set(dead)  # also for prompts without a known word
    candidate = Candidate("aptp", [], [1, 1, 1], [100, 20, 3], result.router)
    assert candidate.used_params() == sum(p for e, p in enumerate([100, 20, 3]) if e not in dead)
    assert candidate.used_params(torch.tensor([0.5, 0.0, 0.5])) == 103


def test_what_is_wrong_with_a_mixture_is_said():
    space = small_space()
    first, second = space.random(0.7, seed=0), space.random(0.7, seed=1)
    good = PruneResult([first, second], info=ResultInfo(prompts_per_expert=[9, 1]))
    assert good.warnings() == []
    assert PruneResult([first, second, first, first], info=ResultInfo(prompts_per_expert=[1, 1, 1, 1])).warnings() == [
        "experts 0, 2, 3 of 4 have the same architecture"
    ]
    assert PruneResult([first, second], info=ResultInfo(prompts_per_expert=[91, 9])).warnings() == [
        "expert 0 of 2 gets 91.0 % of the training prompts, so the mixture is nearly one architecture"
    ]
    assert PruneResult([first]).warnings() == PruneResult([first, second]).warnings() == []
    assert PruneResult([first], info=ResultInfo(prompts_per_expert=[5])).warnings() == []


def test_kmeans_finds_separate_directions():
    axes = torch.eye(3).repeat_interleave(10, 0) * 4 + 0.01 * torch.randn(30, 3, generator=generator(0, "noise"))
    centers = spherical_kmeans(axes, 3, seed=0)
    assert sorted((centers @ torch.eye(3)).argmax(1).tolist()) == [0, 1, 2]
    assert torch.allclose(centers.norm(dim=1), torch.tensor(4.0), atol=0.1)
    assert torch.equal(centers, spherical_kmeans(axes, 3, seed=0))


def test_too_short_a_search_and_too_many_experts_are_refused(pipeline):
    with pytest.raises(ValueError, match=r"search\.steps=6 must exceed warmup=9"):
        APTP(**{**SETTINGS, "warmup": 9}, search=SEARCH)
    with pytest.raises(ValueError, match="experts=99 is more than the 24 training prompts"):
        APTP(**{**SETTINGS, "experts": 99}, search=SEARCH).prune(pipeline, encoded())
    with pytest.raises(ValueError, match=r"floor|lowest|least"):
        APTP(**{**SETTINGS, "budget": 0.01}, search=SEARCH).prune(pipeline, encoded())


def test_distillation_of_an_unpruned_student_is_zero(pipeline):
    from prunekit.slicing import slice_unet

    space, data = discover(pipeline.unet), encoded()
    student = slice_unet(pipeline.unet, space.full())
    config = FineTuneConfig(steps=2, batch_size=6, learning_rate=1e-4)
    args = (student, pipeline.unet, PROCESS, data, data.training_pairs(), config, 0)
    objective = FineTuningObjective(*args, torch.device("cpu"))
    batch = objective.batch(0)
    whole = objective.micro_loss(batch, torch.arange(6))
    parts = [objective.micro_loss(batch, p) for p in torch.arange(6).split(4)]
    assert float(whole["distillation"]) == pytest.approx(0, abs=1e-9) and float(whole["denoising"]) > 0
    assert float(sum(p["denoising"] for p in parts)) == pytest.approx(float(whole["denoising"]), rel=1e-5)


def test_fine_tuning_lowers_the_distillation_error(pipeline, tmp_path):
    from prunekit.slicing import slice_unet

    space, data, rows = discover(pipeline.unet), encoded(), []
    student = slice_unet(pipeline.unet, space.random(0.7, seed=1))
    config = FineTuneConfig(steps=30, batch_size=8, learning_rate=2e-3, log_every=1)
    figures = fine_tune(student, pipeline.unet, data, config, tmp_path, scheduler=pipeline.scheduler, log=rows.append)
    first, last = (sum(r["distillation"] for r in part) for part in (rows[:5], rows[-5:]))
    assert last < 0.7 * first and figures["steps"] == 30
    assert not any(p.requires_grad for p in student.parameters())
