"""The exported graph computes what transformers computes, for every family and every use of the cache."""

import numpy as np
import pytest
import torch
from conftest import VARIANTS
from draftsmith.export.portable import export_onnx
from draftsmith.model.load import load_model
from graph_session import GraphSession, error_of
from transformers import AutoModelForCausalLM

# Longer than every sliding window of the variants.
NUM_TOKENS = 40
SLOTS = 64
GRAPHS = ("model.onnx", "cpu.onnx")
BOUND = 2e-5  # measured worst: 4e-6


class Pair:
    """An exported graph and the model it was made from."""

    def __init__(self, folder, checkpoint, out, graph) -> None:
        export_onnx(checkpoint, out)
        self.graph = out / graph
        self.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        vocab = self.reference.config.vocab_size
        self.ids = np.random.default_rng(5).integers(0, vocab, (2, NUM_TOKENS))
        self.expected = self.logits_of(self.ids)

    def logits_of(self, ids) -> np.ndarray:
        with torch.no_grad():
            return self.reference(torch.as_tensor(np.asarray(ids))).logits.numpy()

    def session(self, batch=1) -> GraphSession:
        return GraphSession(self.graph, SLOTS, batch)


@pytest.fixture(
    scope="module", params=[(variant, graph) for variant in VARIANTS for graph in GRAPHS], ids=str
)
def pair(request, tiny_folder, tiny_checkpoint, tmp_path_factory) -> Pair:
    variant, graph = request.param
    return Pair(tiny_folder(variant), tiny_checkpoint(variant), tmp_path_factory.mktemp("graph"), graph)


def test_a_whole_prompt(pair):
    logits = pair.session(batch=2).run(pair.ids, [0, 0])
    assert logits.dtype == np.float32
    assert error_of(logits, pair.expected) < BOUND


@pytest.mark.parametrize("sizes", [[1] * NUM_TOKENS, [7] * 5 + [5], [17, 1, 1, 3, 2, 16]], ids=str)
def test_a_prompt_in_chunks(pair, sizes):
    session, logits, start = pair.session(), [], 0
    for size in sizes:
        logits.append(session.run(pair.ids[:1, start : start + size], [start]))
        start += size
    assert start == NUM_TOKENS
    assert error_of(np.concatenate(logits, 1), pair.expected[:1]) < BOUND


def test_rejected_tokens_leave_no_trace(pair):
    session, ids = pair.session(), pair.ids[:1]
    session.run(ids[:, :20], [0])
    session.run((ids[:, 20:31] + 1) % pair.reference.config.vocab_size, [20])
    accepted = session.run(ids[:, 20:23], [20])
    session.run((ids[:, 23:30] + 1) % pair.reference.config.vocab_size, [23])
    logits = np.concatenate((accepted, session.run(ids[:, 23:], [23])), 1)
    assert error_of(logits, pair.expected[:1, 20:]) < BOUND


def test_a_tree_gives_each_node_the_logits_of_its_path(pair):
    prompt, parents = 20, [-1, -1, 0, 0, 1, 2, 2, 4, 5, 8, 9]
    nodes = np.random.default_rng(1).integers(0, pair.reference.config.vocab_size, len(parents))
    paths = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    mask = np.zeros((1, len(parents), SLOTS), bool)
    mask[:, :, :prompt] = True
    for node, path in enumerate(paths):
        mask[0, node, [prompt + i for i in path]] = True
    session = pair.session()
    session.run(pair.ids[:1, :prompt], [0])
    depths = [prompt + len(path) - 1 for path in paths]
    logits = session.run(nodes[None], [prompt], [depths], mask)
    for node, path in enumerate(paths):
        expected = pair.logits_of([[*pair.ids[0, :prompt], *nodes[path]]])
        assert error_of(logits[0, node], expected[0, -1]) < BOUND


def test_sequences_of_a_batch_stand_at_different_lengths(pair):
    session, lengths = pair.session(batch=2), [20, 13]
    prompts = np.zeros((2, 20), np.int64)  # the shorter one is padded at its end, and the padding overwritten
    for row, length in enumerate(lengths):
        prompts[row, :length] = pair.ids[row, :length]
    session.run(prompts, [0, 0])
    rest = np.stack([pair.ids[row, length : length + 9] for row, length in enumerate(lengths)])
    logits = session.run(rest, lengths)
    for row, length in enumerate(lengths):
        assert error_of(logits[row], pair.expected[row, length : length + 9]) < BOUND


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["llama-tied", "gpt2", "gemma3_text"])
def test_half_precision_weights_are_computed_with_in_float32(variant, dtype, graph, tiny_folder, tmp_path):
    load_model(str(tiny_folder(variant)), dtype, tmp_path / "checkpoint", tmp_path)
    pair = Pair(tiny_folder(variant), tmp_path / "checkpoint", tmp_path / "out", graph)
    with torch.no_grad():
        for parameter in pair.reference.parameters():
            if parameter.ndim > 1:  # norms and biases are kept as they are
                parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    logits = pair.session(batch=2).run(pair.ids, [0, 0])
    assert error_of(logits, pair.logits_of(pair.ids)) < BOUND
    assert error_of(logits, pair.expected) > 10 * BOUND, "the weights were not rounded"
