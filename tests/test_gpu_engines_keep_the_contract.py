"""What of the GPU engines shows without a GPU: what is said where one is missing, and that what they hand to
TensorRT and ONNX Runtime is right. Memory, graphs and TensorRT itself are stand-ins."""

import hashlib
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from device_stand_ins import Context, Graph, Memory, Stream
from draftsmith.export.portable import export_onnx
from draftsmith.model.store import Checkpoint
from draftsmith.speculate import bundle as bundles
from draftsmith.speculate import cuda, devices, driver, engines, onnx_gpu_engine, tensorrt_engine
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.manifest import EngineEntry, TensorrtEntry
from draftsmith.speculate.onnx_gpu_engine import RTX, OnnxGpuEngine, check_provider, provider_options
from fake_engine import FakeEngine, write_bundle
from graph_session import GraphSession, entry_of

PLAN = TensorrtEntry(
    file="engines/sm89.trt",
    builder="tensorrt_rtx 1.7.1.116",
    compute_capability=("8.0", "8.9"),
    precision="bfloat16",
    rows=(1, 4, 16),
    max_seq_len=48,
    num_slots=64,
)
ENTRY = EngineEntry(
    graph="cpu.onnx",
    portable="model.onnx",
    vocab_size=50,
    max_seq_len=100,
    num_layers=2,
    num_kv_heads=1,
    head_dim=4,
    tensorrt=(PLAN,),
)
ADA = driver.Gpu("RTX 4090", "8.9", 24 << 30)


# ---- What is missing is named ------------------------------------------------------------------------

DRIVER_OF_ONE_GPU = """
int cuInit(unsigned f) { return STATUS; }
int cuDeviceGetCount(int *n) { *n = COUNT; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { s[0] = 'G'; s[1] = 0; return 0; }
int cuDeviceTotalMem_v2(unsigned long *m, int d) { *m = 1ul << 34; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 12 : 0; return 0; }
int cuDriverGetVersion(int *v) { *v = 13010; return 0; }
int cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_NO_DEVICE"; return 0; }
"""


@pytest.mark.parametrize(
    ("status", "count", "gpus", "why"),
    [
        (0, 1, [driver.Gpu("G", "12.0", 1 << 34)], ""),
        (0, 0, [], "the NVIDIA driver sees no GPU"),
        (100, 0, [], "the NVIDIA driver gives error 100 (CUDA_ERROR_NO_DEVICE)"),
    ],
)
def test_gpus_are_found_through_the_driver_alone(tmp_path, monkeypatch, status, count, gpus, why):
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile a stand-in for the driver with")
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text(DRIVER_OF_ONE_GPU.replace("STATUS", str(status)).replace("COUNT", str(count)))
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(driver, "DRIVER", str(library))
    assert driver.find_gpus() == (gpus, why)
    assert driver.supported_cuda() == 13010


