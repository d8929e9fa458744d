/* A decoder's life: what it is given is checked here, and all its memory is taken here. */
#include "decoder.h"
#include "arguments.h"
#include "laws.h"
#include "tree_cache.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Memory and checks --------------------------------------------------------------------------------- */

static int32_t check_costs(const ds_level *levels, int32_t i) {
  const ds_level *l = &levels[i];
  int32_t rows = i > 0 ? levels[i - 1].n_draft + 1 : l->tree ? l->n_draft : 1;
  if (!l->costs) return DS_OK;
  if (!l->engine) return ds_fail(DS_ERROR_ARGUMENT, "level %d has no engine, and so has no costs", i);
  if (l->n_costs < rows || l->n_costs > DS_MOST_ROWS)
    return ds_fail(DS_ERROR_ARGUMENT, "level %d: costs of %d row counts; %d to %d are wanted", i, l->n_costs,
                   rows, DS_MOST_ROWS);
  for (int32_t r = 0; r < l->n_costs; ++r)
    if (!(l->costs[r] > 0 && l->costs[r] < INFINITY))
      return ds_fail(DS_ERROR_ARGUMENT, "level %d: %d rows cost %g ms", i, r + 1, l->costs[r]);
  return DS_OK;
}

static int32_t check_host(const ds_level *levels, int32_t n_levels, int32_t i) {
  const ds_engine *engine = levels[i].engine;
  if (!engine || !engine->host) return DS_OK;
  for (int32_t k = i + 1; k < n_levels; ++k)
    if (levels[k].engine == engine->host) return DS_OK;
  return ds_fail(DS_ERROR_ARGUMENT, "the engine of level %d drafts in the cache of one that is not above it",
                 i);
}

static int32_t check_levels(const ds_level *levels, int32_t n_levels) {
  if (!levels || n_levels < 1 || n_levels > DS_MAX_LEVELS)
    return ds_fail(DS_ERROR_ARGUMENT, "a decoder of %d levels; 1 to %d are wanted", n_levels, DS_MAX_LEVELS);
  for (int32_t i = 0; i < n_levels; ++i) {
    const ds_level *l = &levels[i];
    int is_target = i == n_levels - 1;
    if (!l->engine && (i > 0 || is_target))
      return ds_fail(DS_ERROR_ARGUMENT, "level %d has no engine; only the first drafter may have none", i);
    if (l->engine && (!l->engine->reserve || !l->engine->forward || l->engine->vocab < 1))
      return ds_fail(DS_ERROR_ARGUMENT, "the engine of level %d has no functions or no vocabulary", i);
    if (l->engine && l->drafter)
      return ds_fail(DS_ERROR_ARGUMENT, "level %d has an engine and a drafter; one of them is wanted", i);
    if (l->drafter && (!l->drafter->begin || !l->drafter->append || !l->drafter->draft))
      return ds_fail(DS_ERROR_ARGUMENT, "the drafter of level %d has no functions", i);
    if (l->tree && l->engine && (i > 0 || is_target))
      return ds_fail(DS_ERROR_ARGUMENT,
                     "level %d is a model that drafts trees: it has no drafter of its own, so it comes first",
                     i);
    if (l->tree < DS_CHAIN || l->tree > (l->engine ? DS_SEQUOIA : DS_TREE))
      return ds_fail(DS_ERROR_ARGUMENT, "level %d: tree is %d, none of ds_branching%s", i, l->tree,
                     l->engine ? "" : " for drafters without an engine");
    if (is_target ? l->n_draft != 0 : l->n_draft < 1 || l->n_draft > DS_MAX_DRAFT)
      return ds_fail(DS_ERROR_ARGUMENT, "level %d drafts %d tokens; 1 to %d are wanted, of the target 0", i,
                     l->n_draft, DS_MAX_DRAFT);
    for (int32_t k = 0; k < i; ++k)
      if (levels[k].engine == l->engine)
        return ds_fail(DS_ERROR_ARGUMENT, "levels %d and %d share an engine and so its cache", k, i);
    int32_t status = check_host(levels, n_levels, i);
    if (status == DS_OK) status = check_costs(levels, i);
    if (status != DS_OK) return status;
  }
  return DS_OK;
}

