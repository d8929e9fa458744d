/* The decode loop: levels that draft for one another, the target last.
 *
 * Proposals are exact samples. What a level proposes follows its own law, whatever it was drafted from, since
 * it verified that losslessly. So the level above may verify it with that law. This holds as long as the end of
 * a proposal depends on nothing but the tokens kept in it, the laws given those, and the past. A level may
 * stop after an end-of-text token, at a length fixed beforehand, where a round ended, or where more does not
 * pay. It may not look at a token and then drop it: to propose only the accepted drafts without the level's
 * own token after them, or to leave out a token for its low probability, selects among samples, and the
 * verdict on them is no longer lossless. Drafts that are not sampled may be cut as one likes: those of a
 * drafter without an engine, greedy ones, and all under DS_RULE_EXACT, which takes any draft whatever.
 *
 * A level that is asked for n tokens gives n, in as many rounds as that takes, unless they do not pay: the
 * call above that verifies them is the dear one. Its own drafter is asked for at most one token less than is
 * missing, so no round overshoots.
 *
 * One array holds the sequence. Tokens 0 .. committed are decided; levels write their proposals right behind
 * them, over one another's. So nesting is cheap: an accepted draft is already where it belongs, and a verdict
 * is one token written at the place of the first rejected one.
 *
 * The first level may propose a tree. Its nodes lie in the array, and in the cache of the level that reads them, in
 * their order; once there is a verdict, the path that stands moves together, and from there on all is as with a
 * chain. The tree of a drafter without an engine is chosen, not sampled, whatever its shape; so is that of
 * engine_tree.c. That of drawn_tree.c is sampled: its shape is fixed beforehand, and it is not cut.
 *
 * A guest (engine.h) drafts in the cache of its host, a level above it, behind the tokens that the host kept. Of what
 * lies there the host sees only what it has written anew, so it never sees a draft's rows. In turn all that it kept is
 * there for the guest, which never reads the prompt.
 *
 * Uniforms are counter-based, each level with a stream of its own. Under DS_RULE_EXACT they are keyed by
 * position alone: then an output token is a function of the seed and the tokens before it, whatever was
 * drafted; and a drafter that draws with its verifier's uniform guesses its token far more often than with
 * one of its own (arXiv 2408.07978).
 */
#include "decoder.h"
#include "error.h"
#include "leaders.h"
#include "tree_cache.h"

#include <stddef.h>
#include <string.h>

enum { BY_POSITION = 0 /* the stream of DS_RULE_EXACT, shared by all levels; level i has stream i + 1 */ };

/* ---- Verdicts ------------------------------------------------------------------------------------------ */

typedef struct {
  int32_t n_accepted, path[DS_MAX_DRAFT]; /* nodes of the proposal, one behind the other */
  int32_t next;                           /* the token behind them */
} verdict;

/* The first child of `node` that is `token`, or -1. */
static int32_t find_child(const ds_decoder *d, int32_t length, int32_t node, int32_t token) {
  for (int32_t i = node + 1; i < d->tree.n_nodes; ++i)
    if (d->tree.parents[i] == node && d->ids[length + i] == token) return i;
  return -1;
}

static int32_t decide_greedily(const ds_decoder *d, const level *l, const float *logits, int32_t length,
                               verdict *v) {
  v->n_accepted = 0;
  for (int32_t node = -1;;) {
    v->next = ds_argmax(logits + (size_t)(node + 1) * (size_t)l->engine->vocab, ds_shared_vocab(d, l));
    if (v->next < 0) return v->next;
    if ((node = find_child(d, length, node, v->next)) < 0) return DS_OK;
    v->path[v->n_accepted++] = node;
  }
}

uint64_t ds_take_uniforms(const ds_decoder *d, level *l, int32_t position, int32_t n, uint64_t *counter) {
  if (d->sampling.rule == DS_RULE_EXACT) {
    *counter = (uint64_t)position;
    return BY_POSITION;
  }
  *counter = l->drawn;
  l->drawn += (uint64_t)n;
  return l->stream;
}