@pytest.mark.parametrize(
    ("supported", "why"), [(12080, "CUDA 12.8 and the CUDA kernels need 13.0: install"), (13000, "")]
)
def test_a_driver_too_old_for_the_kernels_is_named(tmp_path, monkeypatch, supported, why):
    library = SimpleNamespace(ds_cuda_runtime_version=lambda: 13000)
    monkeypatch.setattr(cuda, "find_gpus", lambda: ([ADA], ""))
    monkeypatch.setattr(cuda, "supported_cuda", lambda: supported)
    monkeypatch.setattr(cuda, "open_library", lambda: (None, library))
    (tmp_path / "file").touch()
    monkeypatch.setattr(cuda, "find_library", lambda: tmp_path / "file")
    assert why in cuda.why_no_cuda() and bool(cuda.why_no_cuda()) == bool(why)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setattr(driver, "DRIVER", "libcuda.so.nowhere")
    assert driver.find_gpus() == ([], "no NVIDIA driver: libcuda.so.nowhere is not found")


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpu=…, missing=…, tensorrt=…, onnx=…)`: what this machine seems to have."""

    def seem(missing="", gpu=ADA, tensorrt="1.7.1.116", onnx=""):
        monkeypatch.setattr(devices, "why_no_cuda", lambda: missing)
        monkeypatch.setattr(devices, "find_gpus", lambda: ([gpu], ""))
        monkeypatch.setattr(devices, "find_spec", lambda name: tensorrt or None)
        monkeypatch.setattr(devices, "installed_version", lambda name: tensorrt)
        monkeypatch.setattr(devices, "why_not_onnx", lambda entry, provider="": onnx)

    return seem


def test_auto_takes_the_gpu_only_for_engines_that_run_there(machine):
    machine()
    assert devices.choose_device("auto", [ENTRY]) == ("cuda", "")
    assert devices.choose_device("auto", [msgspec.structs.replace(ENTRY, tensorrt=())]) == ("cpu", "")
    assert devices.choose_device("cpu", [ENTRY]) == ("cpu", "")
    machine(missing="no NVIDIA driver: libcuda.so.1 is not found")
    assert devices.choose_device("auto", [ENTRY]) == ("cpu", "no NVIDIA driver: libcuda.so.1 is not found")


@pytest.mark.parametrize(
    ("seems", "said"),
    [
        (
            {"missing": "no NVIDIA driver: x"},
            r"device cuda: no NVIDIA driver: x; --device cpu runs this bundle",
        ),
        (
            {"gpu": driver.Gpu("H100", "9.0", 1)},
            r"no TensorRT engine for H100: build with compute_capability 9\.0; none",
        ),
        ({"tensorrt": ""}, r"tensorrt_rtx is not installed: pip install 'tensorrt-rtx-cu13==1\.7\.1\.116'"),
        (
            {"tensorrt": "1.8.0"},
            r"are of tensorrt_rtx 1\.7\.1\.116 and 1\.8\.0 is installed: .*or build again",
        ),
    ],
)
def test_cuda_is_refused_in_one_line_that_names_what_is_missing(machine, seems, said):
    machine(onnx="none", **seems)
    with pytest.raises(BundleError, match=said) as refused:
        devices.choose_device("cuda", [ENTRY])
    assert "\n" not in str(refused.value)
    machine(**seems)
    if "missing" not in seems:
        assert devices.choose_device("cuda", [ENTRY]) == ("cuda", ""), "ONNX Runtime can run it"


def test_a_bundle_says_why_it_runs_on_the_cpu_and_takes_devices_by_engine(tmp_path, monkeypatch):
    built = msgspec.to_builtins(PLAN)
    (tmp_path / "engines").mkdir()
    folder = write_bundle(tmp_path, {"target": {"tensorrt": [built]}, "int8": {}})
    (folder / "engines" / "sm89.trt").write_bytes(b"plan")
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "no NVIDIA driver: x")
    with pytest.raises(BundleError, match=r"lists no hash for engines/sm89\.trt"):
        bundles.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["engines/sm89.trt"] = {"sha256": "0" * 64, "size": 4}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="runs on the CPU: no NVIDIA driver: x"):
        assert bundles.load(folder).devices == {"target": "cpu", "int8": "cpu"}
    assert bundles.load(folder, device={"target": "cpu"}).why_cpu == ""
    with pytest.raises(BundleError, match="device cuda: no NVIDIA driver: x"):
        bundles.load(folder, device={"target": "cuda", "int8": "cpu"})
    with pytest.raises(
        BundleError, match="device names 'tiny', which this bundle has not; only target, int8"
    ):
        bundles.load(folder, device={"tiny": "cpu"})


def test_a_plan_that_was_damaged_or_does_not_load_is_named(tmp_path, monkeypatch):
    (tmp_path / "engines").mkdir()
    folder = write_bundle(tmp_path, {"target": {"tensorrt": [msgspec.to_builtins(PLAN)]}, "int8": {}})
    plan, sha256 = folder / "engines" / "sm89.trt", hashlib.sha256(b"plan").hexdigest()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["engines/sm89.trt"] = {"sha256": sha256, "size": 4}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(devices, "why_no_cuda", lambda: "")
    monkeypatch.setattr(devices, "why_not_builder", lambda builder: "")
    monkeypatch.setattr(tensorrt_engine, "why_not_builder", lambda builder: "")
    for module in (devices, engines):
        monkeypatch.setattr(module, "find_gpus", lambda: ([ADA], ""))
    plan.write_bytes(b"paln")
    bundle = bundles.load(folder, device={"target": "cuda", "int8": "cpu"})
    with pytest.raises(BundleError, match=r"engines/sm89\.trt was changed: its SHA-256 is"):
        bundle.engine("target")
    plan.write_bytes(b"plan")
    refusing = SimpleNamespace(deserialize_cuda_engine=lambda raw: None)
    fake = SimpleNamespace(
        __version__="1.7.1.116",
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None}),
        Runtime=lambda logger: refusing,
    )
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setattr(tensorrt_engine, "cuda", SimpleNamespace(Stream=Stream))
    with pytest.raises(BundleError, match=r"sm89\.trt: TensorRT 1\.7\.1\.116 does not load it on this GPU"):
        bundle.engine("target")


def test_the_portable_graph_runs_on_the_cpu_where_it_is_asked_for():
    assert devices.choose_device("portable", [ENTRY]) == ("portable", "")
    with pytest.raises(BundleError, match="device portable: the bundle lacks a portable graph"):
        devices.choose_device("portable", [msgspec.structs.replace(ENTRY, portable=None)])


# ---- TensorRT ----------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(tensorrt_engine, "cuda", SimpleNamespace(Buffer=Memory, Graph=Graph))
    model = FakeEngine(ENTRY.vocab_size, seed=3)
    model.tokens = np.full(PLAN.num_slots, -7)
    made = SimpleNamespace(create_execution_context=lambda: Context(model, stream, PLAN, ENTRY))
    runtime = SimpleNamespace(stream=stream, deserialize=lambda path: made)
    return tensorrt_engine.TensorrtEngine("target", None, PLAN, ENTRY, runtime), model


def test_calls_of_any_length_and_rollback_read_the_tokens_that_they_should(engine):
    engine, model = engine
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, ENTRY.vocab_size, 48)
    engine.reserve(48)
    start = 0
    for count, back in ((37, 0), (5, 3), (1, 0), (1, 1), (6, 2), (3, 0), (1, 0)):
        start -= back
        tokens[start:] = rng.integers(0, ENTRY.vocab_size, 48 - start)
        for wanted in (None, 1, min(2, count)):
            logits = engine.forward(tokens[start : start + count].astype(np.int32), start, num_logits=wanted)
            ends = range(start, start + count)[-(wanted or count) :]
            expected = [model.logits_after(tokens[: end + 1]) + np.float32(end) for end in ends]
            np.testing.assert_array_equal(logits, np.stack(expected))
        start += count
    assert engine.calls == 7 * 3


def test_a_tree_sees_its_own_path(engine):
    engine, model = engine
    tokens = np.arange(9, dtype=np.int32)
    engine.forward(tokens[:4], 0)
    parents = [-1, -1, 0, 0, 1]
    mask = np.zeros((5, 9), np.bool_)
    mask[:, :4] = True
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] = mask[parent]
        mask[node, 4 + node] = True
    positions = np.array([4, 4, 5, 5, 5])
    logits = engine.forward(tokens[4:], 4, positions, mask)
    for node in range(5):
        expected = model.logits_after(tokens[mask[node]]) + np.float32(positions[node])
        np.testing.assert_array_equal(logits[node], expected)


def test_a_sequence_that_is_too_long_is_refused(engine):
    with pytest.raises(BundleError, match="target has a cache of 48 tokens, 49 are wanted"):
        engine[0].reserve(49)


# ---- ONNX Runtime ------------------------------------------------------------------------------------


def test_a_silent_fallback_to_the_cpu_is_an_error(monkeypatch, tmp_path):
    with pytest.raises(BundleError, match=r"CUDAExecutionProvider could not start .* fell back to CPUExec"):
        check_provider("target", "CUDAExecutionProvider", ["CPUExecutionProvider"])
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    fake = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda *_: None),
        InferenceSession=lambda *_, **__: fallen,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    with pytest.raises(BundleError, match="target: CUDAExecutionProvider could not start"):
        OnnxGpuEngine("target", tmp_path / "model.onnx", ENTRY)


def test_a_provider_that_is_not_there_is_named():
    with pytest.raises(BundleError, match=r"has no TensorrtEx.*pip install 'draftsmith\[gpu\]'"):
        OnnxGpuEngine("target", "model.onnx", ENTRY, "TensorrtExecutionProvider")
    with pytest.raises(BundleError, match=r"nv_tensorrt_rtx is not installed: pip install onnxruntime-ep-nv"):
        OnnxGpuEngine("target", "model.onnx", ENTRY, RTX)


class Plugin:
    """Stands for ONNX Runtime and the package of the RTX provider."""

    def __init__(self, monkeypatch, fails="", has_gpu=True, runs_on=RTX):
        self.registered, self.added = [], []
        self.fails, self.has_gpu, self.runs_on = fails, has_gpu, runs_on
        monkeypatch.setitem(sys.modules, "onnxruntime", self)
        monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", self)
        monkeypatch.setattr(onnx_gpu_engine, "find_spec", lambda name: name)

    def get_library_path(self):
        return "librtx.so"

    def register_execution_provider_library(self, name, path):
        if self.fails:
            raise RuntimeError(self.fails)
        self.registered.append((name, path))

    def get_ep_devices(self):
        names = ["CPUExecutionProvider", *([RTX, RTX] if self.registered and self.has_gpu else [])]
        return [SimpleNamespace(ep_name=name) for name in names]

    def SessionOptions(self):
        return SimpleNamespace(
            add_session_config_entry=lambda *entry: None,
            add_provider_for_devices=lambda devices, settings: self.added.append((devices, settings)),
        )

    def InferenceSession(self, graph, options):
        return SimpleNamespace(get_providers=lambda: [self.runs_on, "CPUExecutionProvider"])


def test_the_rtx_plugin_is_registered_once_and_given_its_shapes_and_cache(monkeypatch, tmp_path):
    plugin = Plugin(monkeypatch)
    for _ in range(2):
        OnnxGpuEngine("target", tmp_path / "model.onnx", ENTRY, RTX, tmp_path)
    assert plugin.registered == [(RTX, "librtx.so")]
    devices, settings = plugin.added[0]
    assert [device.ep_name for device in devices] == [RTX], "the first GPU"
    assert "past_key_values.0.key:1x1x100x4" in settings["nv_profile_max_shapes"]
    assert settings["nv_runtime_cache_path"] == str(tmp_path)


@pytest.mark.parametrize(
    ("seems", "said"),
    [
        ({"fails": "libcuda.so.1: cannot\nopen"}, f"does not load {RTX}: libcuda.so.1: cannot open"),
        ({"has_gpu": False}, f"{RTX} finds no GPU"),
        ({"runs_on": "CPUExecutionProvider"}, f"{RTX} could not start and ONNX Runtime fell back to CPU"),
    ],
)
def test_an_rtx_plugin_that_cannot_run_is_named(monkeypatch, tmp_path, seems, said):
    Plugin(monkeypatch, **seems)
    with pytest.raises(BundleError, match=f"^target: .*{said}") as refused:
        OnnxGpuEngine("target", tmp_path / "model.onnx", ENTRY, RTX)
    assert "\n" not in str(refused.value)


def test_providers_that_build_engines_get_the_shapes_of_the_cache(tmp_path):
    options = provider_options("TensorrtExecutionProvider", ENTRY, tmp_path)
    assert "past_key_values.1.value:1x1x100x4" in options["trt_profile_max_shapes"]
    assert "attention_mask:1x1x192x100" in options["trt_profile_max_shapes"]
    assert options["trt_engine_cache_path"] == str(tmp_path)
    options = provider_options("NvTensorRTRTXExecutionProvider", ENTRY, tmp_path)
    assert options["nv_runtime_cache_path"] == str(tmp_path)


@pytest.mark.parametrize(
    ("device", "provider"),
    [
        ("onnx-cuda", "CUDAExecutionProvider"),
        ("onnx-tensorrt", "TensorrtExecutionProvider"),
        ("onnx-rtx", RTX),
    ],
)
def test_a_provider_is_chosen_by_the_name_of_its_device(machine, monkeypatch, tmp_path, device, provider):
    machine()
    opened = []

    class Opened:
        def __init__(self, *arguments):
            opened.append(arguments)
            self.vocab_size = arguments[2].vocab_size

    monkeypatch.setattr(onnx_gpu_engine, "OnnxGpuEngine", Opened)
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    folder = write_bundle(tmp_path / "bundle", {"target": {"portable": "target/cpu.onnx"}, "int8": {}})
    bundles.load(folder, device=device).engine("target")
    name, graph, _, wanted, cache = opened[0]
    assert (name, graph, wanted) == ("target", folder / "target" / "cpu.onnx", provider)
    if provider == "CUDAExecutionProvider":
        assert cache is None, "it builds no engines"
    else:
        assert cache.is_dir() and cache.parent == tmp_path / "cache" / "providers"
    monkeypatch.setattr(devices, "find_gpus", lambda: ([], "no NVIDIA driver: x"))
    with pytest.raises(BundleError, match=f"device {device}: no NVIDIA driver: x; --device cpu runs"):
        bundles.load(folder, device=device)
    machine(onnx="no such provider")
    with pytest.raises(BundleError, match=f"device {device}: no such provider; --device cpu runs"):
        bundles.load(folder, device=device)


def test_what_is_bound_gives_the_graphs_own_logits(tiny_checkpoint, tmp_path):
    """On the CPU's provider, with the cache bound in place as on a GPU."""
    checkpoint = tiny_checkpoint("llama")
    export_onnx(checkpoint, tmp_path)
    entry = entry_of(Checkpoint(checkpoint).config)
    engine = OnnxGpuEngine("target", tmp_path / "model.onnx", entry, "CPUExecutionProvider")
    engine.reserve(entry.max_seq_len)
    graph = GraphSession(tmp_path / "model.onnx", entry.max_seq_len)
    rng = np.random.default_rng(0)
    start = 0
    for count, back in ((7, 0), (3, 2), (1, 0)):
        start -= back
        ids = rng.integers(0, entry.vocab_size, count).astype(np.int32)
        expected = graph.run([ids], [start])[0]
        np.testing.assert_allclose(engine.forward(ids, start), expected, atol=1e-5)
        np.testing.assert_allclose(engine.forward(ids, start, num_logits=1), expected[-1:], atol=1e-5)
        start += count
