"""The logits of a token are a function of its own path, bit for bit: not of how many rows share its call, of
the order or the slots in which a tree stands, of the number of threads, or of what was taken back."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import VARIANTS
from decoding import decode, draw_ids
from draftsmith.model.store import Checkpoint
from draftsmith.speculate.binding import check, ffi, lib
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.onnx_engine import OnnxEngine, OnnxRuntime, wanting_leaders
from draftsmith.speculate.settings import Sampling
from graph_session import GraphSession, entry_of
from peaks import find_peaks
from quantized import KINDS, export_kind

MAX_ROWS = 32
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def open_engine(folder: Path, threads: int, graph: str = "cpu.onnx") -> OnnxEngine:
    config = Checkpoint(folder / "checkpoint").config
    return OnnxEngine(folder.name, folder / graph, entry_of(config), OnnxRuntime(threads))


class Reader:
    """Tokens read one by one: what every other way of reading them must repeat."""

    def __init__(self, engine: OnnxEngine, room: int = 128) -> None:
        self.engine, self.room = engine, room

    def read(self, ids) -> np.ndarray:
        self.engine.reserve(self.room)
        return np.stack([self.engine.forward(ids[i : i + 1], i)[0].copy() for i in range(len(ids))])

    def read_in_chunks(self, ids, sizes) -> np.ndarray:
        self.engine.reserve(self.room)
        parts, start = [], 0
        for size in sizes:
            parts.append(self.engine.forward(ids[start : start + size], start).copy())
            start += size
        assert start == len(ids)
        return np.concatenate(parts)


def read_straight(folder: Path) -> list[int]:
    """What a node says of its graph's layers, if one does."""
    nodes = onnx.load(folder / "cpu.onnx", load_external_data=False).graph.node
    return [a.i for node in nodes for a in node.attribute if a.name == "straight"]


def read_peaks(engine: OnnxEngine, num_rows: int) -> np.ndarray:
    count = num_rows * -(-engine.vocab_size // lib.DS_PEAK_WIDTH)
    return np.frombuffer(ffi.buffer(engine.handle.peaks, 4 * count), np.float32).reshape(num_rows, -1)


@pytest.fixture(scope="module")
def folder(request, tiny_checkpoint, tmp_path_factory):
    variant, kind = request.param
    folder = tmp_path_factory.mktemp(f"{variant}-{kind.replace(':', '')}")
    source = request.getfixturevalue("smollm2") if variant == "smollm2" else tiny_checkpoint(variant)
    export_kind(source, kind, folder)
    return folder


# The int8 and int4 ones of qwen3 and gemma3-pattern keep their keys and values in bfloat16.
EVERY = [(variant, "int8") for variant in VARIANTS] + [("llama-bias", kind) for kind in KINDS]
EVERY += [("qwen3", "half"), ("qwen3", "int4")]
EVERY += [pytest.param(("smollm2", kind), marks=pytest.mark.slow) for kind in KINDS]
every = pytest.mark.parametrize("folder", EVERY, indirect=True, ids="-".join)


@every
def test_a_chunk_of_any_size_gives_the_bits_of_single_tokens(folder):
    engine = open_engine(folder, threads=1)
    reader, ids = Reader(engine), draw_ids(engine, 48)
    alone = reader.read(ids)
    for sizes in ([48], [1, 2, 3, 4, 5, 6, 7, 8, 12], [16, 32], [15, 1, 31, 1], [9, 10, 11, 13, 5]):
        assert np.array_equal(reader.read_in_chunks(ids, sizes), alone), sizes


@every
def test_two_threads_give_the_bits_of_one(folder):
    one, two = open_engine(folder, threads=1), open_engine(folder, threads=2)
    ids = draw_ids(one, 40)
    assert np.array_equal(Reader(two).read_in_chunks(ids, [32, 1, 7]), Reader(one).read(ids))


@every
def test_caches_that_pass_through_the_graph_give_the_bits_of_the_engines_own(folder):
    """An engine lends its operators one cache; any other session hands two tensors a layer in and out. Those
    are float32, as the engine's is where the graph says so."""
    model = onnx.load(folder / "cpu.onnx", load_external_data=False)
    for attribute in (a for node in model.graph.node for a in node.attribute if a.name == "cache_type"):
        attribute.i = lib.DS_CACHE_FLOAT32
    onnx.save(model, folder / "float32.onnx")
    engine = open_engine(folder, threads=1, graph="float32.onnx")
    reader, ids = Reader(engine), draw_ids(engine, 48)
    session = GraphSession(folder / "cpu.onnx", slots=reader.room)
    passed = [session.run(ids[None, start:end], [start])[0] for start, end in ((0, 33), (33, 34), (34, 48))]
    assert np.array_equal(np.concatenate(passed), reader.read_in_chunks(ids, [33, 1, 14]))


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this system gives no huge pages"
)
@every
def test_weights_in_huge_pages_give_the_bits_of_the_file(folder, monkeypatch):
    """Behind its first run an engine reads a copy of its weights, unless it is told to read the file."""
    engine = open_engine(folder, threads=2)
    ids = draw_ids(engine, 40)
    copied = Reader(engine).read_in_chunks(ids, [3, 1, 36])
    monkeypatch.setenv("DRAFTSMITH_HUGE_PAGES", "0")
    assert np.array_equal(Reader(open_engine(folder, threads=2)).read_in_chunks(ids, [3, 1, 36]), copied)