/* For the proposal behind the first `length` tokens. */
static void draw_uniforms(ds_decoder *d, level *l, int32_t length) {
  bool by_position = d->sampling.rule == DS_RULE_EXACT; /* one for each place that a token could take */
  int32_t n = d->tree.n_nodes, count = by_position ? ds_tree_count_levels(&d->tree) + 1 : n + 2;
  double at[DS_MAX_DRAFT + 1];
  uint64_t counter, stream = ds_take_uniforms(d, l, length, count, &counter);
  ds_uniforms(d->sampling.seed, stream, counter, count, by_position ? at : d->uniforms);
  if (!by_position) return;
  d->uniforms[0] = at[0];
  for (int32_t i = 0; i < n; ++i) d->uniforms[i + 1] = at[d->tree.depths[i] + 1];
  d->uniforms[n + 1] = 0; /* not used */
}

/* An accepted path must be one, whoever gave the verdict. */
static int32_t check_verdict(const ds_decoder *d, const verdict *v) {
  int32_t n = d->tree.n_nodes, last = -1;
  if (v->n_accepted < 0 || v->n_accepted > n || v->next < 0 || v->next >= d->vocab)
    return ds_fail(DS_ERROR_ARGUMENT, "verify accepts %d of %d and goes on with token %d", v->n_accepted, n,
                   v->next);
  for (int32_t i = 0; i < v->n_accepted; last = v->path[i++])
    if (v->path[i] <= last || v->path[i] >= n || d->tree.parents[v->path[i]] != last)
      return ds_fail(DS_ERROR_ARGUMENT, "verify accepts node %d behind node %d", v->path[i], last);
  return DS_OK;
}

/* A chain, by the engine itself. */
static int32_t decide_on_device(ds_decoder *d, level *l, int32_t length, int32_t row, verdict *v) {
  const ds_sampling *s = &d->sampling;
  int32_t count = d->tree.n_nodes;
  ds_decision decision = {.temperature = s->temperature,
                          .top_p = s->top_p,
                          .top_k = s->top_k,
                          .rule = s->rule,
                          .seed = s->seed,
                          .n_draft = count,
                          .draft = d->ids + length,
                          .drafter = l->inner && !ds_is_greedy(d) ? l->inner->engine : NULL,
                          .row = row};
  if (!ds_is_greedy(d)) decision.stream = ds_take_uniforms(d, l, length, count + 2, &decision.counter);
  int32_t status = l->engine->decide(l->engine, &decision, &v->n_accepted, &v->next);
  for (int32_t i = 0; i < count; ++i) v->path[i] = i;
  return status < 0 ? status : check_verdict(d, v);
}

/* Accept a path of the proposal behind the first `length` tokens and choose the token after it. `row` is the
 * place of its first token in the proposal that l is building: afterwards the laws from there on are those of
 * the accepted tokens and of the next one. */
static int32_t decide(ds_decoder *d, level *l, const float *logits, int32_t length, int32_t row, verdict *v) {
  if (d->on_device) return decide_on_device(d, l, length, row, v);
  if (ds_is_greedy(d)) return decide_greedily(d, l, logits, length, v);
  size_t size = (size_t)d->vocab;
  double *laws = l->laws + (size_t)row * size;
  int32_t status = ds_write_laws_of(d, l, logits, d->tree.n_nodes + 1, laws);
  if (status != DS_OK) return status;
  draw_uniforms(d, l, length);
  status =
      d->sampling.verify(ds_tree_rule(d), d->tree.n_nodes, d->vocab, laws, l->inner ? l->inner->laws : NULL,
                         d->ids + length, d->tree.parents, d->uniforms, v->path, &v->n_accepted, &v->next);
  if (status >= 0) status = check_verdict(d, v);
  for (int32_t i = 0; status >= 0 && i < v->n_accepted; ++i)
    if (v->path[i] != i)
      memcpy(laws + (size_t)(i + 1) * size, laws + (size_t)(v->path[i] + 1) * size, size * sizeof *laws);
  return status < 0 ? status : DS_OK;
}

/* How many of the `count` tokens from `start` remain if nothing may follow an end-of-text token. */
static int32_t cut_at_eos(const ds_decoder *d, int32_t start, int32_t count) {
  for (int32_t i = 0; i < count; ++i)
    if (ds_ends_text(d, d->ids[start + i])) return i + 1;
  return count;
}

/* ---- Rounds -------------------------------------------------------------------------------------------- */

static const ds_engine *cache_of(const level *l) { return l->engine->host ? l->engine->host : l->engine; }

/* Of what was proposed to `verifier` only the first `length` tokens of the sequence stand. Who shares its cache wrote
 * rows there that its own have overwritten. */
