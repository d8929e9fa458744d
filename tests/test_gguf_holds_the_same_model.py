"""A .gguf file gives the model that it was made of, its tokenizer included, or says why not."""

import re
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import CACHE, TEMPLATE, VARIANTS
from draftsmith.model.decoder import Decoder
from draftsmith.model.errors import ModelError
from draftsmith.model.load import load_model
from draftsmith.model.store import Checkpoint
from draftsmith.model.tokenizer import load_tokenizer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

# transformers' names → GGUF's, as llama.cpp's converter has them.
RENAMES = [
    (r"^(model|transformer)\.", ""),
    (r"^(layers|h)\.", "blk."),
    ("self_attn.qkv_proj|attn.c_attn", "attn_qkv"),
    ("self_attn.o_proj|attn.c_proj", "attn_output"),
    (r"self_attn\.([qkv])_proj", r"attn_\1"),
    (r"self_attn\.([qk])_norm", r"attn_\1_norm"),
    ("mlp.gate_up_proj|mlp.up_proj|mlp.c_fc", "ffn_up"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.down_proj|mlp.c_proj", "ffn_down"),
    ("input_layernorm|ln_1", "attn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("pre_feedforward_layernorm|ln_2", "ffn_norm"),
    ("embed_tokens|wte", "token_embd"),
    ("wpe", "position_embd"),
    ("^norm|^ln_f", "output_norm"),
    ("lm_head", "output"),
]


def save_gguf(
    variant: str, folder: Path, path: Path, drop: str = "", arch: str | None = None
) -> torch.nn.Module:
    """Writes the tiny model in `folder` as llama.cpp would; leaves out the tensor `drop`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config, family = model.config, VARIANTS[variant][0]
    arch = arch or {"gemma3_text": "gemma3"}.get(family, family)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "n_inner", None) or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if family == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        add_rotary(writer, config, family)
    add_tokenizer(writer, folder)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = rename(name, family)
        if theirs != drop:
            writer.add_tensor(theirs, convert(name, tensor, config, family).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_rotary(writer: gguf.GGUFWriter, config, family: str) -> None:
    parameters = config.rope_parameters
    if family == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        parameters = parameters["full_attention"]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_freq_base(parameters["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * parameters.get("partial_rotary_factor", 1)))
    if parameters["rope_type"] == "longrope":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(
            AutoModelForCausalLM.from_config(config).model.rotary_emb.attention_scaling
        )
        for kind in ("short", "long"):
            writer.add_tensor(
                f"rope_factors_{kind}.weight", np.array(parameters[f"{kind}_factor"], np.float32)
            )
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] == "llama3":
        rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq
        plain = parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / rotary).numpy())


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    import json

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def rename(name: str, family: str) -> str:
    # Gemma's norm behind attention has the name that elsewhere belongs to the norm before the MLP.
    after = "post_attention_norm" if family == "gemma3_text" else "ffn_norm"
    for pattern, theirs in [("post_attention_layernorm", after), *RENAMES]:
        name = re.sub(pattern, theirs, name)
    return name


def convert(name: str, tensor: torch.Tensor, config, family: str) -> torch.Tensor:
    if family == "gpt2" and tensor.ndim == 2 and "wte" not in name and "wpe" not in name:
        return tensor.T
    if family == "gemma3_text" and "norm" in name:
        return tensor + 1
    if family == "llama" and re.search("[qk]_proj", name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor


VARIANTS_IN_GGUF = [
    "llama",
    "llama-tied",
    "llama-bias",
    "llama-llama3",
    "llama-linear",
    "qwen2",
    "qwen3",
    "gemma3-pattern",
    "phi3",
    "phi3-longrope",
    "gpt2",
]


@pytest.mark.parametrize("variant", VARIANTS_IN_GGUF)
def test_logits_are_those_of_the_original(variant, tiny_folder, tmp_path):
    reference = save_gguf(variant, tiny_folder(variant), tmp_path / "model.gguf")
    load_model(str(tmp_path / "model.gguf"), "float32", tmp_path / "checkpoint", CACHE)
    ids = torch.arange(80).reshape(2, 40) * 4
    with torch.no_grad():
        wanted = reference(ids).logits
    got = Decoder.from_checkpoint(Checkpoint(tmp_path / "checkpoint"))(ids)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_tokenizer_is_that_of_the_original(tiny_folder, tmp_path):
    save_gguf("llama", tiny_folder("llama"), tmp_path / "model.gguf")
    load_model(str(tmp_path / "model.gguf"), "float32", tmp_path / "checkpoint", CACHE)
    original = Tokenizer.from_file(str(tiny_folder("llama") / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "checkpoint")
    for text in ("<|im_start|>user\nthe plan<|im_end|>", "über 3 boards,  and\n\n it's said"):
        assert tokenizer.encode(text).ids == original.encode(text).ids
    # The digits of a vocabulary of kind "smollm" stand apart, and so do the blanks before them.
    assert tokenizer.encode("  12").tokens == ["ĠĠ", "1", "2"] or "ĠĠ" not in tokenizer.get_vocab()
    assert (tmp_path / "checkpoint/chat_template.jinja").read_text() == TEMPLATE


def test_the_file_is_parsed_once_and_in_plain_slices(tiny_folder, tmp_path, monkeypatch):
    """Parsing a vocabulary is what takes the time, and a memmap makes each of its many slices expensive."""
    save_gguf("llama", tiny_folder("llama"), tmp_path / "model.gguf")
    readers, parse = [], gguf.GGUFReader.__init__

    def counted(reader, *arguments, **settings):
        readers.append(reader)
        parse(reader, *arguments, **settings)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    load_model(str(tmp_path / "model.gguf"), "float32", tmp_path / "checkpoint", CACHE)
    (reader,) = readers
    assert type(reader.data) is np.ndarray and isinstance(reader.data.base, np.memmap)


def test_no_token_is_added_that_the_file_does_not_have(tiny_folder, tmp_path):
    """transformers' class for a family adds its own special tokens, such as Gemma's <mask>."""
    save_gguf("gemma3-pattern", tiny_folder("gemma3-pattern"), tmp_path / "model.gguf")
    load_model(str(tmp_path / "model.gguf"), "float32", tmp_path / "checkpoint", CACHE)
    assert load_tokenizer(tmp_path / "checkpoint").get_vocab_size() == 300


def test_a_file_cut_short_is_named(tiny_folder, tmp_path):
    save_gguf("llama", tiny_folder("llama"), tmp_path / "model.gguf")
    whole = (tmp_path / "model.gguf").read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 200):
        (tmp_path / "short.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"short\.gguf is cut short, damaged or not GGUF"):
            load_model(str(tmp_path / "short.gguf"), "float32", tmp_path / "out", CACHE)


def test_a_missing_tensor_is_named(tiny_folder, tmp_path):
    save_gguf("llama", tiny_folder("llama"), tmp_path / "model.gguf", drop="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"has no tensor 'blk\.1\.ffn_up\.weight'"):
        load_model(str(tmp_path / "model.gguf"), "float32", tmp_path / "out", CACHE)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("arch", ["mamba", "gpt-oss", "qwen2moe"])
def test_an_architecture_that_is_not_known_is_named(arch, tiny_folder, tmp_path):
    save_gguf("llama", tiny_folder("llama"), tmp_path / "model.gguf", arch=arch)
    with pytest.raises(ModelError, match=rf"'{arch}' is refused\. Supported: llama, qwen2"):
        load_model(str(tmp_path / "model.gguf"), "float32", tmp_path / "out", CACHE)


@pytest.mark.real
def test_smollm2_is_what_transformers_reads(smollm2_gguf, tmp_path, monkeypatch):
    # transformers parses the file anew for settings, tokenizer and weights, and lists all names anew for each
    # module: half a minute in which gguf gives the same.
    reader = gguf.GGUFReader(smollm2_gguf)
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader)
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder, name = smollm2_gguf.parent, smollm2_gguf.name
    with torch.device("meta"):
        reference = LlamaForCausalLM(AutoConfig.from_pretrained(folder, gguf_file=name))
    tensors = load_gguf_checkpoint(smollm2_gguf, return_tensors=True, model_to_load=reference)["tensors"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    reference = LlamaForCausalLM(reference.config).eval()
    reference.load_state_dict(tensors)

    load_model(str(smollm2_gguf), "float32", tmp_path, CACHE)
    tokenizer, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(folder, gguf_file=name)
    chat = [{"role": "user", "content": "Why is the sky blue? Ünïcödé, 1234."}]
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text).ids
    assert ids == theirs.encode(text) and ids[0] == 1
    assert tokenizer.encode("  12").tokens == ["ĠĠ", "1", "2"]  # theirs forgets to set digits apart first

    with torch.no_grad():
        wanted = reference(torch.tensor([ids])).logits
    got = Decoder.from_checkpoint(Checkpoint(tmp_path))(torch.tensor([ids]))
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-4
