"""Runs an exported graph in ONNX Runtime by the graph contract, with plain arrays."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from draftsmith.model.config import DecoderConfig
from draftsmith.speculate.binding import LIBRARY
from draftsmith.speculate.manifest import EngineEntry


def entry_of(config: DecoderConfig) -> EngineEntry:
    """What a manifest would say of a model's exported graph."""
    return EngineEntry(
        graph="cpu.onnx",
        vocab_size=config.vocab_size,
        max_seq_len=config.max_position_embeddings,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


def open_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # By default ONNX Runtime rounds the activations of weight-only linears to int8 as well.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.register_custom_ops_library(str(LIBRARY))
    options.log_severity_level = 3  # TensorScatter warns of every copy of a cache that is not bound in place
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class GraphSession:
    """A graph and its cache of `slots` slots for `batch` sequences."""

    def __init__(self, path: Path, slots: int, batch: int = 1) -> None:
        self.session = open_session(path)
        self.slots = slots
        self.cache = {
            value.name: np.zeros((batch, value.shape[1], slots, value.shape[3]), np.float32)
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def run(self, ids, write_index, positions=None, mask=None, num_logits=None) -> np.ndarray:
        """ids [B, S], write_index [B] → logits [B, S, V]. By default the tokens follow what stands before
        their first slot; `mask` is [B, S, S_max]."""
        ids, write_index = np.asarray(ids, np.int64), np.asarray(write_index, np.int64)
        slots = write_index[:, None] + np.arange(ids.shape[1])
        if mask is None:
            mask = np.arange(self.slots) <= slots[:, :, None]
        feeds = {
            "input_ids": ids,
            "position_ids": slots if positions is None else np.asarray(positions, np.int64),
            "write_index": write_index,
            "attention_mask": np.asarray(mask)[:, None],
            **self.cache,
        }
        if any(value.name == "num_logits" for value in self.session.get_inputs()):
            feeds["num_logits"] = np.array([num_logits or ids.shape[1]], np.int64)
        names = [name.replace("past_key_values", "present") for name in self.cache]
        logits, *present = self.session.run(["logits", *names], feeds)
        self.cache = dict(zip(self.cache, present, strict=True))
        return logits


def error_of(logits, reference) -> float:
    """Largest difference, relative to the largest reference value."""
    reference = np.asarray(reference)
    return float(np.abs(np.asarray(logits) - reference).max() / np.abs(reference).max())
