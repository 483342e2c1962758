"""The in-process backend: images equal the pipeline's, batches are per expert, every job is answered or refused."""

import asyncio
import pickle
import time

import pytest
from paced_drawer import PacedDrawer
from small_mixture import PROMPTS, write_mixture
from small_transformer_pipelines import write

from prunekit import PromptRoutedPipeline
from prunekit.models import load_pipeline
from prunekit.runtime.errors import UserError
from prunekit.serving import InProcessBackend, Job
from prunekit.serving.backend import DrawingError, Load, Refused, Running
from prunekit.serving.drawer import Drawer, open_pipeline
from prunekit.serving.in_process import FAILURES
from prunekit.serving.limits import ServerSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture") / "run", 2)


@pytest.fixture(scope="module")
def pipeline(run):
    return open_pipeline(run, None, "cpu")


@pytest.fixture
def drawer(pipeline):
    return PacedDrawer(pipeline)


@pytest.fixture(scope="module")
def by_expert(pipeline):
    """Return the prompts of each expert."""
    experts = pipeline.route(PROMPTS).tolist()
    return [[text for text, own in zip(PROMPTS, experts, strict=True) if own == expert] for expert in (0, 1)]


def job(drawer, prompt, seeds=(0,), steps=2, negative=None):
    return Job(prompt, tuple(seeds), steps, 2.0, drawer.size, negative)


async def ready(backend):
    await backend.start()
    while not backend.ready():
        assert backend.state() == "warming up"
        await asyncio.sleep(0.01)


async def until(condition):
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 30 s")


def running(work):
    """Run an asynchronous test."""
    asyncio.run(asyncio.wait_for(work, 120))


def test_jobs_are_what_the_pipeline_draws(drawer, pipeline):
    async def work():
        backend = InProcessBackend([drawer], "small", max_batch=1)
        await ready(backend)
        jobs = [job(drawer, text, (3, 4)) for text in PROMPTS[:6]] + [job(drawer, PROMPTS[0], negative="a dog")]
        answers = await asyncio.gather(*map(backend.draw, jobs))
        for own, answer in zip(jobs, answers, strict=True):
            several = {"seeds": own.seeds[0], "num_images_per_prompt": len(own.seeds)}
            expected = pipeline(own.prompt, own.negative_prompt, 2, 2.0, **several)
            assert [p.image.tobytes() for p in answer.pictures] == [image.tobytes() for image in expected.images]
            assert [p.seed for p in answer.pictures] == expected.seeds and answer.expert == expected.experts[0]
            assert [p.macs for p in answer.pictures] == expected.macs
            assert pickle.loads(pickle.dumps((own, answer))) == (own, answer)  # as if it were sent to another process
        await backend.drain()

    running(work())


def test_batches_have_one_expert_and_one_kind_of_settings(drawer, by_expert):
    first, second = by_expert

    async def work():
        backend = InProcessBackend([drawer], "small", max_batch=3)
        await ready(backend)
        drawer.hold()
        jobs = [job(drawer, first[0])]
        tasks = [asyncio.ensure_future(backend.draw(jobs[0]))]
        await asyncio.to_thread(drawer.wait)
        settings = [(text, 2, None) for text in (second[0], first[1], second[1], first[2], second[2], second[3])]
        settings += [(first[3], 3, None), (first[4], 2, "a dog"), (first[5], 2, "a cat")]
        for text, steps, negative in settings:
            tasks.append(asyncio.ensure_future(backend.draw(job(drawer, text, steps=steps, negative=negative))))
            await until(lambda: backend.load().waiting == len(tasks) - 1)
        assert backend.load() == Load(9, (Running(0, 1, 0, 2),))
        drawer.go.set()
        answers = await asyncio.gather(*tasks)
        assert backend.load() == Load(0, ())
        assert drawer.batches == [[first[0]], second[:3], first[1:3], [second[3]], [first[3]], first[4:6]]
        assert [answer.pictures[0].batch for answer in answers] == [1, 3, 2, 3, 2, 3, 1, 1, 2, 2]
        await backend.drain()

    running(work())


