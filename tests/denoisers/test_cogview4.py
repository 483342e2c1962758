"""CogView4: noise levels, texts and calls equal the stock pipeline's, and its saved pipeline can be read."""

import numpy as np
import pytest
import torch
from command_line import ok
from small_transformer_pipelines import make, write
from small_transformers import build, call_of
from unets import relative_error

import prunekit as pk
from prunekit.core.call import predict
from prunekit.core.registry import denoiser_of, family_of, process_of, text_length, texts_of
from prunekit.denoisers.cogview4.denoiser import EmptiedSharedAttention
from prunekit.denoisers.cogview4.family import CogView4Flow
from prunekit.models import load_pipeline
from prunekit.runtime.errors import UserError

TEXTS, SIZE = ["red apple", "a blue house"], {"height": 32, "width": 16}


@pytest.fixture(scope="module")
def pipeline():
    made = make("cogview4", load_pipeline("emoji"))[0]
    made.set_progress_bar_config(disable=True)
    return made


def stock_calls(pipeline, **options):
    """Run the stock pipeline; return the arguments, output and noise level of each call of its transformer."""
    seen = []

    def look(module, args, kwargs, output):
        step = pipeline.scheduler.step_index or 0
        seen.append((kwargs, output[0], pipeline.scheduler.sigmas[step].item()))

    handle = pipeline.transformer.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        pipeline(num_inference_steps=3, output_type="latent", guidance_scale=3.0, **SIZE, **options)
    handle.remove()
    return seen


def test_calls_are_the_pipelines(pipeline):
    model, denoiser, family = pipeline.transformer, denoiser_of(pipeline.transformer), family_of(pipeline)
    with torch.no_grad():
        states, null = family.states(pipeline, TEXTS)["text"], family.null_states(pipeline)["text"].repeat(2, 1, 1)
    assert states.shape[1] == null.shape[1] == text_length(pipeline)
    assert texts_of(pipeline, 3.0) == 2 and texts_of(pipeline, 1.0) == 1 and family.call_batch(2, True) == 2
    seen = stock_calls(pipeline, prompt_embeds=states, negative_prompt_embeds=null)
    assert len(seen) == 6
    for index, (arguments, output, sigma) in enumerate(seen):
        conditions = {"text": null if index % 2 else states, "sizes": family.sizes(32, 16).expand(2, -1)}
        noisy, times = arguments["hidden_states"], arguments["timestep"]
        call = denoiser.call(noisy, times[0], conditions)
        given = {name: value for name, value in arguments.items() if torch.is_tensor(value)}
        assert given.keys() == call.keys()
        assert all(torch.equal(call[name], value) for name, value in given.items())
        with torch.no_grad():
            assert torch.equal(predict(model, call), output)
        ones = torch.ones_like(noisy)
        level = process_of(pipeline).noised(torch.zeros_like(ones), ones, times)
        torch.testing.assert_close(level, ones * sigma)


def test_states_are_the_pipelines_beside_a_long_text(pipeline):
    long = "x" * 300
    expected = pipeline.encode_prompt([*TEXTS, long], None, False, max_sequence_length=224)[0]
    states = family_of(pipeline).states(pipeline, [*TEXTS, long])["text"]
    torch.testing.assert_close(states, expected)


def test_a_noise_level_depends_on_the_size_and_a_probe_takes_the_usual_one(pipeline):
    process, half = process_of(pipeline), torch.tensor([500.0])
    assert process.size_shift(4096) == pytest.approx(3.25) == CogView4Flow().size_shift(4096)
    level = process.noised(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), half).item()
    assert level == pytest.approx(3.25 / 4.25)
    assert process.draw(4096, torch.Generator().manual_seed(0)).median().item() == pytest.approx(500, abs=20)
    fixed = CogView4Flow(type(pipeline.scheduler)(shift=2.0))
    assert fixed.size_shift(4096) == fixed.size_shift(16) == 2.0


def test_a_saved_pipeline_is_pruned_drawn_and_counted(tmp_path):
    folder = write(tmp_path / "model", "cogview4", load_pipeline("emoji"))
    loaded = load_pipeline(folder)
    model = loaded.transformer
    space = pk.discover(model, "all")
    cut = pk.slice_model(model, space.random(0.6, 0))
    cut.save_pretrained(tmp_path / "cut")
    again = type(cut).from_pretrained(tmp_path / "cut")
    call = call_of(model)
    with torch.no_grad():
        assert torch.equal(predict(again, call), predict(cut, call))
    loaded.transformer = again
    loaded.set_progress_bar_config(disable=True)
    drawn = loaded(TEXTS, num_inference_steps=2, output_type="np", **SIZE).images
    assert drawn.shape == (2, 32, 16, 3) and np.isfinite(drawn).all()
    assert "attention" in ok("units", folder)
    text = ok("macs", folder)
    assert f"{pk.CostModel(model, space, (8, 8), 224).dense_macs:,}" in text


def test_a_stock_model_without_blocks_is_saved_and_read(tmp_path):
    model = build("cogview4")
    space = pk.discover(model, "all")
    values = torch.ones(space.size, dtype=torch.bool)
    values[-2] = False
    cut = pk.slice_model(model, pk.Architecture(space, values))
    stock = denoiser_of(model).stock(cut)
    assert type(stock) is type(model) and stock.config.num_layers == 3
    stock.save_pretrained(tmp_path)
    call = call_of(model)
    with torch.no_grad():
        assert relative_error(predict(type(model).from_pretrained(tmp_path), call), predict(cut, call)) <= 1e-6


def test_an_emptied_attention_leaves_its_bias_in_both_streams():
    attention = build("cogview4").transformer_blocks[0].attn1
    states = {"hidden_states": torch.zeros(2, 3, 64), "encoder_hidden_states": torch.zeros(2, 5, 64)}
    image, text = EmptiedSharedAttention(attention)(**states)
    assert image.shape == (2, 3, 64) and text.shape == (2, 5, 64)
    assert torch.equal(image[0, 0], attention.to_out[0].bias) and torch.equal(text[1, 4], attention.to_out[0].bias)


def test_a_control_model_is_refused_by_name():
    with pytest.raises(UserError, match="in_channels=8 and out_channels=4") as error:
        pk.discover(build("cogview4", "meta", in_channels=8), "all")
    assert "\n" not in str(error.value)
