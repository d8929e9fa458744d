"""The process that builds one TensorRT engine: `python -m draftsmith.export.tensorrt_builder JOB`.

JOB is a JSON file: {"package", "graph", "portable", "plan", "log", "compute_capability", "rows"}. The last
line of standard output is the report, or {"error"}, as JSON.
"""

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from .capabilities import RTX, RTX_NAMES


class Refused(Exception):
    """What the builder does not take, in its own words."""


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Write the plan and the log of `job`. Raises Refused."""
    trt: Any = importlib.import_module(job["package"])
    with Path(job["log"]).open("w", encoding="utf-8") as log:
        logger = _make_logger(trt, log)
        builder = trt.Builder(logger)
        network = _parse(trt, builder, logger, job)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the log names every layer
        config.max_aux_streams = 0  # one stream, as a CUDA graph of it is captured
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        if job["package"] == RTX:
            config.num_compute_capabilities = len(job["compute_capability"])
            for index, capability in enumerate(job["compute_capability"]):
                config.set_compute_capability(getattr(trt.ComputeCapability, RTX_NAMES[capability]), index)
        _add_profiles(builder, network, config, job["rows"])
        started = time.monotonic()
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise Refused(logger.explain("the builder gave no plan"))
        Path(job["plan"]).write_bytes(plan)
        kinds = [str(network.get_layer(i).type).rpartition(".")[2] for i in range(network.num_layers)]
    return {
        "version": trt.__version__,
        "build_seconds": round(time.monotonic() - started, 1),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "kv_cache_updates": sum(kind.replace("_", "") == "KVCACHEUPDATE" for kind in kinds),
    }


def _parse(trt: Any, builder: Any, logger: Any, job: dict[str, Any]) -> Any:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(Path(job["graph"]).read_bytes(), job["portable"]):  # weights lie beside the latter
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        words = "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in found)
        raise Refused(f"the graph is not accepted: {words or logger.explain('no reason given')}")
    return network


def _add_profiles(builder: Any, network: Any, config: Any, rows: list[int]) -> None:
    for count in rows:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            value = network.get_input(index)
            if -1 in tuple(value.shape):
                shape = tuple(count if size == -1 else size for size in value.shape)
                profile.set_shape(value.name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise Refused(f"no optimization profile for {count} rows")


def _make_logger(trt: Any, log: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            log.write(message + "\n")
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split())[:500])

        def explain(self, otherwise: str) -> str:
            return self.errors[0] if self.errors else otherwise

    return Logger()


def main() -> None:
    try:
        report = build(json.loads(Path(sys.argv[1]).read_text()))
    except Refused as error:
        report = {"error": str(error)}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
