"""The import of a release in APTP's format (helpers/small_release.py) gives its architectures, units and costs."""

import json
import pickle

import pytest
import torch
from command_line import ok, refused
from small_model import write_pipeline
from small_release import draw, expected, write_release
from unets import build, inputs, relative_error

import prunekit as pk
from prunekit import PromptRoutedPipeline
from prunekit.export.importing.layout import architectures_of, published_structure
from prunekit.jobs.import_aptp import import_aptp
from prunekit.methods import PruneResult
from prunekit.models import load_pipeline, load_unet_on_meta


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def release(tmp_path_factory, model):
    return write_release(tmp_path_factory.mktemp("release") / "APTP-Small", load_pipeline(model).unet)


def test_a_release_gives_the_same_architectures_units_costs_and_weights(release, model, tmp_path):
    folder, drawn, layers, codes = release
    text = ok("import", "aptp", folder, "--output", tmp_path / "run", "--model", model, "--prompt-encoder", "emoji")
    assert "3 architecture(s) and a router" in text and "experts [2] have no fine-tuned weights" in text
    unet, method = load_pipeline(model).unet, tmp_path / "run" / "methods" / "aptp"
    space = pk.discover(unet, "aptp")
    cost = pk.CostModel(unet, space, text_length=load_pipeline(model).tokenizer.model_max_length)
    result = PruneResult.load(method, unet)
    for index, (gates, _) in enumerate(drawn):
        own = expected(space, gates)
        assert result.architectures[index] == own
        assert pk.Architecture.load(method / "architectures" / f"{index}.json", space) == own
        assert (result.info.macs[index], result.info.params[index]) == (cost.macs(own), cost.params(own))
        pruned = pk.PrunedUNet2DConditionModel.from_pretrained(method / "experts" / str(index) / "unet")
        assert pruned.num_parameters() == cost.params(own)
        reference = pk.slice_unet(unet, own)
        if index < 2:
            reference.conv_out.bias.data.fill_(index + 1.0)
        assert relative_error(pruned(**inputs(unet)).sample, reference(**inputs(unet)).sample) <= 1e-6
        counted = ok("macs", method / "experts" / str(index), "--text-length", cost.text_length)
        assert f"{cost.macs(own):,} MACs" in counted
    z = torch.randn(50, 64)
    e = z @ torch.cat([layers[f"mh_fc.{i}.weight"] for i in range(len(layers) // 2)]).T
    e = e + torch.cat([layers[f"mh_fc.{i}.bias"] for i in range(len(layers) // 2)])
    cosine = torch.nn.functional.cosine_similarity(e[:, None].double(), codes[None].double(), dim=2)
    assert torch.equal(result.router.route(z), cosine.argmax(dim=1))
    encoder = PromptRoutedPipeline.from_pretrained(tmp_path / "run", device="cpu").mixture.encoder
    assert encoder.name == "emoji"


def test_one_expert_becomes_a_run_that_generates(release, model, tmp_path):
    import_aptp(release[0] / "arch0" / "checkpoint-30000", tmp_path / "run", str(model), "emoji")
    ok("generate", tmp_path / "run", "--prompt", "red apple", "--steps", 1)
    assert (tmp_path / "run" / "generated" / "aptp" / "00000.png").is_file()


def test_the_papers_model_on_its_config_alone(tmp_path):
    unet = load_unet_on_meta("sd-2.1")
    gates, vector = draw(unet, 0)
    space = pk.discover(unet, "aptp")
    assert vector.shape == (1620,) and published_structure(space)[1] == 14
    assert architectures_of(vector[None], space) == [expected(space, gates)]
    (tmp_path / "release").mkdir()
    torch.save(vector[None], tmp_path / "release" / "quantizer_embeddings.pt")
    done = import_aptp(tmp_path / "release", tmp_path / "run")
    assert done.weights == ["none"] and "only configs" in done.notes[0]
    macs = f"{done.result.info.macs[0]:,} MACs"
    assert macs in ok("macs", tmp_path / "run" / "methods" / "aptp" / "experts" / "0")


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def _faults(folder, vector, unet):
    """Return the faults: functions that write to an empty release, and the error messages."""
    other = {"width": [[8]], "depth": [[1]]}

    def structured(structure):
        torch.save(vector, folder / "quantizer_embeddings.pt")
        (folder / "quantizer").mkdir()
        (folder / "quantizer" / "config.json").write_text(json.dumps({"structure": structure}))

    def weights(write):
        torch.save(vector, folder / "arch_vector.pt")
        (folder / "unet").mkdir()
        write(folder / "unet" / "diffusion_pytorch_model.bin")

    return {
        "nothing": (lambda: None, "holds no architecture vectors"),
        "short": (lambda: torch.save(vector[:, :-1], folder / "arch_vector.pt"), "give the model that was pruned"),
        "integers": (lambda: torch.save(vector.long(), folder / "arch_vector.pt"), "expected: floats"),
        "logits": (lambda: torch.save(9 * vector - 5, folder / "arch_vector.pt"), "outside 0 to 1.5, so"),
        "pickle": (lambda: (folder / "arch_vector.pt").write_bytes(pickle.dumps(Harmful())), "can run code"),
        "two": (lambda: torch.save(vector.repeat(2, 1), folder / "arch_vector.pt"), "an expert has one"),
        "structure": (lambda: structured(other), "describes another UNet"),
        "form": (lambda: structured({"width": 3}), "a structure must be"),
        "harmful weights": (lambda: weights(lambda path: torch.save(Harmful(), path)), "can run code"),
        "no weights": (lambda: weights(lambda path: torch.save([1], path)), "holds no weights by name"),
        "other weights": (lambda: weights(lambda path: torch.save(unet.state_dict(), path)), "do not belong to"),
    }


@pytest.mark.parametrize("fault", _faults(None, torch.zeros(1, 1), None))
def test_faulty_releases_are_refused_in_one_line(tmp_path, model, fault, capsys):
    unet, folder = build("sd2"), tmp_path / "release"
    folder.mkdir()
    write, said = _faults(folder, draw(load_unet_on_meta(model), 0)[1][None], unet)[fault]
    write()
    assert said in refused("import", "aptp", folder, "--output", tmp_path / "run", "--model", model)
    assert [path.name for path in tmp_path.iterdir()] == ["release"] and "harm\n" not in capsys.readouterr().out
