"""The demo: its answers, its one-sentence refusals, and its page in a real browser."""

import re
import shutil
from importlib.util import find_spec

import pytest
from browsers import need_browser, open_page
from command_line import refused
from interrupting import interrupting
from small_mixture import write_mixture

from prunekit import PromptRoutedPipeline
from prunekit.demo import Demo
from prunekit.demo.drawing import explanation
from prunekit.methods import PruneResult

PROMPTS = ("red apple", "two fish", "old car", "blue moon", "qxwvkj")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run with two experts and a router that sends prompts of PROMPTS to both."""
    return write_mixture(tmp_path_factory.mktemp("demo") / "mixture")


@pytest.fixture(scope="module")
def demo(run):
    return Demo(run, device="cpu")


def test_an_answer_is_what_both_models_draw(run, demo):
    pipeline = PromptRoutedPipeline.from_pretrained(run, device="cpu")
    experts = pipeline.route(PROMPTS).tolist()
    assert set(experts) == {0, 1}
    for prompt, expert in zip(PROMPTS, experts, strict=True):
        found = demo.answer(prompt, seed=3, steps=2, guidance=2.0)
        assert found.expert == expert and len(found.scores) == 2
        assert not found.known or found.scores[expert] == max(found.scores)
        drawn = pipeline(prompt, None, 2, 2.0, seeds=3)
        assert drawn.images[0].tobytes() == found.pruned.image.tobytes() and drawn.macs[0] == found.pruned.macs
        assert found.dense.macs > found.pruned.macs and found.dense.seconds > 0 < found.pruned.seconds
        assert found.dense.image.tobytes() != found.pruned.image.tobytes()
    dense = demo.pipeline.parts.pipeline(demo.dense.mixture.experts.load(0, "cpu", pipeline.vae.dtype))
    assert dense.unet.config.get("pruning") is None
    assert not found.known and "knows no word" in explanation(demo, found)
    assert demo.answer(" qxwvkj ", 3, 2, 2.0).pruned.image == found.pruned.image


def test_an_explanation_names_the_expert_and_draws_it(demo):
    text = explanation(demo, demo.answer("red <apple>", 0, 1))
    assert "highest score" in text and text.count("<svg") == 2 and "<apple>" not in text
    assert re.search(r"It takes \d+\.\d % of the dense model", text)


def test_an_export_and_a_method_without_a_router(run, demo, tmp_path):
    demo.pipeline.save_pretrained(tmp_path / "exported")
    exported = Demo(tmp_path / "exported", device="cpu")
    mine, theirs = exported.answer("red apple", 1, 1), demo.answer("red apple", 1, 1)
    assert mine.pruned.image == theirs.pruned.image and mine.dense.image == theirs.dense.image
    assert mine.scores == theirs.scores and explanation(exported, mine).count("<svg") == 2
    alone = tmp_path / "alone"
    experts = run / "methods" / "aptp" / "experts"
    PruneResult(PruneResult.load(experts.parent).architectures[:1]).save(alone / "methods" / "norm")
    shutil.copytree(experts / "0", alone / "methods" / "norm" / "experts" / "0")
    shutil.copy(run / "recipe.yaml", alone)
    found = Demo(alone, device="cpu")
    answer = found.answer("red apple", 1, 1)
    assert not found.has_router and answer.scores == [] and explanation(found, answer).count("<svg") == 1
    shutil.move(run / "model", tmp_path / "elsewhere")
    try:
        without = Demo(tmp_path / "exported", device="cpu")
    finally:
        shutil.move(tmp_path / "elsewhere", run / "model")
    answer = without.answer("red apple", 1, 1)
    assert answer.dense is None and "is not here" in explanation(without, answer)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("", 0, 1), "prompt is empty"),
        (("x" * 2000, 0, 1), "at most 1,000"),
        (("red apple", -1, 1), "seed=-1"),
        (("red apple", 0.5, 1), "seed=0.5"),
        (("red apple", None, 1), "seed=None"),
        (("red apple", float("inf"), 1), "seed=inf: a whole number"),
        (("red apple", 0, float("nan")), "steps=nan: a whole number"),
        (("red apple", 0, True), "steps=True: a whole number"),
        (("red apple", 0, 0), "steps=0"),
        (("red apple", 0, 1, -2.0), "guidance=-2.0"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(demo, given, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        demo.answer(*given)
    assert "\n" not in str(error.value)


def test_a_faulty_folder_is_one_line(run, tmp_path):
    if find_spec("gradio") is None:
        assert "pip install 'prunekit[demo]'" in refused("demo", run)
        return
    (tmp_path / "empty").mkdir()
    assert "not a directory" in refused("demo", tmp_path / "nowhere")
    assert "neither a run directory" in refused("demo", tmp_path / "empty")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert "has no result of method 'norm'" in refused("demo", copy, "--method", "norm")
    assert "not usable on this machine" in refused("demo", copy, "--device", "cuda:99")
    shutil.rmtree(copy / "methods" / "aptp" / "experts" / "1" / "unet")
    assert "expert 1 of aptp does not exist yet" in refused("demo", copy)
    shutil.rmtree(copy / "methods")
    assert "has no result of a method yet; resume it first" in refused("demo", copy)


@pytest.fixture(scope="module")
def server(demo):
    pytest.importorskip("gradio", reason="the demo's page needs gradio: pip install 'prunekit[demo]'")
    need_browser()
    from prunekit.demo.web_page import launch

    page, url = launch(demo)
    yield url
    page.close(verbose=False)


def test_the_page_in_a_browser(server, demo):
    expert = demo.pipeline.route(["two fish"]).tolist()[0]
    with open_page() as (page, faults, asked):
        page.goto(server)
        page.fill("#prompt input, #prompt textarea", "two fish")
        page.fill("#steps input[type=number]", "2")
        page.click("#draw")
        page.wait_for_selector("#why .explanation")
        page.wait_for_function("[...document.images].filter(i => i.closest('#dense-image, #pruned-image')).length == 2")
        assert f"sends this prompt to expert {expert} of 2" in page.inner_text("#why")
        assert f"expert {expert}" in page.inner_text("#pruned-caption") and "MACs" in page.inner_text("#dense-caption")
        sizes = page.evaluate("[...document.querySelectorAll('#dense-image img, #pruned-image img')].map(i => i.src)")
        assert len(set(sizes)) == 2 and page.locator("#why svg").count() == 2
        page.fill("#prompt input, #prompt textarea", "   ")
        page.click("#draw")
        page.wait_for_selector("#message .message")
        assert "prompt is empty" in page.inner_text("#message") and "Traceback" not in page.content()
        assert page.locator("#dense-image img").count() == 0
    assert faults == []
    assert [url for url in asked if not url.startswith((server, "data:", "blob:"))] == []


def test_it_serves_until_it_is_interrupted(run):
    pytest.importorskip("gradio", reason="the demo's page needs gradio: pip install 'prunekit[demo]'")
    from prunekit.demo.web_page import serve

    with interrupting() as (say, told):
        serve(run, None, "127.0.0.1", None, "cpu", say)
    assert len(told) == 2 and "stopped" in told[1]
