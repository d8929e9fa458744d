/* Token Recycling (arXiv 2408.08696): what the level above last found likely after each token.
 *
 * Verifying computes logits for every drafted token, and of rejected ones too they say what the model
 * would go on with. So the likeliest tokens after each are kept, the latest replacing the earlier ones,
 * and a draft follows the first of them from token to token. What then really stands comes first. Also
 * the text of the prompt, of which no logits are seen, is learnt from in this way.
 *
 * A tree takes all the candidates, best first. How likely each rank is right is learnt from the same logits: their
 * likeliest token was at some rank of the row that it now replaces. (The paper's tree is one shape for all texts,
 * found beforehand.)
 */
#include "drafter.h"
#include "error.h"
#include "growth.h"
#include "leaders.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = DS_RECYCLING_WIDTH, NONE = -1, REFUSED = -2 };

/* Before anything is learnt, and how many rows that guess weighs; the counts halve at RANK_ROWS. */
static const double PRIOR[WIDTH] = {0.45, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01};
enum { PRIOR_ROWS = 16, RANK_ROWS = 512 };

typedef struct {
  ds_drafter drafter;
  double seen, right[WIDTH];   /* rows whose token had candidates, and at which rank the likeliest was */
  int32_t vocab, last;         /* last: the latest token that stands, or NONE */
  int32_t candidates[][WIDTH]; /* after each token, the likeliest first; NONE where fewer are known */
} recycling_drafter;

static int32_t begin(ds_drafter *drafter, int32_t n_tokens) {
  recycling_drafter *r = (recycling_drafter *)drafter;
  (void)n_tokens;
  r->last = NONE;
  r->seen = 0;
  memset(r->right, 0, sizeof r->right);
  memset(r->candidates, 0xff, (size_t)r->vocab * sizeof *r->candidates); /* all NONE */
  return DS_OK;
}

static int32_t check_token(const recycling_drafter *r, int32_t token) {
  if (token >= 0 && token < r->vocab) return DS_OK;
  return ds_fail(DS_ERROR_ARGUMENT, "token %d is outside the vocabulary of %d", token, r->vocab);
}

/* ---- Learning ------------------------------------------------------------------------------------------ */

/* Put `token` first; those before its old place move back by one, and the last falls out if it is new. */
static void put_first(int32_t *candidates, int32_t token) {
  int32_t place = 0;
  while (place < WIDTH - 1 && candidates[place] != token) ++place;
  memmove(candidates + 1, candidates, (size_t)place * sizeof *candidates);
  candidates[0] = token;
}

static int32_t append(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens) {
  recycling_drafter *r = (recycling_drafter *)drafter;
  for (int32_t i = 0; i < n_tokens; ++i) {
    int32_t status = check_token(r, tokens[i]);
    if (status != DS_OK) return status;
    if (r->last != NONE) put_first(r->candidates[r->last], tokens[i]);
    r->last = tokens[i];
  }
  return DS_OK;
}

/* `token` is what the candidates [WIDTH] were to guess. */
static void learn_ranks(recycling_drafter *r, const int32_t *candidates, int32_t token) {
  if (candidates[0] == NONE || token == NONE) return;
  if (r->seen >= RANK_ROWS) {
    r->seen /= 2;
    for (int k = 0; k < WIDTH; ++k) r->right[k] /= 2;
  }
  r->seen += 1;
  for (int k = 0; k < WIDTH; ++k) r->right[k] += candidates[k] == token;
}

static int32_t observe(ds_drafter *drafter, const int32_t *tokens, const int32_t *parents, int32_t n_rows,
                       const float *logits, const float *peaks, int32_t vocab) {
  recycling_drafter *r = (recycling_drafter *)drafter;
  (void)parents;
  float likeliest[WIDTH];
  int32_t found[WIDTH];
  for (int32_t i = 0; i < n_rows; ++i) {
    int32_t status = check_token(r, tokens[i]);
    if (status != DS_OK) return status;
    int32_t *candidates = r->candidates[tokens[i]];
    ds_find_leaders(logits + (size_t)i * (size_t)vocab, ds_find_peaks(peaks, vocab, i),
                    vocab < r->vocab ? vocab : r->vocab, WIDTH, likeliest, found);
    learn_ranks(r, candidates, found[0]);
    memcpy(candidates, found, sizeof found);
  }
  return DS_OK;
}

/* ---- Drafting ------------------------------------------------------------------------------------------ */

/* The token behind which a draft begins, or NONE, or an error. */
static int32_t find_start(const recycling_drafter *r, const int32_t *tail, int32_t n_tail) {
  int32_t token = n_tail ? tail[n_tail - 1] : r->last;
  if (token == NONE) return NONE;
  return check_token(r, token) == DS_OK ? token : REFUSED;
}

static int32_t draft(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                     int32_t *tokens, int32_t *support) {
  const recycling_drafter *r = (recycling_drafter *)drafter;
  int32_t token = find_start(r, tail, n_tail), drafted = 0;
  if (token == REFUSED) return DS_ERROR_ARGUMENT;
  while (token != NONE && drafted < max_draft && (token = r->candidates[token][0]) != NONE) {
    tokens[drafted] = token;
    support[drafted++] = 1;
  }
  return drafted;
}

static int32_t draft_tree(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                          int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances) {
  const recycling_drafter *r = (recycling_drafter *)drafter;
  int32_t token = find_start(r, tail, n_tail);
  if (token == REFUSED) return DS_ERROR_ARGUMENT;
  if (token == NONE) return 0;
  ds_growth growth;
  ds_growth_begin(&growth, max_nodes, max_depth, tokens, parents, chances);
  for (int32_t node = -1;; token = tokens[node]) {
    for (int k = 0; k < WIDTH && r->candidates[token][k] != NONE; ++k)
      ds_growth_offer(&growth, node, r->candidates[token][k],
                      (r->right[k] + PRIOR_ROWS * PRIOR[k]) / (r->seen + PRIOR_ROWS), k);
    if ((node = ds_growth_take(&growth)) < 0) return growth.n_nodes;
  }
}

static void close_drafter(ds_drafter *drafter) { free(drafter); }

ds_drafter *ds_recycling_drafter_create(int32_t vocab) {
  if (vocab < 1) {
    ds_fail(DS_ERROR_ARGUMENT, "vocab is %d; at least 1 is wanted", vocab);
    return NULL;
  }
  recycling_drafter *r =
      malloc(offsetof(recycling_drafter, candidates) + (size_t)vocab * sizeof(int32_t[WIDTH]));
  if (!r) {
    ds_fail(DS_ERROR_MEMORY, "no memory for the candidates after %d tokens", vocab);
    return NULL;
  }
  r->drafter = (ds_drafter){.begin = begin,
                            .append = append,
                            .observe = observe,
                            .draft = draft,
                            .draft_tree = draft_tree,
                            .close = close_drafter};
  r->vocab = vocab;
  begin(&r->drafter, 0);
  return &r->drafter;
}

int32_t ds_recycling_candidates(const ds_drafter *drafter, int32_t token, int32_t *candidates) {
  const recycling_drafter *r = (const recycling_drafter *)drafter;
  if (!r || !candidates) return ds_fail(DS_ERROR_ARGUMENT, "a drafter and room for candidates are wanted");
  int32_t status = check_token(r, token), count = 0;
  if (status != DS_OK) return status;
  memcpy(candidates, r->candidates[token], sizeof r->candidates[token]);
  while (count < WIDTH && candidates[count] != NONE) ++count;
  return count;
}
