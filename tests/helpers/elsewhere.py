"""An executor that runs each piece as another node would: from a call that was converted to JSON text and back."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from prunekit.runtime.executors import Call, OnePiece
from prunekit.runtime.progress import Saying
from prunekit.runtime.work import Piece


class Elsewhere:
    """Runs pieces one after another; `calls` counts the pieces per function, `said` collects their messages."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.said: list[str] = []

    def map(self, pieces: Sequence[Piece], locks: Path, call: Call, wait: bool = True) -> None:
        """Run the pieces that are not done."""
        text = json.dumps({"function": call.function, "arguments": call.arguments})
        for position, piece in enumerate(pieces):
            if not piece.done():
                assert piece.ready()
                one = OnePiece(piece.name, position, Saying(self.said.append))
                Call(**json.loads(text))(one)
                assert not one.taken
                self.calls[call.function] = self.calls.get(call.function, 0) + 1

    def together(self) -> nullcontext:
        """Change nothing."""
        return nullcontext()
