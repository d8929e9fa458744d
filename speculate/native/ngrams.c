/* Reading a table of n-grams, and drafting by it. */
#include "ngrams.h"
#include "error.h"
#include "growth.h"
#include "schedule.h"

#include <errno.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC "DSNGRAM1"

enum { NONE = -1, MOST_WIDTH = 1024 };

typedef struct {
  char magic[8];
  uint32_t byte_order, vocab, width, unused; /* byte_order: 1 */
  uint8_t model[DS_MODEL_BYTES];
} header;

struct ds_ngrams {
  int32_t vocab, width;
  int32_t *tokens;      /* [vocab + 1, width] */
  float *probabilities; /* [vocab + 1, width] */
};

/* ---- Opening ------------------------------------------------------------------------------------------- */

static int32_t check_header(const char *path, const header *h, int32_t vocab, const uint8_t *model) {
  if (memcmp(h->magic, MAGIC, sizeof h->magic) || h->byte_order != 1)
    return ds_fail(DS_ERROR_ARGUMENT,
                   "%s is no table of n-grams of this version and byte order: build the bundle again", path);
  if (h->vocab != (uint32_t)vocab)
    return ds_fail(DS_ERROR_ARGUMENT, "%s is of a vocabulary of %u, the target's has %d: build it again",
                   path, h->vocab, vocab);
  if (memcmp(h->model, model, sizeof h->model))
    return ds_fail(DS_ERROR_ARGUMENT, "%s was read off another model than this target: build it again", path);
  if (h->width < 1 || h->width > MOST_WIDTH)
    return ds_fail(DS_ERROR_ARGUMENT, "%s has %u tokens in a row; 1 to %d are wanted", path, h->width,
                   MOST_WIDTH);
  return DS_OK;
}

static int32_t read_rows(ds_ngrams *n, FILE *file, const char *path) {
  size_t count = ((size_t)n->vocab + 1) * (size_t)n->width;
  n->tokens = malloc(count * sizeof *n->tokens);
  n->probabilities = malloc(count * sizeof *n->probabilities);
  if (!n->tokens || !n->probabilities) return ds_fail(DS_ERROR_MEMORY, "no memory for %zu n-grams", count);
  if (fread(n->tokens, sizeof *n->tokens, count, file) != count ||
      fread(n->probabilities, sizeof *n->probabilities, count, file) != count || fgetc(file) != EOF)
    return ds_fail(DS_ERROR_ARGUMENT, "%s is longer or shorter than its %d rows: copy or build it again",
                   path, n->vocab + 1);
  for (size_t i = 0; i < count; ++i)
    if (n->tokens[i] < 0 || n->tokens[i] >= n->vocab || !(n->probabilities[i] >= 0) ||
        !(n->probabilities[i] <= 1.001F)) /* rounded */
      return ds_fail(DS_ERROR_ARGUMENT, "%s is damaged at entry %zu: copy or build it again", path, i);
  return DS_OK;
}

ds_ngrams *ds_ngrams_open(const char *path, int32_t vocab, const uint8_t *model) {
  if (!path || !model || vocab < 1) {
    ds_fail(DS_ERROR_ARGUMENT, "a path, a vocabulary (%d) and a model's hash are wanted", vocab);
    return NULL;
  }
  FILE *file = fopen(path, "rb");
  if (!file) {
    ds_fail(DS_ERROR_ARGUMENT, "%s cannot be opened: %s", path, strerror(errno));
    return NULL;
  }
  header h = {.byte_order = 0};
  int32_t status = DS_ERROR_ARGUMENT;
  ds_ngrams *n = calloc(1, sizeof *n);
  if (!n)
    status = ds_fail(DS_ERROR_MEMORY, "no memory for n-grams");
  else if (fread(&h, sizeof h, 1, file) != 1)
    status = ds_fail(DS_ERROR_ARGUMENT, "%s is no table of n-grams, or was cut short", path);
  else
    status = check_header(path, &h, vocab, model);
  if (status == DS_OK) {
    n->vocab = vocab;
    n->width = (int32_t)h.width;
    status = read_rows(n, file, path);
  }
  fclose(file);
  if (status == DS_OK) return n;
  ds_ngrams_free(n);
  return NULL;
}

