"""Stands for a GPU: memory, streams and graphs of `speculate/cuda.py`, and TensorRT's execution contexts."""

import ctypes

import numpy as np
from draftsmith.speculate.binding import ffi


class Memory:
    """Stands for `cuda.Buffer`."""

    def __init__(self, size):
        self.size, self.bytes = size, np.zeros(size, np.uint8)
        self.address = self.bytes.ctypes.data

    def at(self, skip=0):
        assert skip < self.size
        return ffi.cast("void *", self.address + skip)

    def write(self, array, stream):
        assert array.flags.c_contiguous and array.nbytes <= self.size
        self.bytes[: array.nbytes] = array.reshape(-1).view(np.uint8)
        return self

    def read(self, array, stream, skip=0):
        assert array.flags.c_contiguous and skip + array.nbytes <= self.size
        array.reshape(-1).view(np.uint8)[:] = self.bytes[skip : skip + array.nbytes]
        return array


class Stream:
    address = 7
    handle = ffi.NULL
    recorded = None
    waits = 0

    def wait(self):
        assert self.recorded is None, "waiting ends a recording"
        self.waits += 1


class Graph:
    def __init__(self, stream):
        self.stream, stream.recorded = stream, []

    def finish(self):
        self.work, self.stream.recorded = self.stream.recorded, None
        return self

    def launch(self):
        for step in self.work:
            step()


class Context:
    """Stands for an execution context: a `FakeEngine` behind TensorRT's interface."""

    def __init__(self, model, stream, plan, entry):
        self.model, self.stream, self.plan, self.entry = model, stream, plan, entry
        self.addresses, self.shapes = {}, {}

    def set_optimization_profile_async(self, profile, stream):
        self.rows = self.plan.rows[profile]
        return stream == Stream.address

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape

    def execute_async_v3(self, stream):
        if self.stream.recorded is not None:
            self.stream.recorded.append(self.run)
        else:
            self.run()
        return True

    def view(self, name, dtype, *shape):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)

    def run(self):
        rows, slots = self.rows, self.plan.num_slots
        assert self.shapes["input_ids"] == self.shapes["position_ids"] == (1, rows)
        assert self.shapes["attention_mask"] == (1, 1, rows, slots)
        for layer in range(self.entry.num_layers):
            past, present = f"past_key_values.{layer}.key", f"present.{layer}.key"
            assert self.addresses[past] == self.addresses[present], "the cache is updated in place"
        ids, start = self.view("input_ids", np.int64, rows), self.view("write_index", np.int64, 1)[0]
        mask = self.view("attention_mask", np.bool_, rows, slots)
        assert start + rows <= slots
        assert mask.any(axis=1).all(), "a row that sees nothing has no softmax"
        positions = self.view("position_ids", np.int64, rows)
        assert ((positions >= 0) & (positions < self.plan.max_seq_len)).all()
        self.model.tokens[start : start + rows] = ids
        logits = self.view("logits", np.float32, rows, self.entry.vocab_size)
        for row in range(rows):
            logits[row] = self.model.logits_after(self.model.tokens[mask[row]]) + np.float32(positions[row])
