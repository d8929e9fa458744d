"""The exported graph computes what transformers computes, for every family and every use of the cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VARIANTS
from draftsmith.export.portable import export_onnx
from draftsmith.model.load import load_model
from draftsmith.model.store import Checkpoint
from draftsmith.pipeline.gate_prompts import DEFAULT_PROMPTS
from graph_session import GraphSession, error_of
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

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


def greedy_tokens(reference: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    with torch.inference_mode():
        ids = reference.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=-1
        )
    return ids[0, len(prompt) :].tolist()


def greedy_choices(session: GraphSession, prompt: list[int], tokens: list[int]) -> list[int]:
    """What the graph chooses in the place of each of `tokens`: the same, where it decodes them itself."""
    logits = session.run([[*prompt, *tokens[:-1]]], [0])[0]
    return logits[len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.slow
def test_a_real_model_decodes_the_tokens_of_transformers(smollm2, tmp_path):
    """The portable graph, that engines for GPUs are built from."""
    export_onnx(smollm2, tmp_path)
    reference = make_smollm2(smollm2)
    session = GraphSession(tmp_path / "model.onnx", 256)
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    for line in DEFAULT_PROMPTS.read_text().splitlines():
        prompt = tokenizer.encode(json.loads(line)["turns"][0]).ids
        tokens = greedy_tokens(reference, prompt, 48)
        assert greedy_choices(session, prompt, tokens) == tokens


def make_smollm2(folder: Path) -> torch.nn.Module:
    """transformers' own, with the weights of a checkpoint."""
    source = Checkpoint(folder)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    tensors = source.load_embed() | source.load_head()
    for layer in range(config.num_hidden_layers):
        named = source.load_layer(layer).items()
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in named}
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    return model