@every
def test_a_graph_says_whether_it_is_straight(folder):
    """Where something else than layers stands between tokens and logits, ONNX Runtime has to run it."""
    nodes = onnx.load(folder / "cpu.onnx", load_external_data=False).graph.node
    said = read_straight(folder)
    layers = [node for node in nodes if node.op_type == "Layer"]
    ours = [node.op_type for node in nodes if node.domain == "draftsmith"]
    others = [node.op_type for node in nodes if node.domain != "draftsmith"]
    alone = others == ["Neg", "Slice"] and len(ours) == len(layers) + 3 and nodes[-1].op_type == "Linear"
    assert said == ([len(layers)] if alone else [])
    assert said or not folder.name.startswith("llama-bias")


@every
def test_an_engine_gives_the_peaks_of_its_logits(folder):
    """Where ONNX Runtime runs the graph, in the first call at least, it gives none."""
    engine = open_engine(folder, threads=2)
    reader, ids = Reader(engine), draw_ids(engine, 24)
    reader.read_in_chunks(ids, [24])
    assert engine.handle.peaks == ffi.NULL
    straight = bool(read_straight(folder))
    for start, end, count in ((0, 17, 17), (17, 24, 1)):
        logits = engine.forward(ids[start:end], start, num_logits=count)
        assert (engine.handle.peaks != ffi.NULL) == straight
        if straight:
            assert np.array_equal(read_peaks(engine, count), find_peaks(logits))


class Silent:
    """The same engine without its peaks."""

    def __init__(self, engine: OnnxEngine) -> None:
        self.engine = engine
        self.vocab_size, self.max_seq_len = engine.vocab_size, engine.max_seq_len

    def reserve(self, num_slots: int) -> None:
        self.engine.reserve(num_slots)

    def forward(self, *args, **kwargs) -> np.ndarray:
        with wanting_leaders(self.engine):  # as the loop does for the engines it sees
            return self.engine.forward(*args, **kwargs)


@every
def test_peaks_change_nothing_that_is_drafted(folder):
    """They show the way to the largest logits, of which drafters learn and by which drafts end."""
    engines = {name: open_engine(folder, threads=2) for name in ("target", "int8")}
    silent = {name: Silent(engine) for name, engine in engines.items()}
    costs = {"target": [1 + 0.02 * n for n in range(40)], "int8": [0.3] * 40}
    two = [Rung("recycling", 4), Rung("int8", 8)]
    for rungs, prices in (([Rung("recycling-tree", 12)], None), (two[1:], costs), (two, costs)):
        for seed in range(3):
            prompt = draw_ids(engines["target"], 20, seed)
            outs = [decode(each, rungs, prompt, 60, costs=prices) for each in (engines, silent)]
            assert outs[0].blocks == outs[1].blocks
            assert outs[0].drafter.drafted == outs[1].drafter.drafted > 0


@every
def test_every_node_of_a_random_tree_gives_the_bits_of_its_path(folder):
    engine, rng = open_engine(folder, threads=2), np.random.default_rng(1)
    reader, prompt = Reader(engine), draw_ids(engine, 21)
    for _ in range(int(os.environ.get("DRAFTSMITH_TREES", "3"))):
        count = int(rng.integers(2, MAX_ROWS + 1))
        nodes = draw_ids(engine, count, int(rng.integers(1 << 30)))
        parents = [int(rng.integers(-1, node)) for node in range(count)]
        paths = []
        for node, parent in enumerate(parents):
            paths.append([*(paths[parent] if parent >= 0 else []), node])
        reader.read_in_chunks(prompt, [len(prompt)])
        seen = np.zeros((count, len(prompt) + count), bool)
        seen[:, : len(prompt)] = True
        for node, path in enumerate(paths):
            seen[node, [len(prompt) + i for i in path]] = True
        depths = np.array([len(prompt) + len(path) - 1 for path in paths])
        logits = engine.forward(nodes, len(prompt), depths, seen).copy()
        for node in rng.choice(count, min(count, 4), replace=False):
            alone = reader.read(np.concatenate((prompt, nodes[paths[node]])))
            assert np.array_equal(logits[node], alone[-1])


