"""Engines of one runtime do not disturb one another, from whichever threads they are called, and leave
nothing behind when they are closed."""

import os
import subprocess
import sys
from threading import Barrier, Thread

import numpy as np
import pytest
from draftsmith.export.portable import export_onnx
from draftsmith.speculate.onnx_engine import OnnxEngine, OnnxRuntime
from graph_session import entry_of
from tiny_bundle import CONFIG, write_tiny_bundle, write_tiny_checkpoint

WIDER = CONFIG.model_copy(
    update={"hidden_size": 112, "intermediate_size": 176, "num_layers": 3, "num_heads": 6}
)
ROUNDS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    for name, config, quantized in (("narrow", CONFIG, False), ("wide", WIDER, True)):
        write_tiny_checkpoint(folder / f"{name}.checkpoint", quantized, config)
        (folder / name).mkdir()
        export_onnx(folder / f"{name}.checkpoint", folder / name)
    return folder


def open_engine(folder, name, runtime):
    config = CONFIG if name == "narrow" else WIDER
    return OnnxEngine(name, folder / name / "cpu.onnx", entry_of(config), runtime)


def decode(engine, seed) -> np.ndarray:
    """The logits of a prompt, of a few calls of every size after it, and of one that takes some back."""
    rng = np.random.default_rng(seed)
    engine.reserve(int(rng.integers(64, 300)))
    rows, start = [], 0
    for count in (int(rng.integers(1, 40)), 1, 5, 2):
        rows.append(engine.forward(rng.integers(0, engine.vocab_size, count).astype(np.int32), start).copy())
        start += count
    rows.append(engine.forward(np.array([7, 8], np.int32), start - 3).copy())
    return np.concatenate(rows)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_threads_get_what_one_engine_alone_gives(folder, threads):
    wanted = {}
    for name in ("narrow", "wide"):
        engine = open_engine(folder, name, OnnxRuntime(threads))
        wanted[name] = [decode(engine, seed) for seed in range(ROUNDS)]

    runtime = OnnxRuntime(threads)
    together, same = Barrier(2, timeout=60), {}

    def work(name):
        together.wait()
        engine = open_engine(folder, name, runtime)
        same[name] = [np.array_equal(decode(engine, seed), wanted[name][seed]) for seed in range(ROUNDS)]

    workers = [Thread(target=work, args=(name,)) for name in wanted]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert same == {name: [True] * ROUNDS for name in wanted}


def test_an_error_in_one_thread_is_not_seen_in_the_other(folder):
    """Words belong to the thread that failed, although both engines fail over and over."""
    runtime = OnnxRuntime(1)
    engines = {name: open_engine(folder, name, runtime) for name in ("narrow", "wide")}
    together, words = Barrier(2, timeout=60), {name: set() for name in engines}

    def fail(name, slots):
        together.wait()
        for _ in range(300):
            try:
                engines[name].forward(np.array([1], np.int32), slots)
            except Exception as error:
                words[name].add(str(error))

    workers = [Thread(target=fail, args=(name, 10 + i)) for i, name in enumerate(engines)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    for i, name in enumerate(engines):
        (said,) = words[name]
        assert name in said and f"slot {10 + i}" in said


OPENINGS = """
import os, sys, time
from pathlib import Path
from draftsmith.speculate.bundle import load

def count(): # MiB of memory that is no file's, and threads
    (line,) = (l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) / 1024, len(os.listdir("/proc/self/task"))

def use():
    bundle = load(sys.argv[1], threads=2)
    bundle.generate([1, 2, 3], 8, speculate=["suffix", "int8"], ignore_eos=True)

for _ in range(10):
    use()
before = count()
for _ in range(50):
    use()
for _ in range(100): # a thread that was joined is listed until the kernel has cleared it away
    after = count()
    if after[1] <= before[1]:
        break
    time.sleep(0.1)
print(*(now - was for was, now in zip(before, after)))
"""


def test_opening_and_closing_fifty_times_costs_no_memory_and_no_threads(tmp_path):
    """In a process of its own, whose memory nobody else moves, and with an allocator that gives back at once
    what is freed and has one arena: else what it keeps depends on which threads happen to meet in it."""
    folder = write_tiny_bundle(tmp_path / "bundle")
    command = [sys.executable, "-c", OPENINGS, folder]
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **allocator}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    megabytes, threads = map(float, done.stdout.split())
    assert threads == 0 and megabytes < 3, (megabytes, threads)
