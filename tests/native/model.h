/* A model for loops to decode with: an engine that checks what it is asked. */
#ifndef MODEL_H
#define MODEL_H

#include "engine.h"
#include "exercise.h"
#include "failing.h"

enum { SLOTS = 300 };

/* A model whose logits are a hash of its last two tokens, blurred by noise of its own. */
typedef struct {
  ds_engine engine; /* first, so that one pointer serves both */
  int32_t own, slots[SLOTS], n_reserved, n_filled;
  int32_t calls_left; /* before one fails */
  float *logits;      /* a block of the exact size for each call, so that reading past it is seen */
} model;

static uint32_t hash(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t x = a * 0x9E3779B1u ^ b * 0x85EBCA77u ^ c * 0xC2B2AE3Du;
  x ^= x >> 15;
  x *= 0x2C1B3C6Du;
  return x ^ x >> 13;
}

static int32_t reserve(ds_engine *engine, int32_t n_slots) {
  model *m = (model *)engine;
  CHECK(n_slots >= 1 && n_slots <= engine->max_seq_len);
  m->n_reserved = n_slots;
  m->n_filled = 0;
  return DS_OK;
}

static int32_t forward(ds_engine *engine, int32_t n_rows, const int32_t *ids, int32_t start,
                       const int64_t *positions, const uint8_t *mask, int32_t n_logits,
                       const float **logits) {
  model *m = (model *)engine;
  CHECK(n_rows >= 1 && n_logits >= 1 && n_logits <= n_rows && !positions == !mask);
  CHECK(start >= 0 && start <= m->n_filled && start + n_rows <= m->n_reserved);
  if (m->calls_left-- == 0) {
    ds_set_error("this engine had enough");
    return DS_ERROR_ENGINE;
  }
  int32_t kept = spared;
  spared = INT32_MAX; /* an engine may allocate; the loop may not */
  free(m->logits);
  m->logits = malloc((size_t)n_logits * (size_t)engine->vocab * sizeof *m->logits);
  spared = kept;
  for (int32_t i = 0; i < n_rows; ++i) {
    CHECK(ids[i] >= 0 && ids[i] < engine->vocab);
    m->slots[start + i] = ids[i];
  }
  m->n_filled = start + n_rows;
  for (int32_t r = 0; r < n_logits; ++r) {
    int32_t at = start + n_rows - n_logits + r;
    const uint8_t *sees = mask ? mask + (size_t)(n_rows - n_logits + r) * (size_t)m->n_filled : NULL;
    int32_t parent = at - 1, n_seen = 0;
    while (sees && parent >= 0 && !sees[parent]) --parent;
    for (int32_t s = 0; sees && s < m->n_filled; ++s) n_seen += sees[s];
    if (sees) CHECK(sees[at] && positions[n_rows - n_logits + r] == n_seen - 1);
    uint32_t last = (uint32_t)m->slots[at], before = parent >= 0 ? (uint32_t)m->slots[parent] : 99;
    for (int32_t x = 0; x < engine->vocab; ++x)
      m->logits[(size_t)r * (size_t)engine->vocab + (size_t)x] =
          (float)(hash(last, before, (uint32_t)x) % 1000) * 0.006f +
          (float)(hash(last + 7u, (uint32_t)m->own, (uint32_t)x) % 1000) * 0.001f * (float)m->own;
  }
  *logits = m->logits;
  return DS_OK;
}

static int32_t keep(ds_engine *engine, int32_t start, const int32_t *slots, int32_t n_slots) {
  model *m = (model *)engine;
  for (int32_t i = 0; i < n_slots; ++i) {
    CHECK(slots[i] >= start + i && slots[i] < m->n_filled && (i == 0 || slots[i] > slots[i - 1]));
    m->slots[start + i] = m->slots[slots[i]];
  }
  return DS_OK;
}

static model make_model(int32_t vocab, int32_t own) {
  ds_engine engine = {.vocab = vocab,
                      .max_seq_len = SLOTS,
                      .reserve = reserve,
                      .forward = forward,
                      .keep = below(2) ? keep : NULL};
  return (model){.engine = engine, .own = own, .calls_left = -1};
}

#endif