ds_decoder *ds_decoder_create(const ds_level *levels, int32_t n_levels) {
  if (check_levels(levels, n_levels) != DS_OK) return NULL;
  ds_decoder *d = calloc(1, sizeof *d);
  if (!d) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a decoder");
    return NULL;
  }
  d->n_levels = n_levels;
  d->vocab = levels[n_levels - 1].engine->vocab;
  for (int32_t i = 0; i < n_levels; ++i) {
    level *l = &d->levels[i];
    l->engine = levels[i].engine;
    l->drafter = levels[i].drafter;
    l->owned = !l->engine && !l->drafter;
    if (l->owned && !(l->drafter = ds_suffix_drafter_create(NULL, 0))) {
      ds_decoder_free(d);
      return NULL;
    }
    l->inner = i > 0 ? l - 1 : NULL;
    l->above = i + 1 < n_levels ? l + 1 : NULL;
    l->n_draft = levels[i].n_draft;
    l->tree = l->engine || l->drafter->draft_tree ? levels[i].tree : DS_CHAIN;
    l->stream = (uint64_t)i + 1;
    if (!levels[i].costs) continue;
    size_t size = (size_t)levels[i].n_costs * sizeof(double);
    double *costs = malloc(size);
    if (!costs) {
      ds_fail(DS_ERROR_MEMORY, "no memory for %d costs", levels[i].n_costs);
      ds_decoder_free(d);
      return NULL;
    }
    memcpy(costs, levels[i].costs, size);
    l->pace.costs = costs;
    l->pace.n_costs = levels[i].n_costs;
  }
  if (d->levels[0].engine && d->levels[0].tree && !(d->cache = calloc(1, sizeof *d->cache))) {
    ds_fail(DS_ERROR_MEMORY, "no memory to draft trees");
    ds_decoder_free(d);
    return NULL;
  }
  return d;
}

static void release(ds_decoder *d) {
  for (int32_t i = 0; i < d->n_levels; ++i) {
    free(d->levels[i].laws);
    d->levels[i].laws = NULL;
  }
  free(d->ids);
  free(d->eos);
  free(d->scratch);
  free(d->positions);
  free(d->mask);
  if (d->cache) free(d->cache->law);
  if (d->cache) d->cache->law = NULL;
  d->ids = d->eos = NULL;
  d->scratch = NULL;
  d->positions = NULL;
  d->mask = NULL;
}

void ds_decoder_free(ds_decoder *d) {
  if (!d) return;
  release(d);
  for (int32_t i = 0; i < d->n_levels; ++i) {
    free((void *)d->levels[i].pace.costs);
    if (d->levels[i].owned) ds_drafter_close(d->levels[i].drafter);
  }
  free(d->cache);
  free(d);
}

static int32_t check_sampling(const ds_sampling *s) {
  if (!s) return ds_fail(DS_ERROR_ARGUMENT, "sampling settings are missing");
  if (s->rule < DS_RULE_TOKEN || s->rule > DS_RULE_EXACT)
    return ds_fail(DS_ERROR_ARGUMENT, "rule %d is not one of ds_rule", s->rule);
  return ds_check_processors(s->temperature, s->top_k, s->top_p);
}

static int32_t check_ids(const char *name, const int32_t *ids, int32_t n, int32_t vocab) {
  if (n < 0 || (n > 0 && !ids)) return ds_fail(DS_ERROR_ARGUMENT, "%s: %d ids, or none given", name, n);
  return ds_check_tokens(name, n, ids, vocab);
}

