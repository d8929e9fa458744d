"""Calibration tokens are the same from the same seed or text, and never fewer than asked for."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from draftsmith.model.calibration import write_tokens
from draftsmith.model.decoder import Decoder
from draftsmith.model.errors import ModelError
from draftsmith.model.sample import Script, draw
from draftsmith.model.store import Checkpoint
from draftsmith.model.tokenizer import load_tokenizer
from draftsmith.model.turns import Turns, read_turns
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors

USER, ANSWER = "<|im_start|>user\n", "<|im_start|>assistant\n"


def tokens_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "tokens.safetensors")["tokens"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def base_model(checkpoint, tmp_path_factory) -> Path:
    """The same model without a chat template."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_the_seed_fixes_every_token(checkpoint, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tokens(checkpoint, "self", 3, 40, seed, tmp_path / name)
    a, b, c = (tokens_of(tmp_path / name) for name in "abc")
    assert a.dtype == torch.int32 and a.shape == (3, 40)
    assert torch.equal(a, b)
    first, second = (tmp_path / name / "tokens.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert not torch.equal(a, c)


def test_more_rows_leave_the_first_as_they_were(checkpoint, tmp_path, monkeypatch):
    write_tokens(checkpoint, "self", 5, 30, 0, tmp_path / "together")
    monkeypatch.setattr("draftsmith.model.sample.CACHE_BYTES", 1)  # every row in a group of its own
    write_tokens(checkpoint, "self", 5, 30, 0, tmp_path / "apart")
    assert torch.equal(tokens_of(tmp_path / "together"), tokens_of(tmp_path / "apart"))


def test_a_chat_model_speaks_both_parts(checkpoint, tmp_path):
    write_tokens(checkpoint, "self", 24, 200, 0, tmp_path)
    tokenizer = load_tokenizer(checkpoint)
    changes = 0
    for row in tokens_of(tmp_path).tolist():
        text = tokenizer.decode(row, skip_special_tokens=False)
        assert text.startswith(USER)
        turns = text.split("<|im_end|>")
        changes += len(turns) - 1
        for number, turn in enumerate(turns[1:], 1):
            header = "\n" + (ANSWER if number % 2 else USER)
            assert turn.startswith(header) or header.startswith(turn)  # the last may be cut
    assert changes >= 5


def test_turns_change_in_a_round():
    script = Script(Turns((), ((2, 9, 8), (2, 7)), frozenset({2, 5})))
    said = [3, 2, 0, 0, 4, 5, 1, 6, 5, 2, 2, 2]
    assert [script.read(token) for token in said] == [3, 2, 9, 8, 4, 2, 7, 6, 2, 9, 8, 2]


def test_a_base_model_starts_documents_anew(base_model, tmp_path):
    write_tokens(base_model, "self", 24, 100, 0, tmp_path)
    config = Checkpoint(base_model).config
    tokens = tokens_of(tmp_path)
    assert (tokens[:, 0] == config.bos_token_id).all()
    ends = tokens[:, :-1] == config.eos_token_ids[0]
    assert ends.any() and (tokens[:, 1:][ends] == config.bos_token_id).all()


def test_rows_follow_the_law_of_the_model(base_model, tmp_path):
    """The first token of 4000 rows, against the probabilities of the whole model: G-test."""
    write_tokens(base_model, "self", 4000, 2, 0, tmp_path)
    config = Checkpoint(base_model).config
    bos = torch.tensor([[config.bos_token_id]])
    law = Decoder.from_checkpoint(Checkpoint(base_model))(bos)[0, 0].double().softmax(0)
    counts = torch.bincount(tokens_of(tmp_path)[:, 1].long(), minlength=len(law)).double()
    common = law * 4000 >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = 4000 * torch.cat([law[common], law[~common].sum()[None]])
    frequencies = load_file(tmp_path / "tokens.safetensors")["frequencies"]
    torch.testing.assert_close(frequencies, 4000 * law, rtol=1e-4, atol=1e-3)
    statistic = float(2 * torch.xlogy(observed, observed / expected).sum())
    degrees = len(observed) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # mean and deviation of chi-square


def test_draw_inverts_the_cumulative_law():
    laws = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75])
    assert draw(laws, uniforms).tolist() == [0, 0, 2, 2, 3]


def test_text_is_cut_into_consecutive_windows(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The plan is drawn twice; the board is cut once. " * 30)
    ids = load_tokenizer(checkpoint).encode(text.read_text()).ids
    exact = len(ids) // 20
    report = write_tokens(checkpoint, [str(text)], exact, 20, 0, tmp_path / "all")
    assert tokens_of(tmp_path / "all").flatten().tolist() == ids[: exact * 20]
    assert report["num_tokens_of_text"] == len(ids)
    assert json.loads((tmp_path / "all/calibration.json").read_text()) == report

    write_tokens(checkpoint, str(text), 3, 20, 7, tmp_path / "few")
    starts = [window * exact // 3 * 20 for window in range(3)]
    assert tokens_of(tmp_path / "few").tolist() == [ids[start : start + 20] for start in starts]
    counts = load_file(tmp_path / "few/tokens.safetensors")["frequencies"]
    assert {token: count for token, count in enumerate(counts.tolist()) if count} == Counter(ids)


def test_files_are_joined_in_order(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n{"text": "third", "id": 3}\n')
    write_tokens(checkpoint, [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], 1, 8, 0, tmp_path)
    ids = load_tokenizer(checkpoint).encode("first\n\nsecond\n\nthird").ids
    assert tokens_of(tmp_path)[0].tolist() == ids[:8]


def test_windows_begin_as_the_tokenizer_begins_a_prompt(checkpoint, tmp_path):
    folder = tmp_path / "with_bos"
    shutil.copytree(checkpoint, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("a board is cut once and for all " * 4)
    write_tokens(folder, str(text), 3, 9, 0, tmp_path / "out")
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    tokens = tokens_of(tmp_path / "out")
    assert (tokens[:, 0] == 0).all() and tokens[0, 1:].tolist() == ids[:8]


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        ("short.txt", (64, 200), ["short.txt has", "12800", "num_calibration_samples", "max_seq_length"]),
        ("missing.txt", (1, 8), ["missing.txt", "cannot be read"]),
        ("bad.jsonl", (1, 8), ["bad.jsonl, line 2", '"text"']),
        ("self", (1, 257), ["max_seq_length is 257", "256"]),
        ("dataset:a:b:c:d", (1, 8), ["dataset:NAME"]),
    ],
)
def test_what_cannot_be_used_is_named(checkpoint, tmp_path, monkeypatch, text, shape, words):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    Path("bad.jsonl").write_text('{"text": "fine"}\n{"prompt": "not"}\n')
    with pytest.raises(ModelError) as caught:
        write_tokens(checkpoint, text, *shape, 0, tmp_path / "out")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_template_that_cannot_be_rendered_is_named(checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    with pytest.raises(ModelError, match=r"no users here.*calibration\.text"):
        write_tokens(folder, "self", 1, 8, 0, tmp_path / "out")


@pytest.mark.parametrize("template", ["{{ strftime_now('%Y') }}", "{{ bos_token }}"])
def test_templates_are_rendered_on_a_fixed_day_with_the_models_tokens(checkpoint, tmp_path, template):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    rest = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template + rest)
    tokenizer = load_tokenizer(folder)
    turns = read_turns(folder, Checkpoint(folder).config, tokenizer)
    opening = tokenizer.decode(list(turns.opening), skip_special_tokens=False)
    assert opening == {"b": "<|endoftext|>[user]", "s": "2025[user]"}[template[3]]
