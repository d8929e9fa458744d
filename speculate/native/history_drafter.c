/* SuffixDecoding (arXiv 2411.04975): what most often followed, here or in the outputs of earlier generations.
 *
 * Three indexes count what follows what: that of this generation's text, and two blocks of earlier outputs.
 * Of each, every end of the text that occurs there proposes the most frequent way to go on. The score of a
 * proposal is the sum of its tokens' probabilities, over as many tokens as matched; the best is drafted, and
 * goes on for as long as its probability is no less than LEAST_SHARE.
 *
 * The budget. Outputs go into the younger block. Where one has no room left, the older block, which holds the
 * oldest outputs and those whole, is emptied and becomes the younger one. So memory is taken once, and between
 * half of it and all of it is in use.
 */
#include "drafter.h"
#include "error.h"
#include "suffix.h"

#include <stdlib.h>

enum { BLOCKS = 2, LEAST_TOKENS = 1024 /* of a block */ };
static const double LEAST_SHARE = 0.1;

typedef struct {
  ds_suffix *index;
  int32_t n_tokens, n_outputs;
  ds_match here; /* of the text of this generation */
} block;

typedef struct {
  ds_drafter drafter;
  ds_suffix *text;
  int32_t n_prompt;     /* its tokens in the first addition, but the last, which is the first of the output */
  block blocks[BLOCKS]; /* the younger one first */
  int32_t block_tokens; /* room */
} history_drafter;

/* ---- Keeping outputs ----------------------------------------------------------------------------------- */

static void keep_output(history_drafter *h) {
  int32_t n_text;
  const int32_t *output = ds_suffix_tokens(h->text, &n_text) + h->n_prompt;
  int32_t n = n_text - h->n_prompt;
  if (n < 2) return; /* nothing follows anything */
  if (n > h->block_tokens - 1) n = h->block_tokens - 1;
  if (h->block_tokens - h->blocks[0].n_tokens < n + 1) {
    block oldest = h->blocks[1];
    ds_suffix_clear(oldest.index);
    oldest.n_tokens = oldest.n_outputs = 0;
    h->blocks[1] = h->blocks[0];
    h->blocks[0] = oldest;
  }
  static const int32_t end = DS_END_OF_REFERENCE;
  ds_suffix_append(h->blocks[0].index, output, n); /* there is room: it cannot fail */
  ds_suffix_append(h->blocks[0].index, &end, 1);
  h->blocks[0].n_tokens += n + 1;
  h->blocks[0].n_outputs += 1;
}

static int32_t begin(ds_drafter *drafter, int32_t n_tokens) {
  history_drafter *h = (history_drafter *)drafter;
  if (n_tokens < 0) return ds_fail(DS_ERROR_ARGUMENT, "a generation of %d tokens", n_tokens);
  keep_output(h);
  ds_suffix_clear(h->text);
  h->n_prompt = 0;
  for (int i = 0; i < BLOCKS; ++i) h->blocks[i].here = DS_NO_MATCH;
  return ds_suffix_reserve(h->text, n_tokens);
}

static int32_t append(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens) {
  history_drafter *h = (history_drafter *)drafter;
  int32_t n_text, status = ds_suffix_append(h->text, tokens, n_tokens);
  if (status != DS_OK) return status;
  ds_suffix_tokens(h->text, &n_text);
  if (n_text == n_tokens && n_tokens > 0) h->n_prompt = n_tokens - 1;
  for (int b = 0; b < BLOCKS; ++b)
    for (int32_t i = 0; i < n_tokens; ++i)
      h->blocks[b].here = ds_suffix_match_next(h->blocks[b].index, h->blocks[b].here, tokens[i]);
  return DS_OK;
}

/* ---- Drafting ------------------------------------------------------------------------------------------ */

typedef struct {
  const ds_suffix *index;
  ds_match match;
  double score;
} proposal;

