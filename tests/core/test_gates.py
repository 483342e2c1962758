import functools
import gc

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch._dynamo.testing import CompileCounter
from unets import SHAPES, build, inputs, relative_error

from prunekit import Architecture, discover, gated, pipeline_rows, slice_unet


def all_hooks(unet):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def run(unet, arguments):
    with torch.no_grad():
        return unet(**arguments).sample


def soft_gates(space, rows=1, seed=0, **kwargs):
    gates = 0.2 + 0.8 * torch.rand(rows, space.size, generator=torch.Generator().manual_seed(seed), **kwargs)
    return gates.requires_grad_()


@pytest.fixture
def unet():
    return build("sd2")


@pytest.mark.parametrize("shape", SHAPES)
def test_open_gates_are_stock_and_nothing_stays(shape):
    unet = build(shape)
    arguments = inputs(unet, 2)
    space = discover(unet, depth="blocks")
    with torch.no_grad():
        stock = unet(**arguments).sample
        with gated(unet, space) as gates:
            gates.set(space.full())
            assert torch.equal(unet(**arguments).sample, stock)
            gates.set(space.random(0.5))
            assert not torch.equal(unet(**arguments).sample, stock)
        assert all_hooks(unet) == 0
        assert torch.equal(unet(**arguments).sample, stock)


def test_hooks_go_when_the_context_is_left_by_an_error(unet):
    with pytest.raises(KeyError, match="mine"), gated(unet, discover(unet)) as gates:
        gates.set(soft_gates(gates.space)[0])
        unet(**inputs(unet))
        raise KeyError("mine")
    assert all_hooks(unet) == 0


def test_batches_that_do_not_match_are_refused(unet):
    space = discover(unet)
    with torch.no_grad(), gated(unet, space) as gates:
        with pytest.raises(RuntimeError, match="no gates are set"):
            unet(**inputs(unet))
        gates.set(torch.rand(2, space.size))
        with pytest.raises(ValueError, match=r"for a batch of 2, but the model got 3; pass rows="):
            unet(**inputs(unet, 3))
        gates.set(torch.rand(2, space.size), rows=torch.tensor([0, 1, 1]))
        assert unet(**inputs(unet, 3)).sample.shape[0] == 3
        gates.set(torch.rand(space.size))
        assert unet(**inputs(unet, 3)).sample.shape[0] == 3
        with pytest.raises(ValueError, match="rows name gate rows 0 to 1, got 0 to 2"):
            gates.set(torch.rand(2, space.size), rows=torch.tensor([0, 2]))
        with pytest.raises(ValueError, match="one vector \\(D,\\)"):
            gates.set(torch.rand(space.size), rows=torch.tensor([0, 0]))
        with pytest.raises(ValueError, match=f"gates have shape \\({space.size},\\)"):
            gates.set(torch.rand(3))
        with pytest.raises(ValueError, match="integers"):
            gates.set(torch.rand(2, space.size), rows=torch.tensor([0.0, 1.0]))


def test_an_architecture_of_another_instance(unet):
    space = discover(unet)
    arguments = inputs(unet)
    with torch.no_grad(), gated(unet, space) as gates:
        gates.set(discover(build("sd2", "meta")).random(0.5, seed=1))
        other = unet(**arguments).sample
        gates.set(space.random(0.5, seed=1))
        assert torch.equal(unet(**arguments).sample, other)
        with pytest.raises(ValueError, match="belongs to another space"):
            gates.set(discover(unet, depth="none").full())


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_finite_difference(shape):
    unet = build(shape).double()
    space = discover(unet, depth="blocks")
    arguments = inputs(unet, dtype=torch.float64, size=8)
    gates_value = soft_gates(space, dtype=torch.float64)
    with gated(unet, space) as gates:

        def loss(values):
            gates.set(values)
            return unet(**arguments).sample.square().mean()

        value = loss(gates_value)
        value.backward()
        del value
        picked = [space.slice(group).start for group in space.width_groups[2:5]]
        picked += [space.num_width, space.num_width + 1, space.size - 1]
        for unit in picked:
            step = torch.zeros_like(gates_value)
            step[0, unit] = 1e-5
            with torch.no_grad():
                difference = (loss(gates_value + step) - loss(gates_value - step)) / 2e-5
            assert gates_value.grad[0, unit].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-10)
    assert (gates_value.grad != 0).float().mean() > 0.99


def test_setting_again_before_backward_is_an_error(unet):
    space = discover(unet)
    values = soft_gates(space)
    with gated(unet, space) as gates:
        gates.set(values)
        loss = unet(**inputs(unet)).sample.mean()
        with pytest.raises(
            RuntimeError, match="set again while a forward pass with these gates waits for its backward pass"
        ):
            gates.set(space.full())
        loss.backward()
        gates.set(space.full())
    assert values.grad.abs().sum() > 0


def test_leaving_before_backward_is_an_error(unet):
    space = discover(unet)
    with pytest.raises(RuntimeError, match="left while a forward pass"), gated(unet, space) as gates:
        gates.set(soft_gates(space))
        loss = unet(**inputs(unet)).sample.mean()
    assert loss.requires_grad
    assert all_hooks(unet) == 0