def test_who_leaves_is_dropped_and_a_batch_that_nobody_waits_for_stops(drawer, by_expert):
    first, second = by_expert

    async def work():
        backend = InProcessBackend([drawer], "small", max_batch=2)
        await ready(backend)
        drawer.hold()
        running = [asyncio.ensure_future(backend.draw(job(drawer, first[0], (0, 1), steps=50)))]
        await asyncio.to_thread(drawer.wait)
        leaving = asyncio.ensure_future(backend.draw(job(drawer, first[1], (0, 1, 2))))
        staying = asyncio.ensure_future(backend.draw(job(drawer, second[0])))
        await until(lambda: backend.load().waiting == 4)
        leaving.cancel()
        await until(lambda: backend.load().waiting == 1)
        running[0].cancel()
        await asyncio.sleep(0.05)
        drawer.go.set()
        assert (await staying).pictures[0].batch == 1
        assert drawer.steps == [1, 1, 2, 3]  # the first batch stopped after its first step
        assert drawer.batches == [[first[0]] * 2, [second[0]]]
        assert leaving.cancelled() and running[0].cancelled()
        # one of two clients leaves; the other gets its image
        drawer.hold()
        pair = [asyncio.ensure_future(backend.draw(job(drawer, text, steps=3))) for text in first[:1]]
        await asyncio.to_thread(drawer.wait)
        pair += [asyncio.ensure_future(backend.draw(job(drawer, text, steps=3))) for text in first[1:3]]
        await until(lambda: backend.load().waiting == 2)
        drawer.go.set()
        await pair[0]
        pair[1].cancel()
        assert len((await pair[2]).pictures) == 1
        await backend.drain()

    running(work())


def test_a_full_queue_refuses_whole_jobs(drawer, by_expert):
    async def work():
        backend = InProcessBackend([drawer], "small", max_batch=2, max_queued=3)
        await ready(backend)
        drawer.hold()
        tasks = [asyncio.ensure_future(backend.draw(job(drawer, by_expert[0][0])))]
        await asyncio.to_thread(drawer.wait)
        tasks.append(asyncio.ensure_future(backend.draw(job(drawer, by_expert[0][1], (0, 1)))))
        await until(lambda: backend.load().waiting == 2)
        with pytest.raises(Refused, match="2 images wait, and at most 3 may") as refusal:
            await backend.draw(job(drawer, by_expert[0][2], (0, 1)))
        assert 1 <= refusal.value.retry_after <= 60
        assert pickle.loads(pickle.dumps(refusal.value)).retry_after == refusal.value.retry_after
        tasks.append(asyncio.ensure_future(backend.draw(job(drawer, by_expert[1][0]))))
        await until(lambda: backend.load().waiting == 3)
        # several requests at once, accepted before their prompts were embedded
        tasks += [asyncio.ensure_future(backend.draw(job(drawer, text))) for text in by_expert[1][1:5]]
        await asyncio.sleep(0.2)
        drawer.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [len(answer.pictures) for answer in answers[:3]] == [1, 2, 1]
        assert all(isinstance(answer, Refused) for answer in answers[3:])
        await backend.drain()

    running(work())


def test_draining_answers_what_was_accepted(drawer):
    async def work():
        backend = InProcessBackend([drawer], "small", max_batch=2)
        await ready(backend)
        drawer.hold()
        tasks = [asyncio.ensure_future(backend.draw(job(drawer, text))) for text in PROMPTS[:8]]
        await asyncio.to_thread(drawer.wait)
        draining = asyncio.ensure_future(backend.drain())
        await until(lambda: backend.state() == "draining")
        with pytest.raises(Refused, match="about to end"):
            await backend.draw(job(drawer, PROMPTS[0]))
        assert not draining.done()
        drawer.go.set()
        assert all(answer.pictures for answer in await asyncio.gather(*tasks))
        await draining
        assert not any(thread.is_alive() for thread in backend._threads)

    running(work())


