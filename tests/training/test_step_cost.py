"""A step reads no tensor of the device on the host, and makes no blocking copy to the device.

Either would make the host wait for the device. Optimizations of a step do not change its results by a bit.
"""

from collections import Counter
from contextlib import ExitStack, nullcontext

import pytest
import torch
from small_data import encoded_for, stub
from torch.utils._python_dispatch import TorchDispatchMode
from unets import build, inputs

import prunekit as pk
from prunekit.core.registry import process_of
from prunekit.methods import APTP, UniArch
from prunekit.methods.base import space_and_cost
from prunekit.recovery.fine_tuning import FineTuneConfig, FineTuningObjective
from prunekit.training.memory import CAST, held
from prunekit.training.trainer import TrainerConfig

WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "bincount", "masked_select", "_unique2", "equal")
SEARCH = {"steps": 4, "batch_size": 6, "learning_rate": 1e-2, "precision": "bfloat16"}


class Reads(TorchDispatchMode):
    """Records operations whose result the host needs, with the dtype of their input, and counts all operations."""

    def __init__(self):
        super().__init__()
        self.found, self.counts = [], Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += 1
        if name in WAITS:
            self.found.append((name, args[0].dtype))
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_a_read():
    with Reads() as reads:
        float(torch.ones(()))
        bool(torch.ones(2).bool().all())
        torch.bincount(torch.tensor([0, 1]))
    assert [name for name, _ in reads.found] == ["_local_scalar_dense", "_local_scalar_dense", "bincount"]


@pytest.mark.parametrize(
    "method", [APTP(experts=2, warmup=1, search=SEARCH), UniArch(search=SEARCH)], ids=lambda method: method.name
)
def test_a_search_step_reads_nothing_of_the_device(method):
    unet = build("sd2").requires_grad_(False)
    space, cost = space_and_cost(unet, method.config)
    with pk.gated(unet, space) as gates:
        objective = method._objective(unet, gates, cost, process_of(stub(unet)), encoded_for(unet, num=12))
        objective.batch(1)  # initializes the codes
        for step in (0, 2):
            with Reads() as placed:
                batch = objective.batch(step)
            assert placed.found in ([], [("_local_scalar_dense", torch.bool)])  # transport checks its input on a CPU
            with Reads() as reads, torch.autocast("cpu", torch.bfloat16):
                terms = objective.shared_loss(batch)
                sum(terms.values()).backward()
                sum(objective.micro_loss(batch, torch.arange(6)).values()).backward()
            found = {name for name, _ in reads.found}, {dtype for _, dtype in reads.found}
            assert found == (
                {"_local_scalar_dense"},
                {torch.int64},
            )  # checks of index ranges, which run only on CPUs


class Copies(TorchDispatchMode):
    """Records blocking copies of tensors (except scalars) from the host to the device, and counts the other copies."""

    def __init__(self):
        super().__init__()
        self.waited, self.unwaited = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        flat = [part for value in args for part in (value if isinstance(value, list | tuple) else [value])]
        entering = any(isinstance(part, torch.Tensor) and part.device.type == "cpu" and part.dim() for part in flat)
        if entering and isinstance(output, torch.Tensor) and output.device.type == "meta":
            self.unwaited += kwargs.get("non_blocking") is True
            self.waited += [] if kwargs.get("non_blocking") else [function.overloadpacket.__name__]
        return output


@pytest.fixture
def meta(monkeypatch):
    """Return the meta device as a simulated GPU: its tensors cannot be read, and mixing it with CPU tensors fails."""
    autocast = torch.autocast

    def of(kind, *arguments, **options):
        return nullcontext() if kind == "meta" else autocast(kind, *arguments, **options)

    monkeypatch.setattr(torch, "autocast", of)
    return torch.device("meta")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(APTP(experts=2, warmup=1, search=SEARCH), id="aptp"),
        pytest.param(APTP(preset="paper", experts=2, warmup=1, search=SEARCH), id="paper", marks=pytest.mark.long),
        pytest.param(UniArch(search=SEARCH), id="uniarch", marks=pytest.mark.long),
    ],
)
def test_a_search_step_on_another_device_waits_for_no_copy(method, meta):
    unet = build("sd2").requires_grad_(False)
    data, scheduler = encoded_for(unet, num=12), stub(unet)
    space, cost = space_and_cost(unet.to(meta), method.config)
    with pk.gated(unet, space) as gates:
        objective = method._objective(unet, gates, cost, process_of(scheduler), data)
        for step in (0, 2, 3):
            with Copies() as copies:
                batch = objective.batch(step)
                sum(objective.shared_loss(batch).values()).backward()
                sum(objective.micro_loss(batch, torch.arange(6)).values()).backward()
        assert copies.waited == [] and copies.unwaited >= 4  # in the last step, when all tables are on the device


