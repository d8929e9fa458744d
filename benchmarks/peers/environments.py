"""An environment for each peer, with the versions that its requirements.txt pins."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


class Unavailable(Exception):
    """A peer cannot take part; says why."""


def make_environment(peer: str, work: Path) -> Path:
    """The Python of a peer's environment, made at the first call. Ours is the one that runs this."""
    requirements = HERE / peer / "requirements.txt"
    if not requirements.exists():
        return Path(sys.executable)
    folder = work / peer / "venv"
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if not stamp.exists() or stamp.read_bytes() != requirements.read_bytes():
        print(f"installing {peer}", file=sys.stderr)
        run([sys.executable, "-m", "venv", "--clear", str(folder)], work)
        run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], work)
        stamp.write_bytes(requirements.read_bytes())
    return python


def run(command: list[str], work: Path, timeout: float = 3600) -> None:
    """Raises Unavailable with the last line of what a failed command said."""
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{' '.join(command[:4])} took more than {timeout:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["said nothing"]
        raise Unavailable(f"{' '.join(command[:4])} failed: {lines[-1][:200]}")