static void roll_back(level *verifier, int32_t length) {
  for (level *l = verifier; l && l->engine; l = l->inner) {
    if (l->kept > length) l->kept = length;
    if (cache_of(l) == cache_of(verifier)) l->kept = verifier->kept;
  }
}

/* The accepted tokens move together behind the first `length`, in the array and in the cache. */
static int32_t keep_path(ds_decoder *d, level *l, int32_t length, const verdict *v) {
  int32_t slots[DS_MAX_DRAFT], in_place = 0;
  while (in_place < v->n_accepted && v->path[in_place] == in_place) ++in_place;
  for (int32_t i = in_place; i < v->n_accepted; ++i) {
    slots[i] = length + v->path[i];
    d->ids[length + i] = d->ids[slots[i]];
  }
  if (in_place == v->n_accepted) return DS_OK;
  if (l->engine->keep)
    return l->engine->keep(l->engine, length + in_place, slots + in_place, v->n_accepted - in_place);
  l->kept = length + in_place;
  return DS_OK;
}

/* Whether l verifies trees that a model drafts. */
static int reads_trees(const level *l) { return l->inner && l->inner->engine && l->inner->tree; }

/* The same for what its drafter read of them; in the same cache those rows are overwritten. */
static int32_t keep_drafted(ds_decoder *d, const level *l, int32_t length, const verdict *v) {
  if (cache_of(l->inner) == cache_of(l)) return DS_OK;
  return ds_tree_cache_keep(d, l->inner, length, v->path, v->n_accepted);
}

static void record_verdict(ds_decoder *d, level *drafter, const verdict *v) {
  const ds_tree *tree = &d->tree;
  ds_level_stats *s = &drafter->stats;
  s->asked += 1;
  s->drafted += tree->n_nodes;
  s->accepted += v->n_accepted;
  for (int32_t i = ds_tree_count_levels(tree) - 1; i >= 0; --i) {
    s->drafted_at[i] += 1;
    s->accepted_at[i] += i < v->n_accepted;
  }
  if (drafter->engine && drafter->tree == DS_SEQUOIA)
    ds_sequoia_learn(&d->cache->sequoia, tree, v->path, v->n_accepted);
  else if (ds_is_scheduled(drafter))
    ds_trust_learn(&drafter->trust, drafter->buckets, tree, v->path, v->n_accepted);
}

static int32_t propose(ds_decoder *d, level *l, int32_t length, int32_t count);

/* One round: draft, verify, write 1 .. room tokens behind the first `length`; returns how many. */
static int32_t advance(ds_decoder *d, level *l, int32_t length, int32_t room, int32_t row) {
  int32_t status = DS_OK;
  double clock = l->inner ? l->inner->clock : 0;
  ds_tree_make_chain(&d->tree, 0);
  if (l->inner && room > 1)
    status = propose(d, l->inner, length, l->inner->n_draft < room ? l->inner->n_draft : room - 1);
  const float *logits = NULL;
  if (status >= 0) status = ds_read_proposal(d, l, length, d->on_device ? NULL : &logits);
  if (status < 0) return status;

  const ds_tree *tree = &d->tree;
  double began = ds_now_ms();
  if (l->inner && l->inner->drafter && l->inner->drafter->observe) {
    status = l->inner->drafter->observe(l->inner->drafter, d->ids + length - 1, tree->parents,
                                        tree->n_nodes + 1, logits, l->engine->peaks, l->engine->vocab);
    if (status < 0) return status;
    double spent = ds_now_ms() - began;
    l->inner->stats.busy_ms += spent;
    began += spent;
  }
  verdict v;
  status = decide(d, l, logits, length, row, &v);
  if (status == DS_OK) status = keep_path(d, l, length, &v);
  if (status == DS_OK && reads_trees(l)) status = keep_drafted(d, l, length, &v);
  if (status < 0) return status;
  if (ds_is_scheduled(l))
    for (int32_t i = 0; i <= v.n_accepted; ++i) {
      int32_t before = i > 0 ? v.path[i - 1] + 1 : 0;
      l->buckets[row + i] =
          ds_bucket_of_law(logits + (size_t)before * (size_t)l->engine->vocab,
                           ds_find_peaks(l->engine->peaks, l->engine->vocab, before), ds_shared_vocab(d, l));
    }
  d->ids[length + v.n_accepted] = v.next;
  roll_back(l, length + v.n_accepted);
  int32_t emitted = cut_at_eos(d, length, v.n_accepted + 1);
  l->stats.rounds += 1;
  l->stats.discarded += v.n_accepted + 1 - emitted;
  if (l->inner && room > 1) record_verdict(d, l->inner, &v);
  double spent = ds_pace_of_call(&l->pace, tree->n_nodes + 1) + (l->inner ? l->inner->clock - clock : 0);
  l->clock += spent;
  ds_pace_add(&l->pace, spent, emitted);
  l->stats.decide_ms += ds_now_ms() - began;
  return emitted;
}

