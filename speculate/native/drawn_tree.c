/* Trees of a model whose shape is fixed before a token is drafted (sequoia.h).
 *
 * The children of a node are drawn without replacement from the model's law: the drawn tree is a sample, and is verified
 * with the laws that its nodes' children came from. So what is drawn decides nothing but what follows it: no node is
 * left out for its token, and a law that runs out of tokens ends a family whichever they were. Behind an end of text
 * nothing is drawn.
 *
 * Where nothing is sampled the children are the likeliest. So they are under DS_RULE_EXACT, but for the first: that is
 * drawn with the verifier's own uniform, which gives its token most often.
 */
#include "error.h"
#include "tree_cache.h"
#include "vector.h"

#include <stddef.h>
#include <string.h>

enum { NONE = -1 };

typedef struct {
  ds_decoder *d;
  level *l;
  ds_tree_cache *cache;
  const ds_sequoia *shape;
  int32_t length, n_nodes, max_depth;
  int32_t tokens[DS_MAX_DRAFT]; /* by node of the shape; NONE: not drawn */
  int32_t rows[DS_MAX_DRAFT];   /* where it was read, or NONE */
  double uniforms[DS_MAX_DRAFT];
} drawing;

static bool is_sampled(const ds_decoder *d) { return !ds_is_greedy(d) && d->sampling.rule != DS_RULE_EXACT; }

/* The law behind a node, where the verdict finds it if it is to be verified. */
static double *law_behind(const drawing *w, int32_t node) {
  return is_sampled(w->d) ? w->l->laws + (size_t)(node + 1) * (size_t)w->d->vocab : w->cache->law;
}

/* ---- Children ------------------------------------------------------------------------------------------ */

/* The next child of `node` behind child `after`, or n_nodes. */
static int32_t find_child(const drawing *w, int32_t node, int32_t after) {
  int32_t child = after + 1;
  while (child < w->n_nodes && w->shape->parents[child] != node) ++child;
  return child;
}

/* A token of a law is drawn as a verdict on no draft. */
static int32_t draw_token(const drawing *w, const double *law, double uniform, int32_t *token) {
  const ds_decoder *d = w->d;
  double uniforms[2] = {uniform, 0};
  int32_t accepted[1], n_accepted;
  int32_t status = d->sampling.verify(ds_tree_rule(d), 0, d->vocab, law, NULL, d->ids + w->length,
                                      d->tree.parents, uniforms, accepted, &n_accepted, token);
  if (status >= 0 && (*token < 0 || *token >= d->vocab))
    return ds_fail(DS_ERROR_ARGUMENT, "verify draws token %d of a vocabulary of %d", *token, d->vocab);
  return status < 0 ? status : DS_OK;
}

/* Scale what is left of a law to 1; whether any is. */
DS_WIDE static bool normalize(double *law, int32_t vocab) {
  double lane[DS_LANES] = {0};
  int32_t x = 0;
  for (; x + DS_LANES <= vocab; x += DS_LANES)
    for (int j = 0; j < DS_LANES; ++j) lane[j] += law[x + j];
  for (int j = 0; x < vocab; ++x, ++j) lane[j] += law[x];
  double sum = ds_add_lanes(lane);
  if (!(sum > 0)) return false;
  for (x = 0; x < vocab; ++x) law[x] /= sum;
  return true;
}

static int32_t draw_children(drawing *w, int32_t node) {
  double *left = w->cache->law;
  size_t size = (size_t)w->d->vocab * sizeof *left;
  int32_t child = find_child(w, node, node), status = DS_OK;
  memcpy(left, law_behind(w, node), size);
  while (status == DS_OK && child < w->n_nodes && normalize(left, w->d->vocab)) {
    status = draw_token(w, left, w->uniforms[child], &w->tokens[child]);
    if (status == DS_OK) left[w->tokens[child]] = 0;
    child = find_child(w, node, child);
  }
  return status;
}

static int32_t choose_children(drawing *w, int32_t node) {
  const ds_candidates *likely = &w->cache->candidates[0];
  int32_t child = find_child(w, node, node), first = NONE, status = DS_OK;
  ds_list_candidates(w->cache, NONE, w->cache->law, w->d->vocab, DS_SEQUOIA_WIDTH);
  if (!ds_is_greedy(w->d)) {
    status = draw_token(w, w->cache->law, w->uniforms[child], &first);
    if (status != DS_OK) return status;
    w->tokens[child] = first;
    child = find_child(w, node, child);
  }
  for (int32_t i = 0; i < likely->n && child < w->n_nodes; ++i) {
    if (likely->tokens[i] == first) continue;
    w->tokens[child] = likely->tokens[i];
    child = find_child(w, node, child);
  }
  return DS_OK;
}