static int32_t check_room(const ds_decoder *d, int32_t n_prompt, int32_t max_new_tokens) {
  if (n_prompt < 1 || max_new_tokens < 1)
    return ds_fail(DS_ERROR_ARGUMENT, "%d prompt tokens and %d new ones; at least one of each is wanted",
                   n_prompt, max_new_tokens);
  for (int32_t i = 0; i < d->n_levels; ++i) {
    const ds_engine *engine = d->levels[i].engine;
    if (engine && (int64_t)n_prompt + max_new_tokens > engine->max_seq_len)
      return ds_fail(DS_ERROR_ARGUMENT,
                     "%d prompt tokens and %d new ones do not fit the %d slots of level %d", n_prompt,
                     max_new_tokens, engine->max_seq_len, i);
  }
  return DS_OK;
}

/* Slots of a level for a sequence of n_tokens: who verifies trees, or drafts them, has room for one behind it, and an
 * engine that learns for what it reads, as far as the cache goes. */
static int32_t count_slots(const level *l, int32_t n_tokens) {
  int32_t most = l->engine->max_seq_len, behind = l->tree ? DS_TREE_ROWS : 0;
  if (l->inner && l->inner->tree) behind += l->inner->n_draft;
  if (behind < l->engine->n_scratch) behind = l->engine->n_scratch;
  return behind < most - n_tokens ? n_tokens + behind : most;
}

/* Room in a level's cache for itself and its guests; a guest has none of its own. */
static int32_t reserve(const ds_decoder *d, level *l, int32_t n_tokens) {
  l->n_slots = count_slots(l, n_tokens);
  if (l->engine->host) return DS_OK;
  int32_t n_slots = 0;
  for (int32_t i = 0; i < d->n_levels; ++i) {
    const level *user = &d->levels[i];
    if (user != l && !(user->engine && user->engine->host == l->engine)) continue;
    int32_t wanted = count_slots(user, n_tokens);
    if (n_slots < wanted) n_slots = wanted;
  }
  return l->engine->reserve(l->engine, n_slots);
}

/* All that a generation of n_tokens needs. */
static int32_t allocate(ds_decoder *d, int32_t n_tokens, int32_t n_eos) {
  int complete = 1;
  d->n_slots = n_tokens;
  if (d->levels[0].tree) d->n_slots = count_slots(&d->levels[1], n_tokens);
  d->ids = malloc((size_t)d->n_slots * sizeof *d->ids);
  d->eos = malloc((size_t)(n_eos ? n_eos : 1) * sizeof *d->eos);
  complete = d->ids && d->eos;
  if (d->levels[0].tree && complete) {
    int32_t n_slots =
        d->cache ? count_slots(&d->levels[0], n_tokens) : 0; /* that a row of the mask may have */
    if (n_slots < d->n_slots) n_slots = d->n_slots;
    d->positions = malloc(DS_MOST_ROWS * sizeof *d->positions);
    d->mask = malloc((size_t)DS_MOST_ROWS * (size_t)n_slots);
    complete = d->positions && d->mask;
  }
  if (d->cache) complete = complete && (d->cache->law = malloc((size_t)d->vocab * sizeof *d->cache->law));
  if (!ds_is_greedy(d) || d->cache)
    complete = complete && (d->scratch = malloc(ds_laws_scratch_size(d->vocab)));
  for (int32_t i = 0; i < d->n_levels && complete; ++i) {
    level *l = &d->levels[i];
    /* A drafter has laws for its longest proposal; the target for its drafter's and the token after it. */
    int32_t rows = l->above ? l->n_draft : l->inner ? l->inner->n_draft + 1 : 1;
    if (l->above && l->inner && l->inner->tree) rows += l->inner->n_draft;
    bool chosen = l->tree && (l->tree != DS_SEQUOIA || d->sampling.rule == DS_RULE_EXACT);
    if (l->engine && !chosen && !ds_is_greedy(d) && !d->on_device)
      complete = !!(l->laws = malloc((size_t)rows * (size_t)d->vocab * sizeof *l->laws));
  }
  return complete ? DS_OK : ds_fail(DS_ERROR_MEMORY, "no memory to decode %d tokens", n_tokens);
}