/* A chain of up to `count` tokens from a drafter, into the array and d->tree, with what is known of each. */
static int32_t draft_chain(ds_decoder *d, level *l, int32_t length, int32_t count) {
  int32_t support[DS_MAX_DRAFT];
  int32_t drafted =
      l->drafter->draft(l->drafter, d->ids + l->kept, length - l->kept, count, d->ids + length, support);
  if (drafted > count)
    return ds_fail(DS_ERROR_ARGUMENT, "a drafter proposes %d tokens where %d were asked for", drafted, count);
  for (int32_t i = 0; i < drafted; ++i) l->buckets[i] = ds_bucket_of_match(support[i]);
  if (drafted >= 0) ds_tree_make_chain(&d->tree, drafted);
  return drafted;
}

/* The same of a tree with no more than `count` levels. */
static int32_t draft_tree(ds_decoder *d, level *l, int32_t length, int32_t count) {
  double chances[DS_MAX_DRAFT];
  int32_t most = d->n_slots - length < l->n_draft ? d->n_slots - length : l->n_draft;
  int32_t drafted = l->drafter->draft_tree(l->drafter, d->ids + l->kept, length - l->kept, most, count,
                                           d->ids + length, d->tree.parents, chances);
  if (drafted > most)
    return ds_fail(DS_ERROR_ARGUMENT, "a drafter proposes a tree of %d nodes where %d were asked for",
                   drafted, most);
  for (int32_t i = 0; i < drafted; ++i) l->buckets[i] = ds_bucket_of_chance(chances[i]);
  if (drafted < 0) return drafted;
  int32_t status = ds_tree_measure(&d->tree, drafted, count);
  return status == DS_OK ? drafted : status;
}

/* Tell a drafter what stands. Tokens that the levels above only propose are not learnt from. */
static int32_t tell(ds_decoder *d, level *l) {
  int32_t status = l->drafter->append(l->drafter, d->ids + l->kept, d->committed - l->kept);
  if (status >= 0) l->kept = d->committed;
  return status;
}

/* What needs no model. */
static int32_t draft_text(ds_decoder *d, level *l, int32_t length, int32_t count) {
  int32_t status = tell(d, l);
  if (status < 0) return status;
  return (l->tree ? draft_tree : draft_chain)(d, l, length, count);
}

/* The tree of a model. */
static int32_t model_tree(ds_decoder *d, level *l, int32_t length, int32_t count) {
  int32_t drafted = (l->tree == DS_SEQUOIA ? ds_draw_tree : ds_grow_tree)(d, l, length, count);
  if (drafted < 0) return drafted;
  int32_t status = ds_tree_measure(&d->tree, drafted, count);
  return status == DS_OK ? drafted : status;
}

/* What is chosen, not sampled. */
static int32_t propose_chosen(ds_decoder *d, level *l, int32_t length, int32_t count) {
  int32_t drafted = (l->engine ? model_tree : draft_text)(d, l, length, count);
  if (drafted < 0) return drafted;
  for (int32_t i = 0; i < drafted; ++i)
    if (d->ids[length + i] < 0 || d->ids[length + i] >= d->vocab)
      return ds_fail(DS_ERROR_ARGUMENT, "a drafter proposes token %d, outside the vocabulary of %d",
                     d->ids[length + i], d->vocab);
  if (d->tree.is_chain) ds_tree_cut(&d->tree, cut_at_eos(d, length, drafted));
  if (!ds_is_scheduled(l)) return DS_OK;
  ds_tree_cut(&d->tree, ds_length_that_pays(&l->above->pace, &l->trust, l->buckets, &d->tree));
  ds_trust_note(&l->trust, d->tree.n_nodes);
  return DS_OK;
}

