"""The prune stage walks the layers in order on pruned inputs, survives a crash bit for bit, and says no in
time."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from draftsmith.model.decoder import Decoder
from draftsmith.model.errors import ModelError
from draftsmith.model.load import load_model
from draftsmith.model.store import Checkpoint
from draftsmith.prune.stage import prune_model
from safetensors.torch import load_file, save_file

SETTINGS = {"method": "sparsegpt", "mask_structure": "2:4", "block_size": 16}


class Crash(Exception):
    pass


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.safetensors"
    windows = torch.randint(0, 300, (12, 24), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    save_file({"tokens": windows}, path)
    return path


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def crash_at(part: int):
    def progress(done: int, total: int, label: str) -> None:
        if done == part:
            raise Crash

    return progress


@pytest.mark.parametrize("joint_int8", [False, True])
@pytest.mark.parametrize("variant", ["llama-tied", "gemma3_text", "opt"])
def test_a_crash_after_any_layer_changes_nothing(tiny_checkpoint, tokens, tmp_path, variant, joint_int8):
    src, settings = tiny_checkpoint(variant), SETTINGS | {"joint_int8": joint_int8}
    report = prune_model(src, tokens, tmp_path / "whole", tmp_path / "work", **settings)
    for part in range(5):
        out, work = tmp_path / f"out{part}", tmp_path / f"work{part}"
        with pytest.raises(Crash):
            prune_model(src, tokens, out, work, **settings, progress=crash_at(part))
        assert not (out / "config.json").exists()  # what is not whole is no checkpoint
        done = {path: path.stat().st_mtime_ns for path in work.glob("layers/*.safetensors")}
        assert len(done) == min(part, 3)
        assert prune_model(src, tokens, out, work, **settings) == report
        assert digest(out) == digest(tmp_path / "whole")
        assert all(path.stat().st_mtime_ns == time for path, time in done.items())  # kept, not made again


def test_a_layer_half_written_is_made_again(tiny_checkpoint, tokens, tmp_path):
    """The process may die between the tensors of a layer and the record that they are whole."""
    src = tiny_checkpoint("llama")
    prune_model(src, tokens, tmp_path / "whole", tmp_path / "work", **SETTINGS)
    (tmp_path / "work" / "layers" / "001.json").unlink()
    half = tmp_path / "work" / "layers" / "001.safetensors"
    half.unlink()  # the finished checkpoint links to it
    half.write_bytes(b"half")
    prune_model(src, tokens, tmp_path / "again", tmp_path / "work", **SETTINGS)
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")


def test_a_work_folder_of_other_settings_is_refused(tiny_checkpoint, tokens, tmp_path):
    src = tiny_checkpoint("llama")
    prune_model(src, tokens, tmp_path / "out", tmp_path / "work", **SETTINGS)
    with pytest.raises(ModelError, match="another dampening_frac, mask_structure"):
        changed = SETTINGS | {"mask_structure": "4:8", "dampening_frac": 0.1}
        prune_model(src, tokens, tmp_path / "other", tmp_path / "work", **changed)


@pytest.mark.parametrize("joint_int8", [False, True])
@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "opt", "gpt2"])
def test_each_linear_is_calibrated_on_what_the_finished_model_gives_it(
    tiny_checkpoint, tokens, tmp_path, variant, joint_int8
):
    """The reported losses, recomputed from the pruned model itself: all that runs before a linear was
    finished when its turn came."""
    src, out = tiny_checkpoint(variant), tmp_path / "out"
    report = prune_model(src, tokens, out, tmp_path / "work", **SETTINGS, joint_int8=joint_int8)
    pruned, dense = Decoder.from_checkpoint(Checkpoint(out)), Decoder.from_checkpoint(Checkpoint(src))
    inputs: dict[str, torch.Tensor] = {}
    names = [row["linear"].removeprefix("model.") for row in report["linears"]]
    assert len(names) == 3 * len(pruned.layers[0].linears())
    for name in names:
        hook = lambda _, x, name=name: inputs.update({name: x[0]})  # noqa: E731
        pruned.get_submodule(name).register_forward_pre_hook(hook)
    pruned(load_file(tokens)["tokens"].long())
    for name, row in zip(names, report["linears"], strict=True):
        before, after = dense.get_submodule(name).weight, pruned.get_submodule(name).weight.double()
        if joint_int8:
            after *= pruned.get_submodule(name).weight_scale[:, None]
        x, change = inputs[name].flatten(0, 1).double(), after - before
        live = x.square().sum(0) > 0  # behind a ReLU some channels are shut
        x, change = x[:, live], change[:, live]
        hessian = 2 * x.T @ x / len(x)
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        loss = float(torch.trace(change @ hessian @ change.T)) / 2
        assert row["loss"] == pytest.approx(loss, rel=1e-4) and row["trace"] == pytest.approx(loss, rel=1e-4)


def test_report_and_result_agree(tiny_checkpoint, tokens, tmp_path):
    src, out = tiny_checkpoint("llama-tied"), tmp_path / "out"
    settings = {"sparsity": 0.37, "mask_structure": "unstructured", "ignore": ["*.k_proj", "lm_head"]}
    report = prune_model(src, tokens, out, tmp_path / "work", **settings, joint_int8=True)
    rows = {row["linear"]: row for row in report["linears"]}
    json.dumps(report)
    before, after = Checkpoint(src), Checkpoint(out)
    assert len(rows) == 3 * 6
    for layer in range(3):
        tensors, dense = after.load_layer(layer), before.load_layer(layer)
        for name in [name.removesuffix(".weight") for name in dense if name.endswith("_proj.weight")]:
            weight, row = tensors[f"{name}.weight"], rows.get(f"model.layers.{layer}.{name}")
            if name.endswith("k_proj"):
                assert row is None and torch.equal(weight, dense[f"{name}.weight"])
                continue
            assert weight.dtype == torch.int8
            scale = dense[f"{name}.weight"].abs().amax(1) / 127
            torch.testing.assert_close(tensors[f"{name}.weight_scale"], scale)
            zeros = int((weight == 0).sum())
            assert row["sparsity"] == pytest.approx(zeros / weight.numel())
            assert zeros >= round(0.37 * weight.numel())  # and what the grid rounds to zero
            assert row["loss"] == pytest.approx(row["trace"], rel=1e-4) and row["dampening_frac"] == 0.01
    assert torch.equal(after.load_head()["model.norm.weight"], before.load_head()["model.norm.weight"])
    assert after.config == before.config and after.tokenizer_path.exists()
    assert (out / "embed.safetensors").samefile(src / "embed.safetensors")  # linked, not copied


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_pruned_weights_have_the_dtype_that_is_exported(tiny_folder, tokens, tmp_path, method):
    """Else the graph would round what the layers behind were calibrated on, and fail the check."""
    load_model(str(tiny_folder("llama")), "bfloat16", tmp_path / "src", tmp_path)
    settings = SETTINGS | {"method": method}
    prune_model(tmp_path / "src", tokens, tmp_path / "out", tmp_path / "work", **settings)
    layer = Checkpoint(tmp_path / "out").load_layer(1)
    assert {tensor.dtype for tensor in layer.values() if tensor.ndim == 2} == {torch.bfloat16}
    assert (layer["mlp.up_proj.weight"] == 0).float().mean() == 0.5


def test_magnitude_is_the_worse_baseline(tiny_checkpoint, tokens, tmp_path):
    src, windows = tiny_checkpoint("llama"), load_file(tokens)["tokens"].long()
    dense = Decoder.from_checkpoint(Checkpoint(src))(windows)
    errors, losses = {}, {}
    for method in ("magnitude", "sparsegpt"):
        out = tmp_path / method
        report = prune_model(src, tokens, out, tmp_path / f"{method}-work", sparsity=0.5, method=method)
        assert all(row["sparsity"] == 0.5 for row in report["linears"])
        losses[method] = {row["linear"]: row["loss"] for row in report["linears"]}
        errors[method] = (Decoder.from_checkpoint(Checkpoint(out))(windows) - dense).square().mean()
    assert errors["sparsegpt"] < 0.9 * errors["magnitude"]
    for name in ("q_proj", "k_proj", "v_proj"):  # of the first layer, where both have the same inputs
        name = f"model.layers.0.self_attn.{name}"
        assert losses["sparsegpt"][name] < losses["magnitude"][name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mask_structure": "1:16", "block_size": 16},
            "mlp.down_proj has 88 input channels",
        ),  # 48 divides, 88 does not
        ({"mask_structure": "2:4", "block_size": 30}, "block_size is 30"),
        ({"targets": ["lm_head"]}, "lm_head"),
        ({"targets": ["*.dwon_proj"]}, r"\*\.down_proj"),
        ({"mask_structure": "unstructured", "sparsity": -0.1}, "sparsity"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(tiny_checkpoint, tokens, tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        prune_model(
            tiny_checkpoint("llama"), tokens, tmp_path / "out", tmp_path / "work", **SETTINGS | changes
        )
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_pruned(tiny_checkpoint, tokens, tmp_path):
    prune_model(
        tiny_checkpoint("llama"), tokens, tmp_path / "int8", tmp_path / "a", **SETTINGS, joint_int8=True
    )
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj is int8 already"):
        prune_model(tmp_path / "int8", tokens, tmp_path / "out", tmp_path / "b", **SETTINGS)
