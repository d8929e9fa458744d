/* A guest that exchanges what it skips. Sets are scored between rounds, by one pass over tokens that stand: a row for
 * each, which sees what the host read before it, and itself, as the first token of a draft there would. No token is read
 * twice by such passes, so whatever the search does, it costs less than a call with one row for each token. */
#include "swift.h"
#include "error.h"
#include "onnx.h"
#include "skip_search.h"

#include <stdlib.h>
#include <string.h>

enum { LEAST_ROWS = 32, MOST_ROWS = 50 /* of a pass */ };

typedef struct {
  ds_engine base;
  ds_engine *drafter; /* the host without the best set */
  ds_skip_search search;
  int32_t n_decoded,
      n_scored; /* of the generation under way: the tokens heard of, and those that are done with */
  int64_t positions[MOST_ROWS];
  uint8_t *mask;
  size_t mask_size;
} swift_engine;

static ds_engine *skip(const swift_engine *swift, const uint8_t *skips) {
  return ds_onnx_skip(swift->base.host, skips, swift->search.n_sublayers);
}

static void replace_drafter(swift_engine *swift, ds_engine *drafter) {
  swift->drafter->close(swift->drafter);
  swift->drafter = drafter;
}

/* ---- Scoring --------------------------------------------------------------------------------------------- */

static int32_t lay_out(swift_engine *swift, int32_t n_rows, int32_t first, int32_t start) {
  size_t n_seen = (size_t)(start + n_rows), size = (size_t)n_rows * n_seen;
  if (size > swift->mask_size) {
    free(swift->mask);
    swift->mask_size = 0;
    swift->mask = malloc(size);
    if (!swift->mask) return ds_fail(DS_ERROR_MEMORY, "no memory for a mask of %d rows", n_rows);
    swift->mask_size = size;
  }
  memset(swift->mask, 0, size);
  for (int32_t r = 0; r < n_rows; ++r) {
    uint8_t *sees = swift->mask + (size_t)r * n_seen;
    memset(sees, 1, (size_t)(first + r));
    sees[start + r] = 1;
    swift->positions[r] = first + r;
  }
  return DS_OK;
}

/* How many of the last n_rows tokens a drafter would have chosen, each behind those before it. */
static int32_t count_matches(swift_engine *swift, ds_engine *drafter, const int32_t *tokens, int32_t n_tokens,
                             int32_t n_rows) {
  int32_t first = n_tokens - 1 - n_rows, start = n_tokens - 1, n_matches = 0;
  const float *logits;
  int32_t status = lay_out(swift, n_rows, first, start);
  drafter->wants_leaders = 1;
  if (status == DS_OK)
    status = drafter->forward(drafter, n_rows, tokens + first, start, swift->positions, swift->mask, n_rows,
                              &logits);
  drafter->wants_leaders = 0;
  if (status < 0) return status;
  for (int32_t r = 0; r < n_rows; ++r) {
    int32_t choice = ds_argmax(logits + (size_t)r * (size_t)swift->base.vocab, swift->base.vocab);
    if (choice < 0) return choice;
    n_matches += choice == tokens[first + r + 1];
  }
  return n_matches;
}

static int32_t try_another(swift_engine *swift, const int32_t *tokens, int32_t n_tokens, int32_t n_rows) {
  ds_skip_search *search = &swift->search;
  ds_skip_search_propose(search);
  ds_engine *drafter = skip(swift, search->tried);
  if (!drafter) return DS_ERROR_MEMORY; /* the first of its kind was made */
  int32_t n_matches = count_matches(swift, drafter, tokens, n_tokens, n_rows);
  if (n_matches < 0) {
    drafter->close(drafter);
    return n_matches;
  }
  ds_skip_search_score(search, (double)n_matches / n_rows);
  if (memcmp(search->best, search->tried, (size_t)search->n_sublayers))
    drafter->close(drafter);
  else
    replace_drafter(swift, drafter);
  return n_rows;
}

