"""A drawer that waits before each step until it may go on, so that a test decides when a batch is finished."""

import threading

from prunekit.serving.drawer import Drawer


class PacedDrawer(Drawer):
    """Draws as every drawer; `go` lets it make steps, `batches` lists the prompts of each batch that it began."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.go, self.began = threading.Event(), threading.Semaphore(0)
        self.go.set()
        self.batches: list[list[str]] = []
        self.steps: list[int] = []
        self.faults: dict[str, Exception] = {}  # what prompts raise

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
        """Make no further step until `go` is set, and forget what was seen so far."""
        self.go.clear()
        self.began = threading.Semaphore(0)
        self.batches.clear()
        self.steps.clear()

    def wait(self):
        """Wait until another batch has begun."""
        assert self.began.acquire(timeout=60)