def test_a_graph_that_is_dropped_or_never_made_is_no_error(unet):
    space = discover(unet)
    gc.disable()  # the check must not depend on garbage collection
    try:
        with gated(unet, space) as gates:
            gates.set(soft_gates(space))
            output = unet(**inputs(unet))
            del output
            gates.set(soft_gates(space))
            with torch.no_grad():
                kept = unet(**inputs(unet))
            gates.set(soft_gates(space))
        assert kept.sample.isfinite().all()
    finally:
        gc.enable()


def run_with_checkpointing(unet, values, checkpointing, teacher=False):
    """Run one step; return (loss, gradient of the gates, gradient of a weight)."""
    space, arguments = discover(unet, depth="blocks"), inputs(unet, 2)
    values = values.detach().clone().requires_grad_()
    unet.zero_grad()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with gated(unet, space) as gates:
        if teacher:
            with torch.no_grad():
                gates.set(space.full())
                unet(**arguments)
        gates.set(values)
        loss = unet(**arguments).sample.square().mean()
        loss.backward()
    if checkpointing:
        unet.disable_gradient_checkpointing()
    return loss.detach(), values.grad, unet.mid_block.resnets[0].conv1.weight.grad.clone()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing_changes_nothing(shape):
    unet = build(shape)
    values = soft_gates(discover(unet, depth="blocks"), rows=2)
    plain = run_with_checkpointing(unet, values, checkpointing=False)
    for teacher in (False, True):
        recomputed = run_with_checkpointing(unet, values, checkpointing=True, teacher=teacher)
        for a, b in zip(plain, recomputed, strict=True):
            assert torch.equal(a, b)


def test_recomputing_uses_the_gates_of_its_forward_pass(unet):
    """The backward pass is correct even after the error for setting gates again."""
    space, arguments = discover(unet), inputs(unet)
    unet.enable_gradient_checkpointing()
    values = soft_gates(space)
    with gated(unet, space) as gates:
        gates.set(values)
        loss = unet(**arguments).sample.square().mean()
        with pytest.raises(RuntimeError, match="set again"):
            gates.set(soft_gates(space, seed=9))
        loss.backward()
        gates.set(fresh := values.detach().clone().requires_grad_())
        unet.disable_gradient_checkpointing()
        unet(**arguments).sample.square().mean().backward()
    assert torch.equal(values.grad, fresh.grad)


def test_checkpointed_hard_gates_wait_for_backward_too(unet):
    space = discover(unet)
    unet.enable_gradient_checkpointing()
    with gated(unet, space) as gates:
        gates.set(space.random(0.5))
        loss = unet(**inputs(unet)).sample.mean()
        with pytest.raises(RuntimeError, match="set again"):
            gates.set(space.full())
        loss.backward()
        gates.set(space.full())
    assert unet.conv_in.weight.grad.abs().sum() > 0


def test_checkpointing_switched_on_inside_and_restored_after(unet):
    space = discover(unet)
    values = soft_gates(space)
    with gated(unet, space) as gates:
        gates.set(values)
        unet.enable_gradient_checkpointing()
        function = unet.down_blocks[0]._gradient_checkpointing_func
        unet(**inputs(unet)).sample.mean().backward()
        assert unet.down_blocks[0]._gradient_checkpointing_func is not function
    assert unet.down_blocks[0]._gradient_checkpointing_func is function
    assert values.grad.abs().sum() > 0