def test_a_fault_fails_its_own_image_alone(drawer, by_expert, caplog):
    texts = by_expert[0][:4]

    async def work():
        backend = InProcessBackend([drawer], "small", max_batch=4)
        await ready(backend)
        drawer.hold()
        drawer.faults = {texts[2]: RuntimeError("a fault of the device"), texts[3]: UserError("not this one")}
        tasks = [asyncio.ensure_future(backend.draw(job(drawer, text))) for text in by_expert[1][:1] + texts]
        await until(lambda: backend.load().waiting == 4)
        drawer.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[3], DrawingError) and "a fault of the device" in caplog.text
        assert isinstance(answers[4], UserError)
        assert all(len(answers[row].pictures) == 1 for row in (0, 1, 2)) and backend.ready()
        for _ in range(3):
            with pytest.raises(DrawingError):
                await backend.draw(job(drawer, texts[2]))
        assert backend.state() == "failing"
        await backend.draw(job(drawer, texts[0]))
        assert backend.ready()
        for _ in range(3):
            with pytest.raises(UserError, match="not this one"):  # the pipeline's error about the request
                await backend.draw(job(drawer, texts[3]))
        assert backend.ready()
        await backend.drain()

    running(work())


def test_two_devices_share_one_queue(run, drawer):
    second = PacedDrawer(open_pipeline(run, None, "cpu"))

    async def work():
        backend = InProcessBackend([drawer, second], "small", max_batch=1)
        await ready(backend)
        for one in (drawer, second):
            one.hold()
        tasks = [asyncio.ensure_future(backend.draw(job(drawer, text))) for text in PROMPTS[:6]]
        for one in (drawer, second):
            await asyncio.to_thread(one.wait)
        assert len(backend.load().running) == 2
        for one in (drawer, second):
            one.go.set()
        answers = await asyncio.gather(*tasks)
        assert sorted(drawer.batches + second.batches) == sorted([text] for text in PROMPTS[:6])
        expected = PromptRoutedPipeline.from_pretrained(run, device="cpu")
        for text, answer in zip(PROMPTS[:6], answers, strict=True):
            own = expected(text, num_inference_steps=2, guidance_scale=2.0, seeds=0)
            assert own.images[0].tobytes() == answer.pictures[0].image.tobytes()
        await backend.drain()

    running(work())


def test_it_can_be_ended_while_it_warms_up(pipeline):
    async def work():
        backend = InProcessBackend([Drawer(pipeline)], "small")
        await backend.start()
        await backend.drain()
        assert backend.state() == "draining"

    started = time.monotonic()
    running(work())
    assert time.monotonic() - started < 60


def test_a_model_that_cannot_draw_one_step_warms_up_and_refuses_one_step(tmp_path):
    drawer = Drawer(open_pipeline(write(tmp_path / "model", "pixart", load_pipeline("emoji")), None, "cpu"))
    drawer.size = (16, 16)

    async def work():
        backend = InProcessBackend([drawer], "small")
        await ready(backend)
        assert backend._failures == [0]
        for _ in range(FAILURES):
            with pytest.raises(UserError, match="num_inference_steps=1"):
                await backend.draw(job(drawer, "red apple", steps=1))
        assert backend.ready() and len((await backend.draw(job(drawer, "red apple"))).pictures) == 1
        await backend.drain()

    running(work())


def test_opened_by_settings(run, tmp_path):
    settings = ServerSettings(devices=("cpu", "cpu"), deterministic=True, max_resident=1)
    backend = InProcessBackend.open(run, settings)
    assert backend.served.name == "run" and backend.served.num_experts == 2
    assert backend._queue.max_batch == 1 and len(backend._drawers) == 2
    with pytest.raises(FileNotFoundError, match="not a directory"):
        InProcessBackend.open(tmp_path / "nowhere", settings)
    with pytest.raises(UserError, match="raise --max-queued"):
        ServerSettings(max_queued=5)
    with pytest.raises(UserError, match="the API key is empty"):
        ServerSettings(api_key=" ")
