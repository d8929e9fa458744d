"""Whatever drafts, the tokens are the target's alone: greedy ones, and sampled ones under the exact rule."""

import threading

import numpy as np
import pytest
from decoding import decode, random_costs
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung
from draftsmith.speculate.settings import Sampling
from fake_engine import BYTE_VOCAB, EOS, FakeEngine, open_bundle, write_bundle

LADDERS = [
    ["suffix"],
    ["int8"],
    ["suffix", "int8"],
    ["tiny", "int8"],
    ["suffix", "tiny", "int8"],
]


def decode_greedily(target, prompt, count, eos=()):
    """The reference: no loop, no cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(target.logits_after(tokens))))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


def random_engines(vocab_size, seed):
    return {
        "target": FakeEngine(vocab_size, seed),
        "int8": FakeEngine(vocab_size, seed, noise=0.8, own=1),
        "tiny": FakeEngine(vocab_size, seed, noise=1.6, own=2),
        "mini": FakeEngine(vocab_size, seed, noise=2.4, own=3),
    }


@pytest.mark.parametrize("ladder", LADDERS, ids="-".join)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_output_is_the_targets(ladder, seed):
    rng = np.random.default_rng(seed)
    engines = random_engines(int(rng.choice([2, 3, 5, 8])), seed)
    drafted = accepted = 0
    for prompt_length in (1, 2, 5, 13):
        prompt = rng.integers(engines["target"].vocab_size, size=prompt_length).tolist()
        for length in (1, 2, 3, 24):
            wanted = decode_greedily(engines["target"], prompt, length)
            for outer in (1, 2, 5):
                for inner in (1, 3):
                    counts = [inner] * (len(ladder) - 1) + [outer]
                    rungs = [Rung(name, count) for name, count in zip(ladder, counts, strict=True)]
                    out = decode(engines, rungs, prompt, length)
                    assert out.tokens == wanted
                    drafted += out.drafter.drafted
                    accepted += out.drafter.accepted
    assert 0 < accepted < drafted, "drafts must be taken and refused for this to show anything"


@pytest.mark.parametrize("seed", range(60))
def test_greedy_output_is_the_targets_whatever_the_ladder_and_its_costs(seed):
    rng = np.random.default_rng(seed)
    engines = random_engines(int(rng.choice([2, 3, 5, 8])), seed)
    names = ["suffix", "mini", "tiny", "int8"]
    for _ in range(8):
        ladder = [name for name in names if rng.random() < 0.7] or ["int8"]
        rungs = [Rung(name, int(rng.choice([1, 2, 4, 9]))) for name in ladder]
        priced = [name for name in engines if rng.random() < 0.8]
        prompt = rng.integers(engines["target"].vocab_size, size=int(rng.integers(1, 12))).tolist()
        length = int(rng.integers(1, 60))
        eos = rng.integers(engines["target"].vocab_size, size=int(rng.integers(2))).tolist()
        out = decode(engines, rungs, prompt, length, eos=eos, costs=random_costs(rng, priced))
        assert out.tokens == decode_greedily(engines["target"], prompt, length, eos)


@pytest.mark.parametrize("ladder", LADDERS, ids="-".join)
def test_sampled_output_under_the_exact_rule_is_that_of_plain_sampling(ladder):
    engines, prompt = random_engines(6, seed=3), [0, 1, 2, 0, 1]
    for seed in range(12):
        settings = Sampling(temperature=0.9, top_k=5, top_p=0.95, seed=seed, rule="exact")
        plain = decode(engines, [], prompt, 20, settings).tokens
        for count in (1, 3, 6):
            rungs = [Rung(name, count) for name in ladder]
            costs = random_costs(np.random.default_rng(seed), engines) if seed % 2 else None
            assert decode(engines, rungs, prompt, 20, settings, costs=costs).tokens == plain


@pytest.mark.parametrize("rule", ["token", "block", "exact"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_drafter_equal_to_the_target_is_always_accepted(rule, temperature):
    engines = {name: FakeEngine(9, seed=1) for name in ("target", "int8")}
    out = decode(engines, [Rung("int8", 4)], [1, 2], 31, Sampling(temperature, seed=5, rule=rule))
    assert len(out.tokens) == 31
    assert out.drafter.accepted == out.drafter.drafted == 24
    assert [len(block) for block in out.blocks] == [1] + [5] * 6
    assert engines["target"].calls == 7


def test_no_draft_is_longer_than_the_room_left():
    engines = {name: FakeEngine(9, seed=1) for name in ("target", "int8")}
    for length in range(1, 12):
        out = decode(engines, [Rung("int8", 64)], [1, 2], length)
        assert len(out.tokens) == length
        assert [len(block) for block in out.blocks] == [1, length - 1][: 1 + (length > 1)]
        assert out.drafter.drafted == max(length - 2, 0)


def test_an_end_of_text_inside_a_block_ends_the_output_there():
    ended = 0
    for seed in range(30):
        engines = random_engines(8, seed)
        wanted = decode_greedily(engines["target"], [1, 2, 3], 20, eos=(5, 6))
        for ladder in LADDERS:
            costs = random_costs(np.random.default_rng(seed), engines) if seed % 2 else None
            rungs = [Rung(name, 4) for name in ladder]
            out = decode(engines, rungs, [1, 2, 3], 20, eos=(5, 6), costs=costs)
            assert out.tokens == wanted
            steps, accepted = out.target.rounds - 1, out.drafter.accepted
            assert 1 + steps + accepted == len(out.tokens) + out.target.discarded
            ended += len(out.tokens) < 20 and accepted > 0
    assert ended > 20


@pytest.mark.parametrize(("target_padding", "drafter_padding"), [(0, 5), (5, 0)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vocabularies_padded_differently_decode_alike(target_padding, drafter_padding, temperature):
    # To the drafter its padding ids seem the likeliest: unless they are masked, it drafts nothing else.
    engines = {
        "target": FakeEngine(7, seed=4, padding=target_padding, pad_logit=-30),
        "int8": FakeEngine(7, seed=4, noise=0.5, padding=drafter_padding, pad_logit=9),
    }
    settings = Sampling(temperature, seed=2, rule="exact")
    plain = decode(engines, [], [1, 2, 3], 30, settings)
    out = decode(engines, [Rung("int8", 4)], [1, 2, 3], 30, settings)
    assert out.tokens == plain.tokens
    assert out.drafter.accepted > 0.3 * out.drafter.drafted


def test_the_targets_own_padding_ids_may_be_shown_to_a_drafter_without_them():
    engines = {
        "target": FakeEngine(7, seed=4, padding=3, pad_logit=3),
        "int8": FakeEngine(7, seed=4, noise=0.5),
    }
    wanted = decode_greedily(engines["target"], [1, 2, 3], 30)
    assert max(wanted) >= 7
    assert decode(engines, [Rung("int8", 4)], [1, 2, 3], 30).tokens == wanted


@pytest.fixture
def bundle(tmp_path):
    return open_bundle(write_bundle(tmp_path / "bundle"))


@pytest.mark.parametrize("speculate", ["auto", *LADDERS], ids=str)
def test_stop_strings_cut_tokens_and_text_as_in_plain_decoding(bundle, speculate):
    prompt, settings = "to be or not to be", {"max_new_tokens": 60, "ignore_eos": True}
    whole = bundle.generate(prompt, speculate="none", **settings)
    assert whole.finish_reason == "length"
    for start in range(0, len(whole.text) - 3, 3):
        for length in (1, 2, 5):
            stop = whole.text[start : start + length]
            plain = bundle.generate(prompt, speculate="none", stop=stop, **settings)
            assert plain.text == whole.text[: whole.text.index(stop)]
            assert plain.finish_reason == "stop"
            assert plain.token_ids == whole.token_ids[: len(plain.token_ids)]
            fast = bundle.generate(prompt, speculate=speculate, stop=["never said", stop], **settings)
            assert (fast.text, fast.token_ids, fast.finish_reason) == (plain.text, plain.token_ids, "stop")
            assert stats_conserve(fast.stats)


def stats_conserve(stats):
    return 1 + stats.steps + stats.accepted == stats.emitted + stats.discarded


def test_counters_add_up_while_pieces_come(bundle):
    """Those of a stream are of its pieces so far, and stay when it is given up and the bundle decodes on."""
    run, emitted = bundle.stream("a b a b a b", 40, speculate=["suffix"], ignore_eos=True), 0
    for piece, _ in zip(run, range(6), strict=False):
        emitted += len(piece.token_ids)
        assert run.stats.emitted == emitted and stats_conserve(run.stats)
    run.close()
    counted = run.stats.to_dict()
    bundle.generate("c d", 20, speculate=["suffix"])
    assert run.stats.to_dict() == counted


@pytest.mark.parametrize("ladder", LADDERS, ids="-".join)
def test_counters_add_up(bundle, ladder):
    for seed in range(5):
        out = bundle.generate("a b a b a b", 40, temperature=0.8, seed=seed, speculate=ladder)
        stats = out.stats
        assert stats.emitted == len(out.token_ids)
        assert out.finish_reason == ("eos" if out.token_ids[-1] == EOS else "length")
        assert stats_conserve(stats)
        assert [level.name for level in stats.drafts] == ladder
        for level in stats.drafts:
            assert level.drafted == sum(level.drafted_at)
            assert level.accepted == sum(level.accepted_at)
            assert level.accepted == sum(count * rounds for count, rounds in level.histogram.items())
            assert level.rounds == sum(level.histogram.values())
        assert stats.calls["target"] == stats.steps + 1
        parts = stats.to_dict()["ms"]
        total = parts["prefill"] + sum(parts["draft"].values()) + parts["verify"] + parts["sampling"]
        assert parts["bookkeeping"] >= 0
        assert total + parts["bookkeeping"] == pytest.approx(stats.total_ms)


@pytest.mark.parametrize("stop", [(), ("ab",)])
def test_a_stream_gives_the_text_of_the_whole(bundle, stop):
    # Random bytes: most of them are no valid UTF-8, so that pieces end inside characters all the time.
    for seed in range(8):
        settings = {"max_new_tokens": 80, "temperature": 1.5, "seed": seed, "stop": stop}
        out = bundle.generate("héllo wörld ", **settings)
        pieces = list(bundle.stream("héllo wörld ", **settings))
        assert [token for piece in pieces for token in piece.token_ids] == out.token_ids
        assert "".join(piece.text for piece in pieces) == out.text
        assert len(pieces) > 3
        if not stop:
            assert out.text == bundle.tokenizer.decode(out.token_ids)


def test_characters_split_over_tokens_arrive_whole(tmp_path):
    text = "naïve 日本語 🙂!"
    tokens = list(open_bundle(write_bundle(tmp_path / "b")).tokenizer.encode(text).ids)

    class Recital(FakeEngine):
        def logits_after(self, visible):
            return np.eye(BYTE_VOCAB, dtype=np.float32)[tokens[len(visible) - 1]]

    bundle = open_bundle(tmp_path / "b", target=Recital(BYTE_VOCAB), int8=Recital(BYTE_VOCAB))
    for ladder in ([], ["int8"]):
        pieces = list(bundle.stream([0], len(tokens), speculate=ladder))
        assert "".join(piece.text for piece in pieces) == text
        assert not any("\ufffd" in piece.text for piece in pieces)


def test_two_generations_at_once_are_refused(bundle):
    stream = bundle.stream("one", 20)
    next(stream)
    with pytest.raises(BundleError, match="another generation is under way"):
        bundle.generate("two", 5)
    with pytest.raises(BundleError, match="another generation is under way"):
        bundle.logits([1, 2])
    stream.close()
    assert len(bundle.generate("two", 5, ignore_eos=True).token_ids) == 5

    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(bundle.generate("three", 5, ignore_eos=True)))
    thread.start()
    thread.join()
    assert len(outputs) == 1


def test_the_plan_says_what_auto_means(bundle):
    plan = bundle.plan_for("auto")
    assert plan == {
        "ladder": ["suffix", "int8"],
        "num_speculative_tokens": {"suffix": 6, "int8": 4},
        "verify": "block",
    }
    out = bundle.generate("a b a b", 40, ignore_eos=True)
    assert [level.name for level in out.stats.drafts] == plan["ladder"]
    assert len(out.stats.drafts[-1].drafted_at) == 4
    assert bundle.plan_for("none")["ladder"] == []
    assert sorted(bundle.drafters) == ["int8", "tiny"]


class Failing(FakeEngine):
    """Fails at the call that is named, once."""

    fails_at, error = -1, KeyError("the disk is gone")

    def forward(self, *arguments, **named):
        if self.calls == self.fails_at:
            self.calls += 1
            raise self.error
        return super().forward(*arguments, **named)


@pytest.mark.parametrize("name", ["target", "int8"])
@pytest.mark.parametrize("fails_at", [0, 1, 5])
def test_what_an_engine_raises_comes_out_unchanged_and_frees_the_bundle(tmp_path, name, fails_at):
    engines = {"target": FakeEngine(BYTE_VOCAB), "int8": FakeEngine(BYTE_VOCAB, noise=0.5)}
    engines[name] = Failing(BYTE_VOCAB)
    bundle = open_bundle(write_bundle(tmp_path / "b"), **engines)
    engines[name].fails_at = fails_at
    settings = {"max_new_tokens": 30, "ignore_eos": True, "speculate": ["suffix", "int8"]}
    with pytest.raises(KeyError) as caught:
        bundle.generate("abc", **settings)
    assert caught.value is Failing.error
    assert any(frame.name == "forward" for frame in caught.traceback)
    assert len(bundle.generate("abc", **settings).token_ids) == 30


def test_logits_that_cannot_be_are_refused_with_words(tmp_path):
    class Narrow(FakeEngine):
        def forward(self, *arguments, **named):
            return super().forward(*arguments, **named)[:, 1:]

    class Confused(FakeEngine):
        def logits_after(self, tokens):
            return np.full(self.vocab_size, np.nan, np.float32)

    for engine, words in ((Narrow(BYTE_VOCAB), "wanted 1 rows of 258"), (Confused(BYTE_VOCAB), "NaN")):
        bundle = open_bundle(write_bundle(tmp_path / "b"), target=engine, int8=FakeEngine(BYTE_VOCAB))
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match=words):
                bundle.generate("abc", 3, temperature=temperature)
