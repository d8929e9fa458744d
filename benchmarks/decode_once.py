"""Opens a bundle, decodes once and prints what memory that took, as JSON. It imports nothing else.

python decode_once.py BUNDLE LADDER PROMPT_TOKENS NEW_TOKENS
"""

import json
import sys
from pathlib import Path

import draftsmith


def main() -> None:
    folder, speculate, prompt_tokens, new_tokens = sys.argv[1:]
    before = read_status("VmHWM")
    bundle = draftsmith.load(folder)
    bundle.generate([1] * int(prompt_tokens), int(new_tokens), speculate=speculate, ignore_eos=True)
    found = {"before": before, "peak": read_status("VmHWM"), "anonymous": read_status("RssAnon")}
    print(json.dumps(found | {"ladder": bundle.plan_for(speculate)["ladder"]}))


def read_status(field: str) -> int:
    """Bytes, of this process as the kernel counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


if __name__ == "__main__":
    main()
