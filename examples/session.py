"""A program that uses v4sdk: load once, then generate, stream, chat, fork, and go on in a saved state.

python examples/session.py [CHECKPOINT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from v4sdk import SamplingParams, Session


def main(model: str | None) -> None:
    """Walk through the session's methods."""
    with Session.load(model) as session:
        print(
            f"backend {session.loaded.backend.name}, {session.numerics.name} numerics, {session.kv_format} KV"
        )

        result = session.chat([{"role": "user", "content": "What is 347 + 285?"}])
        print("chat:", result.content, f"({result.usage.completion_tokens} tokens, {result.finish_reason})")

        print("stream: ", end="")
        for piece in session.chat([{"role": "user", "content": "Sort: tea, jam, golf"}], stream=True):
            if piece.kind == "content":
                print(piece.text, end="", flush=True)
        print()

        short = SamplingParams(max_tokens=8, temperature=0.0)
        several = session.generate(["One", "Two, three"], short)
        print("raw, two at once:", [r.content for r in several])

        # a sequence keeps its state; a fork goes its own way from there
        sequence = session.sequence()
        session.generate("Once upon a time", short, sequence=sequence)
        twin = sequence.fork()
        first, second = (session.generate([], short, sequence=one) for one in (sequence, twin))
        print("fork goes on alike:", first.ids == second.ids)

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "story.safetensors"
            sequence.save(path)
            resumed = session.resume(path)
            same = (
                session.generate([], short, sequence=resumed).ids
                == session.generate([], short, sequence=sequence).ids
            )
            print("resumed goes on alike:", same)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