@every
def test_a_path_that_moved_together_gives_the_bits_of_a_chain(folder):
    engine, rng = open_engine(folder, threads=2), np.random.default_rng(2)
    reader, prompt = Reader(engine), draw_ids(engine, 21)
    nodes = draw_ids(engine, 20, 3)
    parents = [max(-1, node - 1 - int(rng.integers(0, 3))) for node in range(20)]
    path = [19]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    assert path[0] > 0 or path != list(range(len(path))), "slots must move for this to show anything"
    seen = np.zeros((20, 41), bool)
    seen[:, :21] = True
    depths = np.zeros(20, int)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node], depths[node] = seen[parent], depths[parent] + 1
        seen[node, 21 + node] = True
    reader.read_in_chunks(prompt, [21])
    engine.forward(nodes, 21, 21 + depths, seen)
    slots = ffi.new("int32_t[]", [21 + node for node in path])
    check(engine.handle.keep(engine.handle, 21, slots, len(path)))
    after = draw_ids(engine, 5, 4)
    moved = engine.forward(after, 21 + len(path)).copy()
    assert np.array_equal(moved, reader.read(np.concatenate((prompt, nodes[path], after)))[-5:])


@every
def test_decoding_over_trees_says_what_the_target_alone_says(folder):
    engine = open_engine(folder, threads=2)
    said, accepted = [], 0
    for name in (None, "recycling-tree", "suffix-tree", "suffix+recycling-tree"):
        decoder = build_ladder([Rung(name, MAX_ROWS - 1)] if name else [], lambda _: engine)
        decoder.begin(draw_ids(engine, 12).tolist(), 80, Sampling())
        said.append([token for block in iter(decoder.step, []) for token in block])
        accepted += decoder.counters(0).accepted if name else 0
    assert all(tokens == said[0] for tokens in said) and accepted > 4


@every
def test_rejected_tokens_leave_no_trace(folder):
    engine = open_engine(folder, threads=1)
    reader, ids = Reader(engine), draw_ids(engine, 40)
    alone = reader.read(ids)
    reader.read_in_chunks(ids[:20], [20])
    engine.forward((ids[20:36] + 1) % engine.vocab_size, 20)
    assert np.array_equal(engine.forward(ids[20:25], 20), alone[20:25])
    engine.forward((ids[25:28] + 1) % engine.vocab_size, 25)
    assert np.array_equal(engine.forward(ids[25:], 25), alone[25:])


@every
def test_how_much_room_the_cache_has_does_not_show(folder):
    engine = open_engine(folder, threads=1)
    ids = draw_ids(engine, 24)
    assert np.array_equal(Reader(engine, 64).read(ids), Reader(engine, 128).read(ids))


@pytest.mark.parametrize(
    ("folder", "layout"),
    [(("llama-bias", kind), layout) for kind, layout in zip(KINDS, range(6), strict=True)],
    indirect=["folder"],
)
def test_weights_are_stored_in_the_layout_of_their_kind(folder, layout):
    nodes = onnx.load(folder / "cpu.onnx", load_external_data=False).graph.node
    formats = {a.i for node in nodes for a in node.attribute if a.name.endswith("format")}
    assert formats - {2} == {layout} - {2}  # the head is never sparse
    assert layout in formats


@pytest.mark.parametrize("folder", [("llama-bias", "int8"), ("llama-bias", "int4")], indirect=True)
def test_every_instruction_set_gives_the_same_bits(folder, monkeypatch):
    ids = np.arange(30, dtype=np.int32)
    reference = Reader(open_engine(folder, threads=1)).read_in_chunks(ids, [30])
    for isa in ("avx2", "portable"):
        monkeypatch.setenv("DRAFTSMITH_ISA", isa)
        assert np.array_equal(Reader(open_engine(folder, threads=1)).read_in_chunks(ids, [30]), reference)