def test_a_fine_tuning_step_on_another_device_waits_for_no_copy(meta):
    unet = build("sd2")
    student = pk.slice_unet(unet, pk.discover(unet).random(0.6, seed=0)).requires_grad_(True)
    data, config = encoded_for(unet, num=12), FineTuneConfig(**SEARCH)
    parts = (student.to(meta), unet.to(meta), process_of(stub(unet)), data, data.training_pairs(), config, 0)
    objective = FineTuningObjective(*parts, meta)
    for step in (0, 1):
        with Copies() as copies:
            sum(objective.micro_loss(objective.batch(step), torch.arange(6)).values()).backward()
    assert copies.waited == [] and copies.unwaited >= 4


def test_a_full_architecture_costs_nothing_and_changes_no_bit():
    unet = build("sd2").requires_grad_(False)
    space, found = pk.discover(unet, depth="blocks"), []
    with pk.gated(unet, space) as gates, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for opened in (space.full(), torch.ones(space.size)):
            gates.set(opened)
            with Reads() as calls:
                found.append((unet(**inputs(unet, 2)).sample, calls.counts))
    (output, calls), (masked, more) = found
    assert torch.equal(output, masked)
    assert more["mul"] - calls["mul"] == len(space.width_groups)
    assert more["lerp"] - calls["lerp"] == len(space.depth_groups) > 0


def test_hardened_gates_hold_nothing_under_a_removed_layer():
    unet = build("sd2").requires_grad_(False)
    method = APTP(experts=2, warmup=1, search=SEARCH, depth="blocks", similarity="hardened")
    space, cost = space_and_cost(unet, method.config)
    with pk.gated(unet, space) as gates:
        objective = method._objective(unet, gates, cost, process_of(stub(unet)), encoded_for(unet))
    soft = torch.rand(5, space.size, generator=torch.Generator().manual_seed(0))
    hardened = objective.hardening(soft)
    for found, values in zip(hardened, soft >= 0.5, strict=True):
        for group in space.groups:
            expected = (space.canonical(values) if not group.is_depth else values)[space.slice(group)]
            assert torch.equal(found[space.slice(group)], expected / torch.tensor(group.size).sqrt())


def test_frozen_weights_are_cast_once_and_change_no_bit():
    unet, found = build("sd2").requires_grad_(False), []
    config = TrainerConfig(**SEARCH)
    space, before = pk.discover(unet), {name: value.clone() for name, value in unet.state_dict().items()}
    for holding in (held(config, unet), nullcontext()):
        soft = torch.full((2, space.size), 0.5, requires_grad=True)
        with holding, pk.gated(unet, space) as gates, torch.autocast("cpu", torch.bfloat16):
            gates.set(soft)
            with Reads() as calls:
                loss = unet(**inputs(unet, 2)).sample.float().square().mean()
            loss.backward()
        found.append((loss.detach(), soft.grad, calls.counts["_to_copy"]))
    (loss, gradient, casts), (cast_loss, cast_gradient, more) = found
    assert torch.equal(loss, cast_loss) and torch.equal(gradient, cast_gradient)
    layers = [module for module in unet.modules() if isinstance(module, CAST)]
    assert more - casts == sum(1 + (layer.bias is not None) for layer in layers)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_fine_tuning_step_reads_nothing():
    unet = build("sd2")
    student = pk.slice_unet(unet, pk.discover(unet).random(0.6, seed=0)).requires_grad_(True)
    data, config = encoded_for(unet, num=12), FineTuneConfig(**SEARCH)
    parts = (student, unet, process_of(stub(unet)), data, data.training_pairs(), config, 0)
    objective = FineTuningObjective(*parts, torch.device("cpu"))
    batch = objective.batch(0)
    with ExitStack() as stack:
        reads = stack.enter_context(Reads())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        sum(objective.micro_loss(batch, torch.arange(6)).values()).backward()
    assert reads.found == []
