"""The key of a measurement in the cache names a number of threads: the one that was measured with."""

import numpy as np
import pytest
from draftsmith.pipeline import bench, check, run, stage, tune
from draftsmith.pipeline.processor import num_threads
from draftsmith.pipeline.recipe import Speculate
from draftsmith.speculate import bundle as bundle_module
from safetensors.numpy import save_file


class Opened(Exception):
    pass


@pytest.fixture
def opened(monkeypatch):
    """Opening a bundle ends the test with the number of threads."""

    def load(path, threads=None, *_):
        raise Opened(threads)

    for module in (tune, check, bench):
        monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(bundle_module, "Bundle", load)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")


@pytest.fixture
def tokens(tmp_path):
    save_file({"tokens": np.zeros((2, 128), np.int32)}, tmp_path / "tokens.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "measure",
    [
        lambda folder: tune.tune(folder, folder, Speculate(), folder),
        lambda folder: check.check(folder, {}, folder, folder),
        lambda folder: bench.bench_stage(folder, folder, folder),
    ],
)
def test_stages(opened, tokens, measure):
    with pytest.raises(Opened) as caught:
        measure(tokens)
    task = stage.Task(stage.Stage("x", test_stages, (), measured=True))
    recorded = stage.describe_inputs(task, {}, None)["machine"]["threads"]
    assert caught.value.args == (recorded,) == (3,)


@pytest.mark.parametrize(("threads", "expected"), [(None, 3), (2, 2), (0, 0)])
def test_verbs_follow_unless_told_otherwise(opened, tmp_path, threads, expected):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n")
    where = {"threads": threads, "device": "cpu"}
    for verb in (
        lambda: run.generate(tmp_path, "Hello", chat=False, quiet=True, speculate="auto", **where),
        lambda: run.bench(tmp_path, prompts, limit=None, speculate="auto", json_out=None, **where),
        lambda: run.evaluate(tmp_path, None, prompts, **where),
    ):
        with pytest.raises(Opened) as caught:
            verb()
        assert caught.value.args == (expected,)


@pytest.mark.parametrize("value", ["", "0", "-1", "2,2", "many"])
def test_what_is_no_number_of_threads_means_all_cores(monkeypatch, value):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert num_threads() == cores
