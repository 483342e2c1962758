"""Interrupt a server, as Ctrl-C does, after its page was read."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.request import urlopen


@contextmanager
def interrupting() -> Iterator[tuple[Callable[[str], None], list[str]]]:
    """Yield a function `say` for the server's messages, and the list of all messages.

    `say` reads the page at an address in a message, and then sends SIGINT to this process.
    """
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        if address := re.search(r"http://\S+", text):
            with urlopen(address[0], timeout=20) as page:
                assert page.status == 200
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    try:
        yield say, told
    finally:
        signal.signal(signal.SIGINT, before)
