"""onnxruntime-genai: its own model builder, its own n-gram lookup."""

import json
from pathlib import Path

import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]

MARGIN = 8  # drafted tokens need room behind the last one


def load(model: str, variant: str, speculate: bool, threads: int):
    path = Path(model) / "genai_config.json"
    written = json.loads(path.read_text())
    # In place of the end of text the last merge of the vocabulary: nothing ends before its time. In the file,
    # since an overlay adds to the list.
    written["model"]["eos_token_id"] = [written["model"]["vocab_size"] - 1]
    written["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(written, indent=2) + "\n")
    loaded = og.Model(model)

    def generate(ids, count, emit):
        params = og.GeneratorParams(loaded)
        params.set_search_options(do_sample=False, max_length=len(ids) + count + MARGIN)
        if speculate:
            params.set_speculative_options(ngram_size=3, max_draft_tokens=4)
        generator = og.Generator(loaded, params)
        generator.append_tokens(ids)
        left = count
        while left > 0 and not generator.is_done():
            generator.generate_next_token()
            tokens = [int(token) for token in generator.get_next_tokens()][:left]
            left -= len(tokens)
            emit(tokens)

    return generate
