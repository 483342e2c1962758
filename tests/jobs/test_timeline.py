"""The stages of a run and its remaining time, from the plan and from the run's measurements."""

import pytest

from prunekit.jobs.plan.amounts import CHOICE, ENCODING, GENERATION, REFIT, TUNING
from prunekit.jobs.recipe import load_recipe, parse_recipe, resolve_recipe
from prunekit.jobs.timeline import Item, Timeline, items_of, planned_seconds, rounded, timeline_of
from prunekit.runtime.progress import Progress, watched

ITEMS = [
    Item((ENCODING, "", 0), "encode", 10.0),
    Item((TUNING, "a", 0), "fine-tune 2 models of a", 100.0),
    Item((TUNING, "a", 1), "fine-tune 2 models of a", 100.0),
    Item((GENERATION, "a", 0), "draw", 50.0),
]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def said():
    return []


@pytest.fixture
def timeline(clock, said):
    return Timeline([Item(item.key, item.stage, item.planned) for item in ITEMS], said.append, clock)


def test_a_line_per_stage_by_the_plan(timeline, clock, said):
    for key, passed in (((ENCODING, "", 0), 10), ((TUNING, "a", 0), 100), ((TUNING, "a", 1), 100)):
        timeline.begin(key)
        timeline.begin(key)
        clock.now += passed
    timeline.begin((GENERATION, "a", 0))
    timeline.begin(("unknown", "a", 0))
    assert said == [
        "stage 1 of 3: encode (about 10 s), about 4 min left",
        "stage 2 of 3: fine-tune 2 models of a (about 3 min), about 4 min left",
        "stage 3 of 3: draw, about 50 s left",
    ]


def test_the_measured_pace_replaces_the_plan(timeline, clock):
    """Steps take three times as long as planned; so the rest of the model, the other model and the pictures do too."""
    timeline.begin((TUNING, "a", 0))
    clock.now = 30.0
    timeline.watch(seconds=30.0, first=0.0, share=0.1)
    assert timeline.seconds_left() == (pytest.approx(270 + 300), pytest.approx(270 + 300 + 150))
    clock.now = 300.0
    timeline.begin((TUNING, "a", 1))
    clock.now = 310.0
    assert timeline.seconds_left() == (pytest.approx(290), pytest.approx(290 + 150))


def test_what_an_earlier_start_did_is_no_pace(timeline, clock):
    """Half of the model was trained before; the other half takes 50 s, as planned."""
    timeline.begin((TUNING, "a", 0))
    clock.now = 25.0
    timeline.watch(seconds=25.0, first=0.5, share=0.75)
    assert timeline.seconds_left() == (pytest.approx(25 + 100), pytest.approx(25 + 100 + 50))
    clock.now = 50.0
    timeline.begin((TUNING, "a", 1))
    clock.now = 51.0
    timeline.begin((GENERATION, "a", 0))  # the second model was finished before
    assert timeline.seconds_left()[1] == pytest.approx(50)


def test_lines_in_a_stage_come_at_intervals(timeline, clock, said):
    timeline.begin((TUNING, "a", 0))
    for step in range(1, 101):
        clock.now = float(step)
        timeline.watch(seconds=clock.now, first=0.0, share=step / 100)
    assert len(said) == 2 and said[1] == "stage 2 of 3: fine-tune 2 models of a, about 3 min left"


def test_without_a_plan_no_time_is_claimed(clock, said):
    timeline = Timeline([Item((TUNING, "a", 0), "fine-tune a"), Item((GENERATION, "a", 0), "draw")], said.append, clock)
    timeline.begin((TUNING, "a", 0))
    clock.now = 10.0
    timeline.watch(seconds=10.0, first=0.0, share=0.5)
    assert timeline.seconds_left() == (10.0, None)
    clock.now = 1000.0
    timeline.watch(seconds=1000.0, first=0.0, share=0.9)
    assert said == ["stage 1 of 2: fine-tune a"], "the line is not repeated"


def test_every_progress_is_seen():
    seen = []
    with watched(lambda seconds, first, share: seen.append((first, share))), Progress("train", 8, done=2) as progress:
        progress.update(4)
    with Progress("after", 8) as progress:
        progress.update(4)
    assert seen == [(0.25, 0.5)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (41.4, "41 s"), (89, "89 s"), (95, "2 min"), (7000, "117 min"), (7300, "2 h"), (2e5, "2 days")],
)
def test_times_for_people(seconds, text):
    assert rounded(seconds) == text


def test_the_items_of_a_recipe_and_their_times():
    recipe = resolve_recipe(load_recipe("recipes/quickstart.yaml"), "cpu")
    planned = planned_seconds(recipe)
    assert list(planned) == [item.key for item in items_of(recipe)]
    assert all(seconds > 0 for seconds in planned.values())
    assert planned[TUNING, "aptp", 0] == planned[TUNING, "aptp", 1] == pytest.approx(planned[TUNING, "norm", 0])
    stages = list(dict.fromkeys(item.stage for item in items_of(recipe)))
    assert len(stages) == 8 and stages[4] == "fine-tune 2 models of aptp" and stages[3] == "fine-tune norm"


def test_a_refit_is_an_item_of_its_own():
    recipe = load_recipe("recipes/quickstart.yaml", ["recover.closed_form.samples=8"])
    items = [item for item in items_of(recipe) if item.key[1] == "norm" and item.key[0] != GENERATION]
    assert [item.key[0] for item in items] == [CHOICE, REFIT, TUNING]
    assert [item.stage for item in items[1:]] == ["refit and fine-tune norm"] * 2


def test_a_shared_backbone_is_one_model():
    recipe = load_recipe("recipes/quickstart.yaml", ["fine_tune.shared_backbone=true"])
    assert [item.stage for item in items_of(recipe) if item.key[:2] == (TUNING, "aptp")] == ["fine-tune aptp"]


def test_stages_on_a_cluster_have_no_times():
    timeline = timeline_of(load_recipe("recipes/quickstart.yaml", ["engine=ray"]), print, 1)
    assert len(timeline.stages) == 8 and all(item.planned is None for item in timeline.items)


def test_a_model_that_is_not_there_is_the_runs_error(tmp_path):
    content = load_recipe("recipes/quickstart.yaml").model_dump(mode="json")
    timeline = timeline_of(parse_recipe({**content, "model": str(tmp_path / "none")}), print, 1)
    assert all(item.planned is None for item in timeline.items)
