"""Running a bundle needs nothing of what building one does; `import draftsmith` takes next to nothing."""

import subprocess
import sys
import time
from pathlib import Path

import draftsmith
import pytest
from fake_engine import write_bundle

TESTS = Path(__file__).parent
BUILD_ONLY = {"torch", "transformers", "onnx", "gguf", "huggingface_hub", "safetensors", "datasets"}

# Imports of what a runtime installation lacks fail, as they would there.
BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def run_python(code, blocked=()):
    prelude = BLOCK.replace("BLOCKED", repr(set(blocked))) if blocked else "import sys\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], cwd=TESTS, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_bundle_decodes_where_nothing_for_building_is_installed(tmp_path):
    pytest.importorskip("torch", reason="exporting needs draftsmith[build]")
    from tiny_bundle import write_tiny_bundle

    folder = write_tiny_bundle(tmp_path / "bundle")
    code = f"""
import draftsmith
bundle = draftsmith.load({str(folder)!r}, threads=1)
for speculate in ("none", "auto"):
    print(len(bundle.generate("to be or not", 12, speculate=speculate, ignore_eos=True).token_ids))
print(bundle.logits([1, 2, 3]).shape[1])
"""
    assert run_python(code, BUILD_ONLY | {"pydantic"}) == ["12", "12", "258"]


def test_the_runtime_imports_no_other_folder_of_the_house():
    code = """
import importlib, pkgutil, draftsmith.speculate as runtime
for module in pkgutil.iter_modules(runtime.__path__):
    importlib.import_module(f"draftsmith.speculate.{module.name}")
print(*sorted(name for name in sys.modules))
"""
    modules = run_python(code)
    loaded = {name.split(".")[0] for name in modules}
    assert not loaded & (BUILD_ONLY | {"onnxruntime"}), (
        "an engine's runtime is imported with the first engine"
    )
    houses = {name.split(".")[1] for name in modules if name.startswith("draftsmith.")}
    assert houses == {"speculate"}


def test_importing_the_package_imports_nothing_heavy():
    modules = run_python("import draftsmith; print(*sys.modules)")
    assert not {"numpy", "torch", "onnxruntime", "pydantic", "tokenizers", "cffi"} & set(modules)
    best = min(time_import() for _ in range(3))
    assert best < 0.5


def time_import():
    began = time.perf_counter()
    run_python("import draftsmith")
    return time.perf_counter() - began


def test_a_missing_onnx_runtime_names_the_extra(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    code = f"""
import draftsmith
try:
    draftsmith.load({str(folder)!r}).generate("a", 1)
except draftsmith.BundleError as error:
    print(error)
"""
    said = " ".join(run_python(code, {"onnxruntime"}))
    assert "pip install 'draftsmith[cpu]'" in said


def test_the_surface_is_what_it_says():
    assert {"load", "BundleError", "__version__"} <= set(dir(draftsmith))
    assert draftsmith.__version__.count(".") >= 1
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = draftsmith.lode