@pytest.mark.long
def test_a_unet_compiled_before_is_gated_and_after_the_gates_it_is_as_before():
    """Compiled code ignores new hooks. Once, entering gates discarded all compiled code of the process."""
    unet = build(
        "sd2",
        block_out_channels=[32, 32],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        attention_head_dim=[2, 2],
        layers_per_block=1,
    )
    arguments, counter = inputs(unet, size=8), CompileCounter()
    compiled = torch.compile(unet, backend=counter)
    with torch.no_grad():
        stock = compiled(**arguments).sample
        for graphs, depth in ((2, "none"), (3, "all"), (3, "none"), (3, "all")):  # one graph per space
            space = discover(unet, depth)
            for seed in (1, 2):
                architecture = space.random(0.5, seed)
                with gated(compiled, space) as gates:
                    gates.set(architecture)
                    masked = compiled(**arguments).sample
                    assert torch.equal(masked, unet(**arguments).sample)
                assert relative_error(masked, slice_unet(unet, architecture)(**arguments).sample) <= 1e-5
                assert torch.equal(compiled(**arguments).sample, stock)
            assert counter.frame_count == graphs
        space = discover(unet, "all")
        with gated(compiled, space) as gates:
            gates.set(space.full())  # no mask
            assert torch.equal(compiled(**arguments).sample, stock)
    torch.compiler.reset()


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_gates_reach_a_compiled_layer_and_leave_other_compiled_code_alone(unet, patched):
    """patched: the layer already has a replaced `forward`, as with accelerate's hooks."""
    others, layers = CompileCounter(), CompileCounter()
    other = torch.compile(torch.nn.Linear(4, 4), backend=others)
    space = discover(unet, "none")
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    out = attention.to_out[0]
    if patched:
        out.forward = functools.partial(torch.nn.Linear.forward, out)
    own, compiled = dict(out.__dict__), torch.compile(attention, backend=layers)
    x = torch.randn(2, 5, attention.query_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock, _ = compiled(x), other(x[..., :4])
        assert layers.frame_count == others.frame_count == 1
        for _ in range(2):
            with gated(unet, space) as gates:
                for seed in (1, 2):
                    gates.set(space.random(0.5, seed))
                    masked = compiled(x)
                    assert torch.equal(masked, attention(x)) and relative_error(masked, stock) > 1e-3
                other(x[..., :4])
            assert torch.equal(compiled(x), stock)
            other(x[..., :4])
    assert layers.frame_count == 2 and others.frame_count == 1
    assert out.__dict__ == own and all_hooks(unet) == 0
    out.__dict__.pop("forward", None)
    torch.compiler.reset()


def test_low_precision(unet):
    unet = unet.bfloat16()
    space = discover(unet)
    architecture, arguments = space.random(0.7), inputs(unet, dtype=torch.bfloat16)
    with torch.no_grad(), gated(unet, space) as gates:
        gates.set(architecture)
        masked = unet(**arguments).sample
        assert masked.dtype == torch.bfloat16
        assert relative_error(masked.float(), slice_unet(unet, architecture)(**arguments).sample.float()) < 0.05
    values = soft_gates(space)
    with gated(unet, space) as gates:
        gates.set(values)
        unet(**arguments).sample.float().mean().backward()
    assert values.grad.dtype == torch.float32
    assert values.grad.isfinite().all()


def test_autocast(unet):
    space = discover(unet, depth="blocks")
    values, arguments = soft_gates(space), inputs(unet)
    with gated(unet, space) as gates:
        gates.set(values)
        with torch.no_grad():
            full = unet(**arguments).sample
        with torch.autocast("cpu", torch.bfloat16):
            half = unet(**arguments).sample
        half.float().mean().backward()
        del half
    assert values.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), gated(unet, space) as gates:
        gates.set(values)
        assert relative_error(unet(**arguments).sample.float(), full) < 0.05


def test_freeu(unet):
    space = discover(unet, depth="blocks")
    architecture, arguments = space.random(0.6, seed=7), inputs(unet)
    pruned = slice_unet(unet, architecture)
    plain = run(unet, arguments)
    for model in (unet, pruned):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert relative_error(run(unet, arguments), plain) > 1e-3
    with gated(unet, space) as gates:
        gates.set(architecture)
        assert relative_error(run(unet, arguments), run(pruned, arguments)) <= 1e-5


def test_pipeline_rows():
    assert pipeline_rows(2, 3, guidance=True).tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert pipeline_rows(3).tolist() == [0, 1, 2, 0, 1, 2]
    assert pipeline_rows(2, 2, guidance=False).tolist() == [0, 0, 1, 1]


def test_pipeline_rows_are_a_pipelines_batch(unet):
    """One batch of two prompts with two images each and guidance equals separate calls per prompt."""
    from diffusers import StableDiffusionPipeline
    from small_pipeline import pipeline_of

    pipeline = pipeline_of(StableDiffusionPipeline, unet, DPMSolverMultistepScheduler())
    space = discover(unet)
    architectures = [space.random(0.6, seed) for seed in (1, 2)]
    prompts = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def generate(prompts, latents):
        return pipeline(
            prompt_embeds=prompts,
            negative_prompt_embeds=torch.zeros_like(prompts),
            latents=latents,
            num_images_per_prompt=2,
            num_inference_steps=2,
            output_type="latent",
        ).images

    with torch.no_grad(), gated(unet, space) as gates:
        gates.set(torch.stack([a.values for a in architectures]), pipeline_rows(2, 2, guidance=True))
        together = generate(prompts, latents)
        for prompt, architecture in enumerate(architectures):
            gates.set(architecture)
            images = slice(2 * prompt, 2 * prompt + 2)
            alone = generate(prompts[prompt : prompt + 1], latents[images])
            assert relative_error(together[images], alone) <= 1e-4


def test_a_space_of_another_unet_is_refused(unet):
    with (
        pytest.raises(ValueError, match="this model has no 'block:"),
        gated(unet, discover(build("sdxl", "meta"), depth="all", include="*.transformer_blocks.1")),
    ):
        pass
    assert all_hooks(unet) == 0


def test_gates_of_a_pruned_unet(unet):
    space = discover(unet, depth="all")
    pruned = slice_unet(unet, space.random(0.6, seed=3))
    again = discover(pruned, depth="all").random(0.6, seed=4)
    arguments = inputs(unet)
    with torch.no_grad(), gated(pruned, again.space) as gates:
        gates.set(again)
        masked = pruned(**arguments).sample
    with torch.no_grad():
        assert relative_error(masked, slice_unet(pruned, again)(**arguments).sample) <= 1e-5
    assert isinstance(again, Architecture)
