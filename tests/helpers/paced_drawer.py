"""A drawer that waits before each step, so that a test decides when a batch is finished."""

import threading

from prunekit.serving.drawer import Drawer


class PacedDrawer(Drawer):
    """A drawer that makes steps only while `go` is set; `batches` lists the prompts of each batch that it began."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.go, self.began = threading.Event(), threading.Semaphore(0)
        self.go.set()
        self.batches: list[list[str]] = []
        self.steps: list[int] = []
        self.faults: dict[str, Exception] = {}  # error to raise, by prompt

    def draw(self, prompts, seeds, expert, steps, guidance, negative_prompts=None, size=None, on_step=None):
        if on_step is None:  # the warm-up
            return super().draw(prompts, seeds, expert, steps, guidance, negative_prompts, size)
        self.batches.append(list(prompts))
        self.began.release()
        assert self.go.wait(60)
        for fault in (self.faults[prompt] for prompt in prompts if prompt in self.faults):
            raise fault

        def paced(step, steps):
            assert self.go.wait(60)
            self.steps.append(step)
            on_step(step, steps)

        return super().draw(prompts, seeds, expert, steps, guidance, negative_prompts, size, paced)

    def hold(self):
        """Stop before the next step until `go` is set, and clear the recorded batches and steps."""
        self.go.clear()
        self.began = threading.Semaphore(0)
        self.batches.clear()
        self.steps.clear()

    def wait(self):
        """Wait until another batch has begun."""
        assert self.began.acquire(timeout=60)