/* Logits stay on the device where every engine can decide there, on one vocabulary and on chains, and nothing on
 * the host wants to see them: a schedule, a drafter that observes, a verdict of the caller's own. */
static int stays_on_device(const ds_decoder *d, const ds_sampling *sampling) {
  if (sampling->verify) return 0;
  for (int32_t i = 0; i < d->n_levels; ++i) {
    const level *l = &d->levels[i];
    if (l->pace.costs || l->tree) return 0;
    if (l->engine ? !l->engine->decide || l->engine->vocab != d->vocab : l->drafter->observe != NULL)
      return 0;
  }
  return 1;
}

static void reset(level *l) {
  l->kept = 0;
  l->drawn = 0;
  l->clock = 0;
  memset(&l->stats, 0, sizeof l->stats);
  ds_pace_reset(&l->pace);
  ds_trust_reset(&l->trust);
}

int32_t ds_decoder_begin(ds_decoder *d, const ds_sampling *sampling, const int32_t *prompt, int32_t n_prompt,
                         int32_t max_new_tokens, const int32_t *eos, int32_t n_eos) {
  if (!d) return ds_fail(DS_ERROR_ARGUMENT, "begin wants a decoder");
  d->begun = 0;
  int32_t status = check_sampling(sampling);
  if (status == DS_OK) status = check_ids("prompt", prompt, n_prompt, d->vocab);
  if (status == DS_OK) status = check_ids("eos", eos, n_eos, d->vocab);
  if (status == DS_OK) status = check_room(d, n_prompt, max_new_tokens);
  if (status != DS_OK) return status;

  release(d);
  d->sampling = *sampling;
  d->on_device = stays_on_device(d, sampling);
  if (!d->sampling.verify) d->sampling.verify = ds_verify_tree;
  /* Where nothing is verified, draw as that rule does, so that its output and plain sampling's agree. */
  if (d->n_levels == 1) d->sampling.rule = DS_RULE_EXACT;
  status = allocate(d, n_prompt + max_new_tokens, n_eos);
  for (int32_t i = 0; i < d->n_levels && status == DS_OK; ++i) {
    level *l = &d->levels[i];
    reset(l);
    if (l->engine && l->tree) ds_sequoia_reset(&d->cache->sequoia);
    status = l->engine ? reserve(d, l, n_prompt + max_new_tokens)
                       : l->drafter->begin(l->drafter, n_prompt + max_new_tokens);
    if (status > 0) status = DS_OK;
  }
  if (status != DS_OK) return status;
  memcpy(d->ids, prompt, (size_t)n_prompt * sizeof *prompt);
  if (n_eos) memcpy(d->eos, eos, (size_t)n_eos * sizeof *eos);
  d->committed = d->n_prompt = n_prompt;
  d->n_eos = n_eos;
  d->left = max_new_tokens;
  d->begun = d->first = 1;
  return DS_OK;
}

/* ---- What it did --------------------------------------------------------------------------------------- */

static int32_t check_level(const ds_decoder *d, int32_t i) {
  if (!d || i < 0 || i >= d->n_levels)
    return ds_fail(DS_ERROR_ARGUMENT, "level %d of a decoder of %d", i, d ? d->n_levels : 0);
  return DS_OK;
}

int32_t ds_decoder_stats(const ds_decoder *d, int32_t i, ds_level_stats *stats) {
  int32_t status = check_level(d, i);
  if (status != DS_OK) return status;
  if (!stats) return ds_fail(DS_ERROR_ARGUMENT, "stats must not be NULL");
  *stats = d->levels[i].stats;
  return DS_OK;
}

int32_t ds_decoder_kept(const ds_decoder *d, int32_t i) {
  int32_t status = check_level(d, i);
  return status == DS_OK ? d->levels[i].kept : status;
}
