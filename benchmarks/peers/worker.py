"""The other end of serve.py."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from contenders import Contender
from environments import HERE, Unavailable


@dataclass(frozen=True)
class Answer:
    ids: list[int]
    seconds: list[float]  # since the question; one a token

    @property
    def tokens_per_second(self) -> float:
        """Prefill included."""
        return len(self.ids) / self.seconds[-1]

    @property
    def decode_tokens_per_second(self) -> float:
        return (len(self.ids) - 1) / (self.seconds[-1] - self.seconds[0])


class Worker:
    """A contender in a process of its own. Raises Unavailable when that ends."""

    def __init__(self, contender: Contender, python: Path, model: Path, log: Path, threads: int) -> None:
        self.contender = contender
        self._log = log
        arguments = [
            contender.peer,
            str(model),
            contender.variant,
            str(int(contender.speculate)),
            str(threads),
        ]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), str(HERE / "serve.py"), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._read()

    def generate(self, ids: list[int], count: int) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": ids, "count": count}) + "\n")
        self._process.stdin.flush()
        answer = Answer(**self._read())
        if len(answer.ids) != count:
            raise Unavailable(f"gave {len(answer.ids)} tokens where {count} were wanted")
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise Unavailable(f"its process ended: {lines[-1][:200]}")