static int32_t adapt(ds_engine *base, const int32_t *tokens, int32_t n_tokens, int32_t n_decoded) {
  swift_engine *swift = (swift_engine *)base;
  if (n_decoded <= swift->n_decoded) swift->n_scored = 0; /* another generation */
  swift->n_decoded = n_decoded;
  int32_t n_new = n_decoded - swift->n_scored, n_rows = n_new < MOST_ROWS ? n_new : MOST_ROWS;
  if (ds_skip_search_is_over(&swift->search) || n_rows < LEAST_ROWS) return 0;
  if (n_rows > base->max_seq_len - (n_tokens - 1)) return 0;
  swift->n_scored = n_decoded;
  int32_t status = try_another(swift, tokens, n_tokens, n_rows);
  return status == DS_ERROR_MEMORY ? 0 : status; /* nothing hangs on it */
}

/* ---- The drafter ----------------------------------------------------------------------------------------- */

static int32_t reserve(ds_engine *base, int32_t n_slots) {
  ds_engine *drafter = ((swift_engine *)base)->drafter;
  return drafter->reserve(drafter, n_slots);
}

static int32_t forward(ds_engine *base, int32_t n_rows, const int32_t *token_ids, int32_t start,
                       const int64_t *positions, const uint8_t *mask, int32_t n_logits,
                       const float **logits) {
  ds_engine *drafter = ((swift_engine *)base)->drafter;
  drafter->wants_leaders = base->wants_leaders;
  int32_t status = drafter->forward(drafter, n_rows, token_ids, start, positions, mask, n_logits, logits);
  drafter->wants_leaders = 0;
  base->peaks = drafter->peaks;
  return status;
}

static int32_t keep(ds_engine *base, int32_t start, const int32_t *slots, int32_t n_slots) {
  ds_engine *drafter = ((swift_engine *)base)->drafter;
  return drafter->keep(drafter, start, slots, n_slots);
}

/* ---- Life ------------------------------------------------------------------------------------------------ */

static void close_engine(ds_engine *base) {
  swift_engine *swift = (swift_engine *)base;
  if (!swift) return;
  if (swift->drafter) swift->drafter->close(swift->drafter);
  ds_skip_search_free(&swift->search);
  free(swift->mask);
  free(swift);
}

ds_engine *ds_swift_create(ds_engine *host, int32_t n_sublayers, double share) {
  swift_engine *swift = calloc(1, sizeof *swift);
  if (!swift) {
    ds_fail(DS_ERROR_MEMORY, "no memory for an engine");
    return NULL;
  }
  if (ds_skip_search_init(&swift->search, n_sublayers, share) != DS_OK) {
    free(swift);
    return NULL;
  }
  swift->base.host = host;
  if (!(swift->drafter = skip(swift, swift->search.best))) {
    close_engine(&swift->base);
    return NULL;
  }
  swift->base = (ds_engine){.vocab = host->vocab,
                            .max_seq_len = host->max_seq_len,
                            .reserve = reserve,
                            .forward = forward,
                            .close = close_engine,
                            .keep = keep,
                            .host = host,
                            .adapt = adapt,
                            .n_scratch = MOST_ROWS};
  return &swift->base;
}

static int32_t check_engine(const ds_engine *engine) {
  return engine && engine->adapt == adapt
             ? DS_OK
             : ds_fail(DS_ERROR_ARGUMENT, "an engine of ds_swift_create is wanted");
}

int32_t ds_swift_forget(ds_engine *engine) {
  int32_t status = check_engine(engine);
  if (status != DS_OK) return status;
  swift_engine *swift = (swift_engine *)engine;
  ds_skip_search_reset(&swift->search);
  ds_engine *drafter = skip(swift, swift->search.best);
  if (!drafter) return DS_ERROR_MEMORY;
  replace_drafter(swift, drafter);
  swift->n_decoded = swift->n_scored = 0;
  return DS_OK;
}

int32_t ds_swift_look(const ds_engine *engine, ds_swift_state *state) {
  int32_t status = check_engine(engine);
  if (status != DS_OK) return status;
  if (!state) return ds_fail(DS_ERROR_ARGUMENT, "state must not be NULL");
  const ds_skip_search *search = &((const swift_engine *)engine)->search;
  *state = (ds_swift_state){.n_sublayers = search->n_sublayers,
                            .n_tried = search->n_tried,
                            .is_over = ds_skip_search_is_over(search),
                            .match = search->match,
                            .tried_match = search->tried_match,
                            .skips = search->best,
                            .tried = search->tried};
  return DS_OK;
}
