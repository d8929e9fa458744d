"""A checkpoint as ONNX: `model.onnx` for any runtime, `cpu.onnx` for our kernels on the CPU.

`model.onnx` consists of standard operators. Both have these inputs and outputs:

    input_ids       int64 [B, S]           new tokens: a chunk of the prompt, a chain, or a flattened tree
    position_ids    int64 [B, S]           depth in the sequence (siblings of a tree share one)
    write_index     int64 [B]              the first slot of the cache that this call writes
    attention_mask  bool [B, 1, S, S_max]  which slots each new token sees, its own included
    past_key_values.N.key, .value          float32 [B, H_kv, S_max, D]; returned as present.N.key, .value
    logits          float32 [B, S, V]

Along every path of a tree slots ascend. Slots that nobody sees may hold anything finite. `cpu.onnx` has one
more input, `num_logits` int64 [1]: logits come for the last `num_logits` tokens only.
"""

from pathlib import Path

from ..model.progress import Progress, no_progress
from ..model.store import Checkpoint
from .cache_dtype import WantedDtype, check_cache_dtype
from .cpu import build_cpu_graph, choose_cache_dtype
from .decoder import build_graph
from .onnx_files import WeightFile, write_model
from .weights import store_model

PORTABLE, WEIGHTS = "model.onnx", "model.data"
CPU, PACKED = "cpu.onnx", "cpu.data"


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    max_seq_len: int | None = None,
    kv_cache_dtype: WantedDtype = "auto",
    progress: Progress = no_progress,
) -> dict[str, object]:
    """Write the graphs of `checkpoint` and their weights into the folder `out`.

    In `model.onnx` int8 linears are static Q/DQ, the form that TensorRT takes: int8 activations where the
    checkpoint has a scale for them, float elsewhere. `cpu.onnx` scales the activations of every token by
    themselves, and keeps keys and values as `kv_cache_dtype` says (`choose_cache_dtype`); `model.onnx` keeps
    float32. A sequence may get as long as the model allows, or `max_seq_len` if that is less.

    Returns `graph` (for the CPU) and `portable`, both file names in `out`, `max_seq_len`, `kv_cache_dtype`;
    of a head with a screen, `screened_bytes`; of one that knows only some tokens, `draft_vocab_size`.
    Raises ModelError where the checkpoint is not complete, or does not fit such a cache.
    """
    source = Checkpoint(checkpoint)
    longest = source.config.max_position_embeddings
    num_positions = min(max_seq_len or longest, longest)
    check_cache_dtype(source.config, kv_cache_dtype)
    with WeightFile(out / WEIGHTS) as weights, WeightFile(out / PACKED) as packed:
        model = store_model(source, weights, packed, num_positions, progress)
    write_model(build_graph(model, weights).model(), out / PORTABLE)
    cache_dtype = choose_cache_dtype(model, kv_cache_dtype)
    write_model(build_cpu_graph(model, weights, packed, cache_dtype).model(), out / CPU)
    written: dict[str, object] = {
        "graph": CPU,
        "portable": PORTABLE,
        "max_seq_len": num_positions,
        "kv_cache_dtype": cache_dtype,
    }
    if screened := model.packed_head.screened_bytes:
        written["screened_bytes"] = screened
    return written | ({"draft_vocab_size": model.packed_head.n} if model.has_cut_head else {})
