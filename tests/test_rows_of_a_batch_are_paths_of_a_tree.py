"""N-Grammys (arXiv 2411.03786) verifies k rows of w tokens as a batch. Merged into one tree they are fewer
rows of one call, which say the same: bit for bit where the graph is of our operators."""

import numpy as np
import pytest
from draftsmith.export.portable import export_onnx
from draftsmith.model.store import Checkpoint
from graph_session import GraphSession
from quantized import quantize_checkpoint

PROMPT, WIDTH, DEPTH, SLOTS = [5, 9, 2, 30, 7], 6, 4, 64


def merge(rows: list[list[int]]) -> tuple[list[int], list[int], list[list[int]]]:
    """(tokens of the tree, the parent of each or -1, the nodes on the path of each row)"""
    tokens: list[int] = []
    parents: list[int] = []
    paths = []
    for row in rows:
        node, path = -1, []
        for token in row:
            found = [i for i, parent in enumerate(parents) if parent == node and tokens[i] == token]
            if not found:
                tokens.append(token)
                parents.append(node)
            node = found[0] if found else len(tokens) - 1
            path.append(node)
        paths.append(path)
    return tokens, parents, paths


@pytest.mark.parametrize("graph", ["cpu.onnx", "model.onnx"])
@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
def test_both_give_the_same_logits(tiny_checkpoint, tmp_path, variant, weights, graph):
    source = tiny_checkpoint(variant)
    if weights == "int8":
        quantize_checkpoint(source, tmp_path / "int8")
        source = tmp_path / "int8"
    export_onnx(source, tmp_path / "out")
    rng = np.random.default_rng(1)
    few = rng.integers(0, Checkpoint(source).config.vocab_size, 3)  # so that rows begin alike
    rows = rng.choice(few, (WIDTH, DEPTH)).tolist()
    tokens, parents, paths = merge(rows)
    assert len(tokens) < WIDTH * DEPTH

    batch = GraphSession(tmp_path / "out" / graph, SLOTS, WIDTH)
    batch.run([PROMPT] * WIDTH, [0] * WIDTH)
    expected = batch.run(rows, [len(PROMPT)] * WIDTH)

    tree = GraphSession(tmp_path / "out" / graph, SLOTS)
    tree.run([PROMPT], [0])
    mask = np.zeros((1, len(tokens), SLOTS), bool)
    mask[:, :, : len(PROMPT)] = True
    depths = []
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[0, node] |= mask[0, parent]
        mask[0, node, len(PROMPT) + node] = True
        depths.append(len(PROMPT) + (depths[parent] - len(PROMPT) + 1 if parent >= 0 else 0))
    logits = tree.run([tokens], [len(PROMPT)], [depths], mask)[0]

    for row, path in enumerate(paths):
        if graph == "cpu.onnx":
            np.testing.assert_array_equal(logits[path], expected[row])
        else:
            np.testing.assert_allclose(logits[path], expected[row], atol=1e-4)
