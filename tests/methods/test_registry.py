from importlib.metadata import EntryPoint

import pytest

from prunekit.methods import registry


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_methods", {})
    monkeypatch.setattr(registry, "BUILT_IN", {})
    monkeypatch.setattr(registry, "entry_points", lambda group: [])


class Magnitude:
    """Remove the smallest weights.

    And more.
    """


def test_register_get_names_describe():
    assert registry.register("norm")(Magnitude) is Magnitude
    assert registry.get("norm") is Magnitude and Magnitude.name == "norm"
    assert registry.names() == ["norm"]
    assert registry.describe() == {"norm": "Remove the smallest weights."}


def test_a_clash_is_refused_and_a_reload_is_not():
    registry.register("norm")(Magnitude)
    registry.register("norm")(Magnitude)
    with pytest.raises(ValueError, match=r"'norm' is already registered by .*Magnitude"):

        @registry.register("norm")
        class Other:
            pass

    with pytest.raises(ValueError, match="lower_case"):
        registry.register("My-Method")(Magnitude)


def test_unknown_name_says_what_there_is():
    registry.register("taylor_sp")(Magnitude)
    with pytest.raises(ValueError, match=r"unknown method 'Taylor-SPP'; did you mean 'taylor_sp'\?.*Available: tay"):
        registry.get("Taylor-SPP")
    with pytest.raises(ValueError, match="Available: taylor_sp"):
        registry.get("zzz")


def test_other_packages_are_loaded_when_used(monkeypatch):
    points = [
        EntryPoint("mine", "collections:OrderedDict", registry.GROUP),
        EntryPoint("broken", "no_such_package.module:Method", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "prunekit.methods" else [])
    assert registry.names() == ["broken", "mine"]
    assert registry.describe()["mine"] == "from collections:OrderedDict"
    with pytest.raises(ValueError, match=r"'broken' comes from no_such_package.module:Method.*ModuleNotFoundError"):
        registry.get("broken")
    points.append(EntryPoint("mine", "other:Method", registry.GROUP))
    with pytest.raises(ValueError, match="two packages register method 'mine'"):
        registry.names()
