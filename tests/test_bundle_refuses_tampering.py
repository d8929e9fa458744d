"""A bundle that is damaged, forged or asked for the impossible is refused in one clear line."""

import json
import shutil

import draftsmith
import numpy as np
import pytest
from draftsmith.speculate.bundle import load
from draftsmith.speculate.errors import BundleError
from fake_engine import BYTE_VOCAB, open_bundle, write_bundle, write_manifest

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ m.role }}:{{ m.content | tojson }}{% if loop.last %}{% break %}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}{% generation %}!{% endgeneration %}{% endif %}"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("whole") / "bundle", chat_template=TEMPLATE)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "bundle")


@pytest.fixture(scope="module")
def bundle(whole):
    return open_bundle(whole)


def refusal(action):
    """The message with which an action is refused; always one line."""
    with pytest.raises(BundleError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and message.strip()
    return message


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_sound_bundle_loads(folder):
    assert load(folder).manifest.engines.keys() == {"target", "int8", "tiny"}
    assert draftsmith.load(folder, threads=2).threads == 2


def list_files(folder):
    return sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    )


def test_one_changed_byte_in_any_file_is_found(folder):
    names = list_files(folder)
    assert len(names) >= 6
    for name in names:
        path = folder / name
        sound = path.read_bytes()
        for at in (0, len(sound) // 2, len(sound) - 1):
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
            message = refusal(lambda: load(folder))
            assert name in message and "SHA-256" in message
        path.write_bytes(sound)
    load(folder)


def test_a_file_cut_short_grown_or_gone_is_found(folder):
    for name in list_files(folder):
        path = folder / name
        sound = path.read_bytes()
        for damaged in (sound[:-1], sound + b"x", b""):
            path.write_bytes(damaged)
            assert name in refusal(lambda: load(folder))
        path.unlink()
        message = refusal(lambda: load(folder))
        assert name in message and "missing" in message
        path.write_bytes(sound)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "target/../../secret", "..", "target\\..\\secret", ""]
)
def test_a_path_that_leaves_the_bundle_is_refused(folder, name):
    (folder.parent / "secret").write_text("x")

    def forge(manifest):
        manifest["files"][name] = manifest["files"]["plan.json"]

    edit_manifest(folder, forge)
    assert repr(name) in refusal(lambda: load(folder)) or name == ""


@pytest.mark.parametrize("through_folder", [False, True])
def test_a_symbolic_link_out_of_the_bundle_is_refused(folder, through_folder):
    shutil.move(folder / "target", folder.parent / "elsewhere")
    if through_folder:
        (folder / "target").symlink_to(folder.parent / "elsewhere")
    else:
        (folder / "target").mkdir()
        (folder / "target" / "cpu.onnx").symlink_to(folder.parent / "elsewhere" / "cpu.onnx")
    assert "leads out of the bundle" in refusal(lambda: load(folder))


def test_a_linked_bundle_folder_is_fine(folder):
    (folder.parent / "link").symlink_to(folder)
    load(folder.parent / "link")


def forge(*path, value):
    def change(manifest):
        *parents, last = path
        for key in parents:
            manifest = manifest[key]
        if value is None:
            del manifest[last]
        else:
            manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (forge("schema_version", value=3), "schema_version is 3, this draftsmith reads 1 and 2: rebuild"),
        (forge("schema_version", value=None), "schema_version is None"),
        (forge("schema_version", value="1"), "schema_version is '1'"),
        (forge("engines", value=None), "engines"),
        (forge("engines", "target", value=None), "no engine is named target"),
        (forge("engines", "int8", "vocab_size", value="many"), "engines.int8.vocab_size"),
        (forge("engines", "int8", "max_seq_len", value=0), "engines.int8.max_seq_len"),
        (forge("engines", "int8", "graph", value="drafters/other.onnx"), "no hash for drafters/other.onnx"),
        (forge("engines", "int8", "vocab_size", value=BYTE_VOCAB - 1), "int8 has a vocabulary of 257"),
        (forge("engines", "int8", "vocab_size", value=128256), "int8 has a vocabulary of 128256"),
        (
            forge("engines", "int8", "kv_cache_dtype", value="fp8"),
            "engines.int8.kv_cache_dtype: Expected 'float32' or 'bfloat16', found 'fp8'",
        ),
        (forge("engines", "x - at `$.y", value={}), "engines.x - at `$.y: Object missing"),
        (forge("files", "plan.json", value=None), "no hash for plan.json"),
        (forge("files", "plan.json", "sha256", value="0"), "files.plan.json.sha256"),
        (forge("files", "plan.json", "size", value=-1), "files.plan.json.size"),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused(folder, change, said):
    edit_manifest(folder, change)
    assert said in refusal(lambda: load(folder))


def test_what_is_no_bundle_is_refused(folder):
    assert "not a folder" in refusal(lambda: load(folder / "nowhere"))
    assert "holds no manifest.json" in refusal(lambda: load(folder / "target"))
    (folder / "manifest.json").write_text("{")
    assert "not JSON" in refusal(lambda: load(folder))
    (folder / "manifest.json").write_text("[]")
    assert "wanted a JSON object" in refusal(lambda: load(folder))
    assert "threads=0" in refusal(lambda: load(folder, threads=0))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"ladder": ["int9"]}, "did you mean 'int8'?"),
        ({"ladder": "int8"}, "ladder"),
        ({"ladder": ["int8"], "verify": "typical"}, "verify"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tmp_path, plan, said):
    folder = write_bundle(tmp_path / "bundle", plan=plan)
    assert said in refusal(lambda: load(folder))