/* What has the shape that it was to have. */
static int32_t propose_shaped(ds_decoder *d, level *l, int32_t length, int32_t count) {
  int32_t drafted = model_tree(d, l, length, count);
  if (drafted >= 0) ds_trust_note(&l->trust, drafted);
  return drafted;
}

static int32_t propose_tokens(ds_decoder *d, level *l, int32_t length, int32_t count) {
  int32_t have = 0, scheduled = ds_is_scheduled(l);
  while (have < count && (!scheduled || ds_pays_to_go_on(&l->above->pace, &l->pace, &l->trust, l->buckets,
                                                         have, count - have))) {
    int32_t written = advance(d, l, length + have, count - have, have);
    if (written < 0) return written;
    have += written;
    if (ds_ends_text(d, d->ids[length + have - 1])) break;
  }
  ds_tree_make_chain(&d->tree, have);
  if (!scheduled) return DS_OK;
  if (ds_is_greedy(d) || d->sampling.rule == DS_RULE_EXACT)
    ds_tree_cut(&d->tree, ds_length_that_pays(&l->above->pace, &l->trust, l->buckets, &d->tree));
  ds_trust_note(&l->trust, d->tree.n_nodes);
  return DS_OK;
}

static int32_t propose_as(ds_decoder *d, level *l, int32_t length, int32_t count) {
  if (l->engine && l->tree == DS_CHAIN) return propose_tokens(d, l, length, count);
  if (l->engine && l->tree == DS_SEQUOIA) return propose_shaped(d, l, length, count);
  return propose_chosen(d, l, length, count);
}

/* Draft d->tree, at most `count` tokens deep, to follow the first `length` ones, and write them there. */
static int32_t propose(ds_decoder *d, level *l, int32_t length, int32_t count) {
  double began = ds_now_ms();
  int32_t status = propose_as(d, l, length, count);
  l->stats.busy_ms += ds_now_ms() - began;
  return status;
}

/* Drafting engines learn from what stands, before anything is drafted from it. So what is drafted in a round is an exact
 * sample of one law, which depends on the past alone. What they read lies behind what is kept. */
static int32_t adapt(ds_decoder *d) {
  int32_t status = DS_OK;
  for (level *l = d->levels; l->above && status >= 0; ++l) {
    if (!l->engine || !l->engine->adapt || l->kept != d->committed - 1) continue;
    double began = ds_now_ms();
    status = l->engine->adapt(l->engine, d->ids, d->committed, d->committed - d->n_prompt);
    if (status > 0) {
      l->stats.adapt_calls += 1;
      l->stats.adapt_rows += status;
    }
    l->stats.adapt_ms += ds_now_ms() - began;
  }
  return status < 0 ? status : DS_OK;
}

/* The first round reads the prompt and drafts nothing, so the first token is not kept waiting for the drafters
 * to read it too. Later rounds draft no more than the room left, so nothing is decoded past max_new_tokens. */
int32_t ds_decoder_step(ds_decoder *d, int32_t *tokens, int32_t room) {
  if (!d || !tokens) return ds_fail(DS_ERROR_ARGUMENT, "step wants a decoder and room for tokens");
  if (!d->begun) return ds_fail(DS_ERROR_ARGUMENT, "no generation is under way: begin one");
  level *target = &d->levels[d->n_levels - 1];
  int32_t most = target->inner ? target->inner->n_draft + 1 : 1;
  if (room < most)
    return ds_fail(DS_ERROR_ARGUMENT, "room for %d tokens; a round gives up to %d", room, most);
  if (d->left == 0) return 0;

  int32_t count = d->first ? DS_OK : adapt(d);
  if (count == DS_OK) count = advance(d, target, d->committed, d->first ? 1 : d->left, 0);
  if (count < 0) {
    d->begun = 0;
    return count;
  }
  memcpy(tokens, d->ids + d->committed, (size_t)count * sizeof *tokens);
  d->first = 0;
  d->committed += count;
  d->left = ds_ends_text(d, tokens[count - 1]) ? 0 : d->left - count;
  if (d->left == 0 && d->levels[0].drafter) { /* it may want all of this generation for the next */
    int32_t status = tell(d, &d->levels[0]);
    if (status < 0) return status;
  }
  return count;
}