/* From the logits behind a node that has children in the shape. */
static int32_t beget(drawing *w, int32_t node, const float *logits) {
  int32_t status = ds_write_laws_of(w->d, w->l, logits, 1, law_behind(w, node));
  if (status != DS_OK) return status;
  return (is_sampled(w->d) ? draw_children : choose_children)(w, node);
}

/* ---- Levels -------------------------------------------------------------------------------------------- */

/* Enter the nodes of a level that have children. */
static void choose_rows(drawing *w, int32_t depth) {
  for (int32_t i = 0; i < w->n_nodes; ++i) {
    if (w->shape->depths[i] != depth || w->tokens[i] == NONE || ds_ends_text(w->d, w->tokens[i]) ||
        find_child(w, i, i) == w->n_nodes)
      continue;
    int32_t parent = w->shape->parents[i];
    w->rows[i] = ds_tree_cache_add(w->cache, parent < 0 ? NONE : w->rows[parent], w->tokens[i]);
  }
}

/* Draw the level behind this one. */
static int32_t draw_level(drawing *w, int32_t depth) {
  int32_t first = w->cache->n_rows;
  const float *logits;
  choose_rows(w, depth);
  if (w->cache->n_rows == first) return DS_OK;
  int32_t status = ds_tree_cache_read(w->d, w->l, w->length, first, &logits);
  for (int32_t i = 0; i < w->n_nodes && status == DS_OK; ++i)
    if (w->rows[i] >= first)
      status = beget(w, i, logits + (size_t)(w->rows[i] - first) * (size_t)w->l->engine->vocab);
  return status;
}

static void draw_uniforms(drawing *w) {
  uint64_t counter, seed = w->d->sampling.seed;
  if (ds_is_greedy(w->d)) return;
  uint64_t stream = ds_take_uniforms(w->d, w->l, w->length, w->n_nodes, &counter);
  if (is_sampled(w->d))
    ds_uniforms(seed, stream, counter, w->n_nodes, w->uniforms);
  else /* by position */
    for (int32_t i = 0; i < w->n_nodes; ++i)
      ds_uniforms(seed, stream, counter + (uint64_t)w->shape->depths[i], 1, &w->uniforms[i]);
}

/* What was drawn, without gaps; returns how many nodes. */
static int32_t write_tree(const drawing *w) {
  ds_decoder *d = w->d;
  int32_t places[DS_MAX_DRAFT], n = 0;
  for (int32_t i = 0; i < w->n_nodes; ++i) {
    int32_t parent = w->shape->parents[i];
    if (w->tokens[i] == NONE) continue;
    places[i] = n;
    d->ids[w->length + n] = w->tokens[i];
    d->tree.parents[n] = parent < 0 ? NONE : places[parent];
    w->cache->rows[n] = w->rows[i];
    if (is_sampled(d) && n < i && w->rows[i] != NONE)
      memcpy(law_behind(w, n), law_behind(w, i), (size_t)d->vocab * sizeof(double));
    ++n;
  }
  return n;
}

/* How many nodes of the shape have a place: as many as may be written and as may be read, whatever is drawn. */
static int32_t count_nodes(const ds_decoder *d, const level *l, int32_t length) {
  int32_t n = d->cache->sequoia.n_nodes, writable = d->n_slots - length,
          readable = ds_tree_cache_room(l, length);
  if (ds_is_scheduled(l) && n == 0 && ds_explores(&l->trust)) n = 1;
  if (n > writable) n = writable;
  return n < readable ? n : readable;
}

int32_t ds_draw_tree(ds_decoder *d, level *l, int32_t length, int32_t count) {
  ds_sequoia *shape = &d->cache->sequoia;
  ds_sequoia_update(shape, l->n_draft, &l->pace, &l->above->pace);
  drawing w = {.d = d, .l = l, .cache = d->cache, .shape = shape, .length = length};
  w.n_nodes = count_nodes(d, l, length);
  if (w.n_nodes == 0) return 0;
  for (int32_t i = 0; i < w.n_nodes; ++i) w.tokens[i] = w.rows[i] = NONE;
  draw_uniforms(&w);
  w.cache->n_rows = 0;
  const float *logits;
  int32_t status = ds_read_proposal(d, l, length, &logits);
  l->clock += ds_pace_of_call(&l->pace, 1);
  if (status == DS_OK) status = beget(&w, NONE, logits);
  for (int32_t depth = 0; depth + 1 < count && status == DS_OK; ++depth) status = draw_level(&w, depth);
  return status == DS_OK ? write_tree(&w) : status;
}
