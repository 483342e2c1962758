"""Decisions for a Ray cluster that need no Ray: settings, the written file, the preferred replica."""

import pytest
import yaml
from command_line import ok, refused
from small_mixture import PROMPTS, write_mixture

from prunekit import PromptRoutedPipeline
from prunekit.serving.experts import route
from prunekit.serving.limits import Limits, PoolSettings, ServerSettings
from prunekit.serving.ray_config import Arguments, deployment_options
from prunekit.serving.routed_directory import load_router

NEEDED = ("--gpus-per-replica", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture") / "run", 2)


def test_only_the_router_is_read_to_route(run, tmp_path):
    pipeline = PromptRoutedPipeline.from_pretrained(run, device="cpu")
    expected = pipeline.route(PROMPTS).tolist()
    pipeline.save_pretrained(tmp_path / "routed")
    for directory in (run, tmp_path / "routed"):
        router, encoder = load_router(directory, None)
        assert route(PROMPTS, router, encoder).tolist() == expected and set(expected) == {0, 1}
    router, encoder = load_router(run / "model", None)  # without a router: any diffusers pipeline
    assert (router, encoder) == (None, None) and route(PROMPTS[:3], router, encoder).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "replicas"), [("3", (3, 3)), ("1:4", (1, 4)), ("2:2", (2, 2)), ("0", None), ("4:2", None), ("a", None)]
)
def test_numbers_of_replicas(text, replicas):
    if replicas is None:
        with pytest.raises(ValueError, match=f"--replicas {text}: give a number such as 2, or"):
            PoolSettings.of(text, 1, None, "auto")
    else:
        assert PoolSettings.of(text, 1, 0.5, "auto") == PoolSettings(replicas, 1, 0.5)


def test_the_file_says_all_that_counts(run, tmp_path):
    file = tmp_path / "serve.yaml"
    words = ["--max-batch", "4", "--max-queued", "20", "--max-steps", "7", "--name", "mine", "--method", "aptp"]
    words += ["--host", "0.0.0.0", "--port", "81", "--request-timeout", "70", "--api-key", "secret", *NEEDED]
    said = ok("serve", run, *words, "--replicas", "1:3", "--cpus-per-replica", "2", "--write-config", file)
    assert "serve deploy" in said and "secret" not in file.read_text()
    content = yaml.safe_load(file.read_text())
    assert content["http_options"] == {"host": "0.0.0.0", "port": 81}
    (application,) = content["applications"]
    assert application["import_path"] == "prunekit.serving.ray_app:build" and application["route_prefix"] == "/"
    arguments = Arguments.model_validate(application["args"])
    limits = Limits(steps=7)
    expected = ServerSettings(method="aptp", name="mine", max_batch=4, max_queued=20, request_seconds=70, limits=limits)
    assert arguments == Arguments(directory=run.resolve(), settings=expected, needs_api_key=True)
    ingress, pool = application["deployments"]
    assert (ingress["name"], ingress["num_replicas"], ingress["ray_actor_options"]) == ("Ingress", 1, {"num_cpus": 0})
    assert pool["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 8}
    assert (pool["max_ongoing_requests"], pool["max_queued_requests"]) == (4 + 20, 20)
    assert pool["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 0.0}
    assert pool["graceful_shutdown_timeout_s"] > 70 and "num_replicas" not in pool


def test_replicas_that_are_fixed():
    pool = deployment_options(ServerSettings(deterministic=True), PoolSettings((2, 2), 1, 2))["Pool"]
    assert pool["num_replicas"] == 2 and "autoscaling_config" not in pool
    assert pool["max_ongoing_requests"] == 2 + 64, "two GPUs draw an image each, and 64 wait"


def test_what_is_wrong_is_one_line(run, tmp_path):
    file = ("--write-config", tmp_path / "serve.yaml")
    assert "--write-config needs --gpus-per-replica" in refused("serve", run, *file)
    assert "give the absolute path that the nodes see" in refused("serve", "exports/nowhere", *file, *NEEDED)
    assert "has no result of method 'norm'" in refused("serve", run, *file, *NEEDED, "--method", "norm")
    assert "--device is for --engine local" in refused("serve", run, *file, *NEEDED, "--device", "cpu")
    assert "of --engine ray" in refused("serve", run, "--replicas", "2")
    assert "give local or ray" in refused("serve", run, "--engine", "rya")
    assert "such as 0.5" in refused("serve", run, "--engine", "ray", "--gpus-per-replica", "1.5")
    assert "neither a run directory" in refused("serve", tmp_path, *file, *NEEDED)
    ok("serve", "/models/elsewhere", *file, *NEEDED)  # a path that exists only on the nodes
    (application,) = yaml.safe_load(file[1].read_text())["applications"]
    assert application["args"]["directory"] == "/models/elsewhere"
    with pytest.raises(ValueError, match="max_batsh"):
        Arguments.model_validate({"directory": "/models", "settings": {"max_batsh": 2}})