def test_a_graph_that_is_none_is_refused(whole):
    message = refusal(lambda: load(whole).generate("a", 1))
    assert "target/cpu.onnx: ONNX Runtime: " in message


def test_a_graph_that_differs_from_its_manifest_entry_is_refused(tmp_path):
    pytest.importorskip("torch", reason="exporting needs draftsmith[build]")
    from tiny_bundle import write_tiny_bundle

    folder = write_tiny_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"]["int8"]["vocab_size"] = 260
    write_manifest(folder, manifest)
    assert "int8 are 258 wide" in refusal(lambda: load(folder).engine("int8"))


def test_a_cpu_graph_that_does_not_open_gives_way_to_the_portable_one(tmp_path):
    pytest.importorskip("torch", reason="exporting needs draftsmith[build]")
    from tiny_bundle import write_tiny_bundle

    folder = write_tiny_bundle(tmp_path / "bundle")
    expected = load(folder).logits([1, 2, 3])
    (folder / "target/cpu.onnx").write_bytes(b"of another kind")
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
    with pytest.warns(UserWarning, match="target runs on stock operators"):
        logits = load(folder).logits([1, 2, 3])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": -5}, "max_new_tokens=-5"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": 10**9}, "ask for max_new_tokens <= 255"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed="),
        ({"verify": "typical"}, "verify='typical'"),
        ({"stop": ""}, "stop=''"),
        ({"stop": ["a", ""]}, "stop="),
        ({"speculate": "int8"}, 'wanted "auto", "none" or a list such as ["int8"]'),
        ({"speculate": ["int9"]}, "did you mean 'int8'?"),
        ({"speculate": ["sufix"]}, "did you mean 'suffix'?"),
        ({"speculate": ["int8", "int8"]}, "twice"),
        ({"speculate": ["int8", "target"]}, "leave it out"),
        ({"speculate": ["int8", "suffix"]}, "it comes first"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0"),
        ({"num_speculative_tokens": 1000}, "num_speculative_tokens=1000"),
        ({"num_speculative_tokens": {"tiny": 2}}, "'tiny', which is not in the ladder"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(bundle, settings, said):
    assert said in refusal(lambda: bundle.generate("a", **settings))
    assert said in refusal(lambda: bundle.stream("a", **settings)), "a stream refuses before it is read"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "no tokens"),
        ([], "no tokens"),
        ([BYTE_VOCAB], f"token id {BYTE_VOCAB}"),
        ([3, -1], "token id -1 at position 1"),
        ([1, "b"], "item 1 of the prompt is 'b'"),
        ([1, True], "item 1 of the prompt is True"),
        ([[1, 2]], "item 0 of the prompt is [1, 2]"),
        ("x" * 256, "shorten the prompt"),
        ("x" * 250, "ask for max_new_tokens <= 6"),
        ("\ud800", "cannot be tokenised"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": "a"}, "b"], "message 1"),
        ([{"role": "bad", "content": "a"}], "chat template: no such role"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_prompts_that_cannot_be_are_refused(bundle, prompt, said):
    assert said in refusal(lambda: bundle.generate(prompt, 10))


def test_a_drafter_with_a_shorter_cache_is_named(tmp_path):
    folder = write_bundle(tmp_path / "bundle", engines={"target": {}, "int8": {"max_seq_len": 32}})
    bundle = open_bundle(folder)
    message = refusal(lambda: bundle.generate("x" * 30, 10, speculate=["int8"]))
    assert "the 32 that the cache of int8 holds" in message and 'speculate="none"' in message
    assert len(bundle.generate("x" * 30, 10, speculate="none", ignore_eos=True).token_ids) == 10


def test_evaluation_outside_of_the_cache_or_the_vocabulary_is_refused(bundle):
    assert bundle.logits([1, 2, 3]).shape == (3, BYTE_VOCAB)
    assert bundle.logits(np.array([1, 2, 3]), engine="int8").dtype == np.float32
    assert "no engine 'int4'" in refusal(lambda: bundle.logits([1], engine="int4"))
    assert "token id 300" in refusal(lambda: bundle.logits([300]))


def test_a_conversation_goes_through_the_template(bundle):
    messages = [{"role": "user", "content": "<é> & 'ü'"}, {"role": "assistant", "content": "b"}]
    text = 'user:"<é> & \'ü\'";assistant:"b"!'

    out = bundle.generate(messages, 5, ignore_eos=True)
    wanted = bundle.generate("<bos>" + text, 5, ignore_eos=True)
    assert out.token_ids == wanted.token_ids
    assert out.stats.prompt_tokens == len(bundle.encode(messages)) == 1 + len(text.encode())


def test_a_bundle_without_a_template_says_so(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path / "bundle"))
    assert "no chat template" in refusal(lambda: bundle.generate([{"role": "user", "content": "a"}], 5))
