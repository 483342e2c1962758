"""Tests that may be skipped in continuous integration, each with its reason; any other skip fails it."""

CUDA = "needs a GPU, which the machines of continuous integration lack"
METRICS = "needs the extra `metrics`, whose packages need torchvision; run where it is installed"
WEIGHTS = "needs published weights, which tests do not download; run where the hub's cache has them"
OTHER_TOOL = "needs a package that prunekit does not depend on and does not install"
RAY = "needs the extra `ray` and the right to make namespaces; run where both are there"
MOUNTS = "needs the right to mount a file system, which the containers of continuous integration may lack"

COMPATIBILITY = "test_compatibility.py::test_the_table_says_what_happens"
CLIP_SCORES = "evaluation/test_evaluate.py::test_clip_scores_equal_the_logits_of_published_models"
CUDA_GRAPH = "jobs/test_benchmark.py::test_a_cuda_graph_gives_the_eager_output"
LOSS = "jobs/test_ray.py::test_the_loss_of_a_node_changes_nothing"
BOTH_PROCESSES = "runtime/test_full_disk.py::test_a_full_disk_ends_both_processes_of_a_command"

ALLOWED_SKIPS: dict[str, str] = {
    "jobs/test_benchmark.py::test_cuda_times_agree_with_tritons": CUDA,
    **{f"{CUDA_GRAPH}[{shape}]": CUDA for shape in ("sd1", "sd2", "sdxl")},
    **{f"{COMPATIBILITY}[{tool}]": OTHER_TOOL for tool in ("torchao", "DeepCache", "ToMe")},
    "evaluation/test_evaluate.py::test_inception_equals_clean_fid": METRICS,
    "evaluation/test_metrics.py::test_kid_equals_torch_fidelity": METRICS,
    "evaluation/test_metrics.py::test_frechet_distance_equals_torch_fidelity": METRICS,
    **{
        f"runtime/test_tracking.py::test_other_trackers_work_offline[{name}]": OTHER_TOOL
        for name in ("wandb", "trackio")
    },
    **{f"{BOTH_PROCESSES}[{room}]": MOUNTS for room in (60, 3500)},
    **{
        f"jobs/test_ray.py::test_{name}": RAY
        for name in (
            "a_run_is_that_of_one_process",
            "what_is_asked_to_end_saves_first",
            "cells_of_a_comparison_are_those_of_one_process",
            "generated_and_evaluated_pictures_are_those_of_one_process",
            "what_does_not_fit_the_cluster_is_refused_in_one_line",
        )
    },
    **{
        f"serving/test_ray_serving.py::test_{name}": RAY
        for name in (
            "a_killed_replica_loses_no_request",
            "a_killed_node_loses_no_request",
            "a_killed_ingress_answers_with_errors_and_comes_back",
            "a_job_is_stopped_when_its_client_leaves",
            "a_full_queue_refuses_with_503",
            "replicas_that_hold_the_expert_are_preferred",
            "sigterm_under_load",
            "the_written_file_can_be_deployed",
            "what_the_cluster_cannot_serve_is_one_line",
        )
    },
    **{f"{LOSS}[{moment}]": RAY for moment in ("while it trains", "when a model is there", "while pictures are drawn")},
    f"{CLIP_SCORES}[openai/clip-vit-large-patch14-336]": WEIGHTS,
    f"{CLIP_SCORES}[yuvalkirstain/PickScore_v1]": WEIGHTS,
}
