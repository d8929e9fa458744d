"""Our decoder computes what transformers computes, for every family, with and without a cache."""

import pytest
import torch
from conftest import VARIANTS
from draftsmith.model.decoder import Decoder, KVCache
from draftsmith.model.store import Checkpoint
from transformers import AutoModelForCausalLM

# Longer than every sliding window above; measured worst: 6e-7 at once, 2e-6 token by token.
NUM_TOKENS = 40
BOUND = 1e-5


@pytest.fixture(params=VARIANTS)
def pair(request, tiny_folder, tiny_checkpoint):
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder(request.param), dtype=torch.float32).eval()
    checkpoint = Checkpoint(tiny_checkpoint(request.param))
    ids = random_ids(checkpoint.config.vocab_size)
    with torch.no_grad():
        logits = reference(ids).logits
    return Decoder.from_checkpoint(checkpoint), ids, logits


def random_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(5))


def error_of(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits - reference).abs().max() / reference.abs().max())


def test_a_whole_sequence(pair):
    decoder, ids, reference = pair
    assert error_of(decoder(ids), reference) < BOUND


def test_token_by_token_behind_a_prompt(pair):
    decoder, ids, reference = pair
    cache = KVCache(decoder.config, batch=2, capacity=NUM_TOKENS)
    chunks = [decoder(ids[:, :7], cache), decoder(ids[:, 7:17], cache)]
    chunks += [decoder.step(ids[:, i : i + 1], cache)[:, None] for i in range(17, NUM_TOKENS)]
    assert error_of(torch.cat(chunks, 1), reference) < BOUND


def test_a_rejected_draft_leaves_no_trace(pair):
    decoder, ids, _ = pair
    cache = KVCache(decoder.config, batch=2, capacity=NUM_TOKENS)
    decoder(ids[:, :20], cache)
    before = decoder(ids[:, 20:21], cache)
    decoder((ids[:, 21:30] + 1) % decoder.config.vocab_size, cache)
    cache.length = 20
    assert torch.equal(decoder(ids[:, 20:21], cache), before)
