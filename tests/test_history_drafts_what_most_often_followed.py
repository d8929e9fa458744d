"""The history drafter counts what follows what, here and in earlier outputs, within a budget of memory."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from draftsmith.speculate.binding import check, ffi, lib
from draftsmith.speculate.drafters import Drafter, Sources
from draftsmith.speculate.errors import BundleError
from draftsmith.speculate.ladder import Rung, build_ladder
from draftsmith.speculate.settings import Sampling
from draftsmith.speculate.suffix import SuffixDrafter
from fake_engine import FakeEngine, open_bundle, write_bundle

LONGEST = 64  # DS_SUFFIX_MAX_MATCH
LEAST_SHARE = 0.1
END = lib.DS_END_OF_REFERENCE
LEAST_BYTES = 320_000  # of a history; a little more than must be


def make(max_bytes: int = LEAST_BYTES) -> Drafter:
    return Drafter(lib.ds_history_drafter_create(max_bytes))


def kept(drafter: Drafter):
    size = ffi.new("ds_history_size *")
    check(lib.ds_history_kept(drafter.handle, size))
    return size


# ---- The definition, by looking at every place -------------------------------------------------------------


class Counts:
    """What follows what in one text, which may be the joint text of many: END follows each of those."""

    def __init__(self, text: list[int]):
        self.text = text
        self.known: dict[tuple[int, ...], list[tuple[int, float, int]]] = {}  # by (most, *context)

    def places(self, context: list[int]) -> list[int]:
        """Where something follows the context."""
        n = len(context)
        return [i for i in range(n, len(self.text)) if self.text[i - n : i] == context]

    def ends(self, context: list[int]):
        """(length, places) of every end of `context` that something follows."""
        found = range(1, len(self.text))
        for length in range(1, min(LONGEST, len(context)) + 1):
            found = [i for i in found if i >= length and self.text[i - length] == context[-length]]
            yield length, found

    def follow(self, context: list[int], places: list[int], most: int) -> list[tuple[int, float, int]]:
        """(token, probability, length of what it follows) along the most frequent way to go on."""
        said, probability, context = [], 1.0, context[-LONGEST:]
        while len(said) < most and places:
            length = len(context)
            if length == LONGEST:
                context = context[1:]
                places = self.places(context)
            followers = [self.text[i] for i in places]
            votes, latest = Counter(followers), dict(zip(followers, places, strict=True))
            token = max(votes, key=lambda token: (votes[token], latest[token]))
            probability *= votes[token] / len(places)
            if token == END or probability < LEAST_SHARE:
                break
            said.append((token, probability, length))
            last = len(self.text) - 1
            places = [i + 1 for i in places if self.text[i] == token and i < last]
            context = [*context, token]
        return said


def expected_draft(indexes: list[Counts], text: list[int], most: int) -> tuple[list[int], list[int]]:
    best, best_score = [], 0.0
    for index in indexes:
        for length, places in reversed(list(index.ends(text))):
            context = text[-length:]
            if (most, *context) not in index.known:
                index.known[most, *context] = index.follow(context, places, most)
            said = index.known[most, *context]
            score = 0.0
            for _, probability, _ in said[:length]:
                score += probability
            if score > best_score:
                best, best_score = said, score
    return [token for token, *_ in best], [max(1, int(length * p)) for _, p, length in best]


@pytest.mark.parametrize("vocab", [1, 2, 3, 20])
def test_frequencies_are_those_of_the_text(vocab):
    """What followed each context and how often: counted by a dictionary."""
    rng = np.random.default_rng(vocab)
    for trial in range(6):
        text = rng.integers(vocab, size=150).tolist()
        if trial % 2:
            text = (text[:20] * 12)[:200]
        index, followers, latest = SuffixDrafter(), {}, {}
        for i, token in enumerate(text):
            index.append([token])
            for length in range(1, min(i, LONGEST - 1) + 1):
                context = tuple(text[i - length : i])
                followers.setdefault(context, Counter())[token] += 1
                latest[context, token] = i
        tokens, counts = ffi.new("int32_t[]", 64), ffi.new("int32_t[]", 64)
        for context, votes in followers.items():
            for room in (1, 3, 64):
                n = lib.ds_suffix_next(index._handle, list(context), len(context), room, tokens, counts)
                order = sorted(votes, key=lambda token: (-votes[token], -latest[context, token]))[:room]
                assert list(tokens[0:n]) == order and list(counts[0:n]) == [votes[t] for t in order]
        assert lib.ds_suffix_next(index._handle, [vocab], 1, 9, tokens, counts) == 0


@pytest.mark.parametrize("vocab", [1, 2, 3, 9])
def test_drafts_equal_a_count_of_all_places(vocab):
    """Over generations, with tails, until the first outputs have gone."""
    rng, drafter = np.random.default_rng(vocab), make()
    motif = rng.integers(vocab, size=30).tolist()
    room = measure_room()
    blocks = [Counts([]), Counts([])]  # the younger one first
    drafted = dropped = 0
    for generation in range(40):
        prompt = rng.integers(vocab, size=int(rng.integers(1, 30))).tolist()
        output = rng.integers(vocab, size=int(rng.integers(1, 160))).tolist()
        if generation % 3 == 0:
            output = [*output[:20], *motif, *output[20:60], *motif * (generation % 4)]
        drafter.begin(len(prompt) + len(output))
        drafter.append([*prompt, output[0]])
        said = 1
        while said < len(output):
            count = min(len(output) - said, int(rng.integers(1, 60)))
            drafter.append(output[said : said + count])
            said += count
            tail = [*output[said : said + 2], *rng.integers(vocab, size=int(rng.integers(0, 3))).tolist()]
            text = [*prompt, *output[:said]]
            indexes = [Counts(text), *blocks]
            for pending in ([], tail):
                if generation % 4 == 3 or (pending and vocab == 1):
                    continue
                draft, support = drafter.draft(pending, 9)
                assert (draft, support) == expected_draft(indexes, text + pending, 9)
                drafted += len(draft)
        if len(output) < 2:
            continue
        if room - len(blocks[0].text) < len(output) + 1:
            dropped += bool(blocks[1].text)
            blocks = [Counts([]), blocks[0]]
        blocks[0] = Counts([*blocks[0].text, *output, END])
    assert drafted > 100 and dropped > 0


def measure_room() -> int:
    """Tokens of a block: what is kept of an output that fills it."""
    drafter = make()
    drafter.begin(5000)
    drafter.append([0] * 5000)
    drafter.begin(1)
    drafter.append([0])
    drafter.begin(5000)
    drafter.append([1])
    drafter.append([0] * 4999)
    drafter.begin(0)
    return kept(drafter).n_tokens


# ---- What is kept ------------------------------------------------------------------------------------------


def say(drafter: Drafter, prompt: list[int], output: list[int]) -> None:
    drafter.begin(len(prompt) + len(output))
    drafter.append([*prompt, output[0]])
    drafter.append(output[1:])


def test_outputs_are_kept_and_prompts_are_not():
    drafter = make()
    say(drafter, [1, 2, 3], [4, 5, 6])
    drafter.begin(10)
    drafter.append([9, 1, 2])
    assert drafter.draft([], 3)[0] == []
    assert drafter.draft([4], 3)[0] == [5, 6]
    assert (kept(drafter).n_outputs, kept(drafter).n_tokens) == (1, 4)
    assert drafter.draft([4], 3) == drafter.draft([4], 3), "drafting changes nothing"


def test_the_whole_oldest_outputs_go_and_never_too_few():
    drafter, room, sizes = make(), measure_room(), []
    rng = np.random.default_rng(0)
    for number in range(400):
        size = int(rng.integers(2, room // 4))
        say(drafter, [0], [1000 + number] * size)
        sizes.append(size + 1)
        now = kept(drafter)
        before = sizes[:-1]  # the last one is kept when the next generation begins
        assert now.n_tokens == sum(before[len(before) - now.n_outputs :]) <= 2 * room
        assert now.n_outputs == len(before) or now.n_tokens > room - room // 4
    drafter.begin(9)
    drafter.append([5])
    gone = 400 - kept(drafter).n_outputs
    assert 0 < gone < 400
    for number in range(400):
        assert bool(drafter.draft([1000 + number], 1)[0]) == (number >= gone)


def resident_bytes() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def test_ten_thousand_requests_stay_within_the_budget():
    budget = 2 << 20
    rng, drafter = np.random.default_rng(1), make(budget)
    outputs = rng.integers(50_000, size=(10_000, 60)).tolist()
    largest = 0
    for number, output in enumerate(outputs):
        say(drafter, output[:9], output)
        if number == 1000:
            settled = resident_bytes()
        largest = max(largest, kept(drafter).n_bytes)
    assert 0.9 * budget < largest <= budget
    assert resident_bytes() - settled < 1 << 20
    now = kept(drafter)
    assert now.n_outputs > 50 and now.n_tokens == 61 * now.n_outputs
    drafter.append([outputs[-2][0]])
    assert drafter.draft([], 4)[0] == outputs[-2][1:5]


@pytest.mark.parametrize("max_bytes", [-1, 0, 100_000])
def test_a_budget_that_holds_nothing_is_refused(max_bytes):
    with pytest.raises(BundleError, match=f"{max_bytes} bytes for earlier outputs; at least 2"):
        make(max_bytes)


# ---- In the loop -------------------------------------------------------------------------------------------


def test_what_was_said_before_is_read_off():
    """The second time, after a token or two, every call gives as many as are drafted and one more."""
    engines, sources = {"target": FakeEngine(200, 1)}, Sources()

    def decode(prompt):
        decoder = build_ladder([Rung("history", 7)], engines.__getitem__, open_drafter=sources.open)
        decoder.begin(prompt, 81, Sampling())
        return [token for block in iter(decoder.step, []) for token in block], decoder.counters(1).rounds

    first, slow = decode([3, 1, 4])
    assert len(set(first)) > 40, "a text that repeats itself would need no history"
    again, fast = decode([3, 1, 4])
    assert again == first and slow > 40 and fast <= 2 + 80 / 8 + 1


def test_a_bundle_remembers_until_it_is_told_to_forget(tmp_path):
    bundle = open_bundle(write_bundle(tmp_path / "bundle"))

    def steps():
        return bundle.generate("once", 60, speculate=["history"], ignore_eos=True).stats.steps

    cold, warm = steps(), steps()
    assert warm < cold
    bundle.generate("once", 60, speculate=["history", "int8"], ignore_eos=True)
    bundle.forget()
    assert steps() == cold and steps() == warm