void ds_ngrams_free(ds_ngrams *n) {
  if (!n) return;
  free(n->tokens);
  free(n->probabilities);
  free(n);
}

int32_t ds_ngrams_next(const ds_ngrams *n, int32_t token, int32_t room, int32_t *tokens,
                       float *probabilities) {
  if (!n || room < 0 || (room > 0 && (!tokens || !probabilities)))
    return ds_fail(DS_ERROR_ARGUMENT, "a table and room for %d tokens are wanted", room);
  if (token < NONE || token >= n->vocab)
    return ds_fail(DS_ERROR_ARGUMENT, "token %d is outside the vocabulary of %d", token, n->vocab);
  if (room > n->width) room = n->width;
  if (room == 0) return 0;
  size_t row = (size_t)(token == NONE ? n->vocab : token) * (size_t)n->width;
  memcpy(tokens, n->tokens + row, (size_t)room * sizeof *tokens);
  memcpy(probabilities, n->probabilities + row, (size_t)room * sizeof *probabilities);
  return room;
}

/* ---- As a drafter -------------------------------------------------------------------------------------- */

typedef struct {
  ds_drafter drafter;
  const ds_ngrams *ngrams;
  int32_t last; /* the latest token that stands, or NONE */
} bigram_drafter;

static int32_t begin(ds_drafter *drafter, int32_t n_tokens) {
  (void)n_tokens;
  ((bigram_drafter *)drafter)->last = NONE;
  return DS_OK;
}

static int32_t append(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens) {
  if (n_tokens > 0) ((bigram_drafter *)drafter)->last = tokens[n_tokens - 1];
  return DS_OK;
}

static int32_t draft(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                     int32_t *tokens, int32_t *support) {
  const bigram_drafter *b = (bigram_drafter *)drafter;
  int32_t token = n_tail ? tail[n_tail - 1] : b->last;
  float probability;
  for (int32_t i = 0; i < max_draft; ++i) {
    int32_t found = ds_ngrams_next(b->ngrams, token, 1, &tokens[i], &probability);
    if (found < 0) return found;
    token = tokens[i];
    support[i] = ds_match_of_chance((double)probability);
  }
  return max_draft;
}

/* The chance of a token is the model's own after the token before it alone. */
static int32_t draft_tree(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                          int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances) {
  const bigram_drafter *b = (const bigram_drafter *)drafter;
  int32_t token = n_tail ? tail[n_tail - 1] : b->last, next[DS_MAX_DRAFT];
  float probabilities[DS_MAX_DRAFT];
  ds_growth growth;
  ds_growth_begin(&growth, max_nodes, max_depth, tokens, parents, chances);
  for (int32_t node = -1;; token = tokens[node]) {
    int32_t n = ds_ngrams_next(b->ngrams, token, growth.max_nodes, next, probabilities);
    if (n < 0) return n;
    for (int32_t i = 0; i < n; ++i)
      ds_growth_offer(&growth, node, next[i], fmin((double)probabilities[i], 1), i);
    if ((node = ds_growth_take(&growth)) < 0) return growth.n_nodes;
  }
}

static void close_drafter(ds_drafter *drafter) { free(drafter); }

ds_drafter *ds_bigram_drafter_create(const ds_ngrams *ngrams) {
  if (!ngrams) {
    ds_fail(DS_ERROR_ARGUMENT, "a drafter wants a table of n-grams");
    return NULL;
  }
  bigram_drafter *b = calloc(1, sizeof *b);
  if (!b) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a drafter");
    return NULL;
  }
  b->drafter = (ds_drafter){
      .begin = begin, .append = append, .draft = draft, .draft_tree = draft_tree, .close = close_drafter};
  b->ngrams = ngrams;
  b->last = NONE;
  return &b->drafter;
}
