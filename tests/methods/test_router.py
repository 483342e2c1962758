import json

import pytest
import torch
import torch.nn.functional as F
from launching import finish, launch

from prunekit.data.emoji import load_emoji
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.methods.router import ArchitecturePredictor, Router, cosine_scores
from prunekit.runtime.errors import UserError


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    return ArchitecturePredictor(24, 50)


@pytest.fixture
def codes():
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def router(predictor, codes):
    return Router.from_codes(predictor, codes, fallback=4, info={"encoder": "words"})


def prompts(count, width=24, seed=2):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_scores_are_the_cosines(predictor, codes, router):
    z = prompts(200)
    e = F.linear(z.double(), predictor.weight.double(), predictor.bias.double())
    cosine = F.cosine_similarity(e[:, None], codes.double()[None], dim=2)
    torch.testing.assert_close(router.scores(z), cosine * e.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-6)
    assert torch.equal(router.route(z), cosine.argmax(1))
    torch.testing.assert_close(cosine_scores(predictor(z), codes).double(), cosine, rtol=0, atol=1e-6)


def test_the_length_of_an_embedding_matters_once_the_scores_are_shifted(codes):
    """The length does not change the nearest code, but a shift is added to |e| times the cosine."""
    predictor = ArchitecturePredictor(24, 50)
    torch.nn.init.zeros_(predictor.bias)  # makes e proportional to z
    router, z = Router.from_codes(predictor, codes), prompts(500).double()
    shift = torch.linspace(-2, 2, len(codes), dtype=torch.float64)
    assert torch.equal(router.route(5 * z), router.route(z))
    moved = router.shifted(shift)
    torch.testing.assert_close(moved.scores(5 * z), 5 * router.scores(z) + shift, rtol=1e-9, atol=1e-9)
    assert 0 < (moved.route(5 * z) != moved.route(z)).sum() < len(z)


def test_10000_prompts_keep_their_expert_in_any_batch(router):
    z = prompts(10_000)
    scores, experts = router.scores(z), router.route(z)
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(router.route(z[order]), experts[order])
    for size in (1, 2, 3, 7, 64, 1000, 9_999):
        batches = z[:500].split(size) if size < 64 else z.split(size)
        rebatched = torch.cat([router.scores(batch) for batch in batches])
        assert torch.equal(rebatched, scores[: len(rebatched)])
    for layout in (z.T.contiguous().T, z[:, None].expand(-1, 2, -1)[:, 0]):
        assert torch.equal(router.scores(layout), scores)


def test_real_width_and_threads():
    router = Router(prompts(16, 768, seed=5), torch.zeros(16))
    z, threads = prompts(300, 768), torch.get_num_threads()
    scores = router.scores(z)
    torch.testing.assert_close(scores, z.double() @ router.weight.T, rtol=1e-12, atol=1e-12)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(router.scores(z[:37]), scores[:37])
    finally:
        torch.set_num_threads(threads)


ROUTE = """
import json, os, sys
from prunekit.data.prompt_encoder import load_prompt_encoder
from prunekit.methods.router import Router
folder, rank, count = sys.argv[1], int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
captions = json.loads(open(f"{folder}/captions.json").read())[rank::count]
experts = Router.load(folder).route(load_prompt_encoder().encode(captions)).tolist()
json.dump(dict(zip(captions, experts)), open(f"{folder}/experts-{rank}-of-{count}.json", "w"))
"""


@pytest.mark.long
def test_10000_captions_keep_their_expert_on_two_processes(tmp_path):
    """One process routes the captions in order; two processes share them in shuffled order."""
    words = load_emoji().captions
    captions = [f"{a} and {b}" for a, b in zip(words * 3, words[7:] * 3, strict=False)]
    captions = list(dict.fromkeys(captions))[:10_000]
    z = load_prompt_encoder().encode(captions)
    Router(prompts(5, z.shape[1]), torch.zeros(5)).save(tmp_path)
    experts = dict(zip(captions, Router.load(tmp_path).route(z).tolist(), strict=True))
    assert len(experts) == 10_000 and set(experts.values()) == set(range(5))
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(4)).tolist()
    (tmp_path / "captions.json").write_text(json.dumps([captions[index] for index in order]))
    finish(launch(["-c", ROUTE, str(tmp_path)], count=2))
    found = [json.loads((tmp_path / f"experts-{rank}-of-2.json").read_text()) for rank in range(2)]
    assert [len(own) for own in found] == [5_000, 5_000] and found[0] | found[1] == experts


def test_unknown_words_go_to_the_fallback(router):
    z = prompts(3)
    z[1] = 0
    assert router.route(z)[1] == 4
    assert router.with_fallback(2).route(z)[1] == 2
    assert torch.equal(router.route(z)[[0, 2]], router.route(z[[0, 2]]))
    assert router.route(z[:0]).shape == (0,)


def test_save_and_load(router, tmp_path):
    z = prompts(100)
    for path in (tmp_path / "sd-2.1", tmp_path / "file.safetensors"):
        router.save(path)
        loaded = Router.load(path)
        assert torch.equal(loaded.scores(z), router.scores(z))
        assert (loaded.fallback, loaded.info) == (4, {"encoder": "words"})
    assert [p.name for p in (tmp_path / "sd-2.1").iterdir()] == ["router.safetensors"]


def test_an_unused_expert_gets_no_prompt(router, tmp_path):
    z = prompts(1000)
    used = router.with_fallback(1).without([0])
    assert set(router.route(z).tolist()) == set(range(router.num_experts))
    assert set(used.route(z).tolist()) == set(range(1, router.num_experts))
    before = router.route(z)
    assert torch.equal(used.route(z)[before != 0], before[before != 0])  # prompts of other experts keep them
    assert Router.load(used.save(tmp_path / "unused")).unused == (0,) and router.unused == ()
    for change, message in (
        (lambda: router.without(range(router.num_experts)), "not all of them"),
        (lambda: router.without([99]), "unused=.99."),
        (lambda: used.with_fallback(0), "fallback=0: the router sends no prompts to this expert"),
    ):
        with pytest.raises(UserError, match=message):
            change()


def test_half_precision_prompts(router):
    z = prompts(50).half()
    assert torch.equal(router.scores(z), router.scores(z.float()))


def test_errors(predictor, codes, router, tmp_path):
    with pytest.raises(ValueError, match=r"fallback must be one of the experts 0\.\.5"):
        Router.from_codes(predictor, codes, fallback=6)
    with pytest.raises(ValueError, match=r"codes \[2\] are zero"):
        Router.from_codes(predictor, codes.index_fill(0, torch.tensor(2), 0.0))
    with pytest.raises(ValueError, match="50"):
        Router.from_codes(predictor, codes[:, :3])
    with pytest.raises(ValueError, match="24"):
        router.scores(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="finite"):
        router.route(torch.full((1, 24), float("nan")))
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a file of router"):
        Router.load(tmp_path / "other.safetensors")


def test_rows_are_read_a_part_at_a_time(router, monkeypatch):
    """Needed for CC3M, whose embeddings take 9 GB."""
    read, z = [], prompts(50)

    class Stored:
        def __getitem__(self, rows):
            read.append(len(rows))
            return z[rows]

    monkeypatch.setattr("prunekit.methods.router.ROWS_AT_ONCE", 8)
    rows = torch.randperm(50)[:30]
    assert torch.equal(router.route_rows(Stored(), rows), router.route(z)[rows])
    assert torch.equal(router.scores_of(Stored(), rows), router.scores(z)[rows])
    assert max(read) == 8 and sum(read) == 60
    assert router.route_rows(Stored(), rows[:0]).shape == (0,)
