"""What a step does not do: read a tensor of the device on the host, which would make the one wait for the other."""

from contextlib import ExitStack

import pytest
import torch
from small_data import encoded_for, stub
from torch.utils._python_dispatch import TorchDispatchMode
from unets import build

import prunekit as pk
from prunekit.methods import APTP, UniArch
from prunekit.methods.base import space_and_cost
from prunekit.methods.calibration import noise_schedule
from prunekit.training.diffusion import forward_process
from prunekit.training.fine_tuning import FineTuneConfig, FineTuningObjective

WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "bincount", "masked_select", "_unique2", "equal")
SEARCH = {"steps": 4, "batch_size": 6, "learning_rate": 1e-2, "precision": "bfloat16"}


class Reads(TorchDispatchMode):
    """Keeps the operations whose result the host needs, with the dtype that they look at."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in WAITS:
            self.found.append((function.overloadpacket.__name__, args[0].dtype))
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
        objective = method._objective(unet, gates, cost, noise_schedule(stub(unet)), encoded_for(unet, num=12))
        objective.batch(1)  # the codes are placed
        for step in (0, 2):
            with Reads() as placed:
                batch = objective.batch(step)
            assert placed.found in ([], [("_local_scalar_dense", torch.bool)])  # transport looks at its input on a CPU
            with Reads() as reads, torch.autocast("cpu", torch.bfloat16):
                terms = objective.shared_loss(batch)
                sum(terms.values()).backward()
                sum(objective.micro_loss(batch, torch.arange(6)).values()).backward()
            found = {name for name, _ in reads.found}, {dtype for _, dtype in reads.found}
            assert found == (
                {"_local_scalar_dense"},
                {torch.int64},
            )  # ranges of indices, checked on CPUs


def test_a_fine_tuning_step_reads_nothing():
    unet = build("sd2")
    student = pk.slice_unet(unet, pk.discover(unet).random(0.6, seed=0)).requires_grad_(True)
    data, config = encoded_for(unet, num=12), FineTuneConfig(**SEARCH)
    inputs = (student, unet, forward_process(stub(unet).scheduler), data, data.training_pairs(), config, 0)
    objective = FineTuningObjective(*inputs, torch.device("cpu"))
    batch = objective.batch(0)
    with ExitStack() as stack:
        reads = stack.enter_context(Reads())
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        sum(objective.micro_loss(batch, torch.arange(6)).values()).backward()
    assert reads.found == []
