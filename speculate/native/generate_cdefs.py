"""Turn the public C headers into the module through which cffi calls the library.

Usage: generate_cdefs.py HEADER... OUTPUT. Runs once, when the wheel is built, so that importing parses
nothing.
"""

import re
import sys
from pathlib import Path

import cffi


def read_declarations(header: str) -> str:
    """The header without what cffi does not read: comments, preprocessor lines, C++ guard, export mark."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.S)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return text.replace("DS_API ", "")


def main() -> None:
    *headers, output = map(Path, sys.argv[1:])
    ffi = cffi.FFI()
    for header in headers:
        ffi.cdef(read_declarations(header.read_text()))
    ffi.set_source("_cdefs", None)
    ffi.emit_python_code(str(output))


main()