/* Follow a match for at most `most` tokens; how many. support and tokens may be NULL; sum: of probabilities. */
static int32_t follow(const ds_suffix *index, ds_match match, int32_t most, int32_t *tokens, int32_t *support,
                      double *sum) {
  double probability = 1, share;
  *sum = 0;
  for (int32_t i = 0; i < most; ++i) {
    int32_t rests_on = match.length, token = ds_suffix_follow(index, &match, &share);
    if (token < 0 || token == DS_END_OF_REFERENCE || (probability *= share) < LEAST_SHARE) return i;
    *sum += probability;
    if (!tokens) continue;
    tokens[i] = token;
    support[i] = (int32_t)(rests_on * probability);
    if (support[i] < 1) support[i] = 1;
  }
  return most;
}

/* Every end of the text that occurs in an index, the longest first; of equal scores that one stays. */
static void consider(const ds_suffix *index, ds_match match, int32_t max_draft, proposal *best) {
  for (; match.length > 0; match = ds_suffix_match_less(index, match)) {
    double score;
    follow(index, match, match.length < max_draft ? match.length : max_draft, NULL, NULL, &score);
    if (score > best->score) *best = (proposal){index, match, score};
  }
}

static int32_t draft(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                     int32_t *tokens, int32_t *support) {
  const history_drafter *h = (history_drafter *)drafter;
  proposal best = {NULL, DS_NO_MATCH, 0};
  for (int i = -1; i < BLOCKS; ++i) { /* the text itself first: of equals it is the nearest */
    const ds_suffix *index = i < 0 ? h->text : h->blocks[i].index;
    ds_match match = i < 0 ? ds_suffix_match_end(index) : h->blocks[i].here;
    for (int32_t k = 0; k < n_tail; ++k) match = ds_suffix_match_next(index, match, tail[k]);
    consider(index, match, max_draft, &best);
  }
  double sum;
  return best.index ? follow(best.index, best.match, max_draft, tokens, support, &sum) : 0;
}

/* ---- Life ---------------------------------------------------------------------------------------------- */

static void close_drafter(ds_drafter *drafter) {
  history_drafter *h = (history_drafter *)drafter;
  ds_suffix_free(h->text);
  for (int i = 0; i < BLOCKS; ++i) ds_suffix_free(h->blocks[i].index);
  free(h);
}

/* As many tokens as a share of the memory holds, or 0. */
static int32_t tokens_within(int64_t n_bytes) {
  int32_t low = 0, high = DS_SUFFIX_MAX_TOKENS;
  while (low < high) {
    int32_t middle = low + (high - low + 1) / 2;
    if ((int64_t)ds_suffix_bytes(middle) <= n_bytes)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

ds_drafter *ds_history_drafter_create(int64_t max_bytes) {
  int32_t room = tokens_within(max_bytes / BLOCKS);
  if (room < LEAST_TOKENS) {
    ds_fail(DS_ERROR_ARGUMENT, "%lld bytes for earlier outputs; at least %lld are wanted",
            (long long)max_bytes, (long long)(BLOCKS * ds_suffix_bytes(LEAST_TOKENS)));
    return NULL;
  }
  history_drafter *h = calloc(1, sizeof *h);
  if (!h) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a drafter");
    return NULL;
  }
  h->drafter = (ds_drafter){.begin = begin, .append = append, .draft = draft, .close = close_drafter};
  h->block_tokens = room;
  int complete = !!(h->text = ds_suffix_create());
  for (int i = 0; i < BLOCKS && complete; ++i)
    complete =
        (h->blocks[i].index = ds_suffix_create()) && ds_suffix_reserve(h->blocks[i].index, room) == DS_OK;
  if (complete) return &h->drafter;
  close_drafter(&h->drafter);
  return NULL;
}

int32_t ds_history_kept(const ds_drafter *drafter, ds_history_size *size) {
  const history_drafter *h = (const history_drafter *)drafter;
  if (!h || !size) return ds_fail(DS_ERROR_ARGUMENT, "a drafter and room for its size are wanted");
  *size = (ds_history_size){0};
  for (int i = 0; i < BLOCKS; ++i) {
    size->n_outputs += h->blocks[i].n_outputs;
    size->n_tokens += h->blocks[i].n_tokens;
    size->n_bytes += (int64_t)ds_suffix_bytes(h->block_tokens);
  }
  return DS_OK;
}
