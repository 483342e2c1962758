"""Executors: pieces that other nodes run by name, and the setting `engine` and what it does not affect."""

import sys
from functools import partial

import pytest
from command_line import refused

from prunekit.jobs.process_count import process_count
from prunekit.jobs.recipe import dump_recipe, parse_recipe, resolve_recipe
from prunekit.runtime.engines import LOCAL, EngineConfig, executor_of, load_engine
from prunekit.runtime.errors import MissingPackageError, UserError
from prunekit.runtime.executors import Call, OnePiece
from prunekit.runtime.progress import Saying
from prunekit.runtime.work import Piece, claimed

LOG = Saying(lambda text: None)


def pieces(folder, names=("first", "second", "first")):
    """Return pieces that write their position; two of them share a lock file."""

    def write(position):
        (folder / str(position)).write_text(f"{position}")

    return [Piece(name, (folder / str(i)).exists, partial(write, i)) for i, name in enumerate(names)]


@pytest.mark.parametrize("position", range(3))
def test_one_piece_is_done_alone_and_once(tmp_path, position):
    name = pieces(tmp_path)[position].name
    for _ in range(2):
        one = OnePiece(name, position, LOG)
        one.map(pieces(tmp_path), tmp_path / "locks")
        one.map(pieces(tmp_path, ["other"]), tmp_path / "locks")  # a list without the piece
        assert not one.taken and [p.name for p in tmp_path.iterdir() if p.is_file()] == [str(position)]


def test_one_piece_that_another_process_does_is_left(tmp_path):
    one = OnePiece("second", 1, LOG)
    with claimed(tmp_path / "locks" / "second.lock"):
        one.map(pieces(tmp_path), tmp_path / "locks")
    assert one.taken and not (tmp_path / "1").exists()


@pytest.mark.parametrize("lists", [[], [("first", "first")], [("first", "second"), ("other", "second")]])
def test_a_list_that_differs_on_another_node_is_an_error(tmp_path, lists):
    one = OnePiece("second", 1, LOG)
    for names in lists:
        one.map(pieces(tmp_path, names), tmp_path / "locks")
    with pytest.raises(AssertionError, match=r"is in [02] lists"):
        one.taken  # noqa: B018


def collect(executor, word):
    """A function that a call names."""
    executor.map([word], None)


def test_a_call_names_a_function():
    told = []
    call = Call.of(collect, word="x")
    executor = type("Told", (), {"map": lambda self, given, locks: told.extend(given)})()
    assert call == Call(f"{__name__}:collect", {"word": "x"})
    call(executor)
    assert told == ["x"]


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ([], LOCAL),
        (["engine=local"], LOCAL),
        (["engine=ray"], EngineConfig(kind="ray")),
        (["engine.kind=ray", "engine.gpus=0.5"], EngineConfig(kind="ray", gpus=0.5)),
        (["engine={kind: ray, cpus: 4, address: local}"], EngineConfig(kind="ray", cpus=4, address="local")),
    ],
)
def test_the_setting_of_commands_and_recipes(settings, engine):
    assert load_engine(settings) == engine
    given = dict(item.split("=", 1) for item in settings if item.startswith("engine="))
    if given and "{" not in given["engine"]:
        assert recipe(**given).engine == engine


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["engine=dask"], "setting engine.kind: input should be 'local' or 'ray'"),
        (["engine.cpus=0"], "setting engine.cpus: input should be greater than 0"),
        (["steps=3"], "setting steps: extra inputs are not permitted; give engine=local or engine=ray"),
    ],
)
def test_other_settings_are_refused_in_one_line(settings, words, tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        load_engine(settings)
    assert words in str(error.value)
    assert words in refused("resume", tmp_path, *settings)


def recipe(**changes):
    content = {"name": "x", "prune": {"budget": 0.7}, "methods": {"norm": {}}}
    return parse_recipe({**content, "fine_tune": {"steps": 1, "batch_size": 2, "learning_rate": 1e-3}, **changes})


def test_no_record_has_the_engine():
    on_ray = recipe(engine="ray")
    assert on_ray.engine.kind == "ray" and "engine" not in dump_recipe(on_ray)
    assert dump_recipe(on_ray) == dump_recipe(recipe()) and resolve_recipe(on_ray, "cpu") == resolve_recipe(
        recipe(), "cpu"
    )


def test_a_command_on_ray_starts_no_processes_beside_its_own(monkeypatch):
    monkeypatch.setenv("PRUNEKIT_PROCESSES", "2")
    assert process_count(recipe()) == 2 and process_count(recipe(engine="ray")) == 1


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingPackageError, match=r"pip install 'prunekit\[ray\]'"),
        executor_of(load_engine(["engine=ray"]), LOG),
    ):
        pass
