/* Drafting from the text itself: an online suffix automaton over the committed tokens.
 *
 * A state stands for the substrings that end at the same set of places; `length` is that of the longest, and
 * the others are its suffixes down to, but not including, the longest of its `link`. Following links from the
 * state of the whole text visits every suffix (Blumer et al. 1985, "The smallest automaton recognizing the
 * subwords of a text"). n tokens make at most 2n states and 3n edges, and appending one is amortized O(1).
 *
 * The most recent places. A new token adds a place to every state on the link path of the text, and that path
 * can be as long as the text ("aaaa..."). But no match is longer than DS_SUFFIX_MAX_MATCH, so only states
 * with a substring at most that long are ever asked: the short states. `window` is the state of the last
 * min(n, DS_SUFFIX_MAX_MATCH) tokens; the short states on the path are `window` and its links, at most
 * DS_SUFFIX_MAX_MATCH of them and three or four on ordinary text. Every append enters its place into those,
 * so a short state always knows its two most recent places, and how many there are:
 *   - No state becomes short: its shortest substring only grows, when a clone takes the shorter ones.
 *   - A clone has the places of the state that it is split from until the present append adds one. If the
 *     clone is short then so was that state, so its most recent place is right to copy; and the clone is on
 *     the path, so the present append makes that the one before.
 * Two places, because the most recent one of a suffix of the text is the end of the text itself.
 */
#include "drafter.h"
#include "draftsmith.h"
#include "error.h"
#include "growth.h"
#include "schedule.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { ROOT = 0, NONE = -1 };

typedef struct {
  int32_t length; /* of the longest substring */
  int32_t link;
  int32_t recent, before; /* the two most recent places it ends at, counted in tokens; NONE if never */
  int32_t first_edge;
  int32_t count; /* of the places it ends at */
} state;

typedef struct {
  int32_t from, token, to;
  int32_t next_of_state; /* cloning copies a state's edges */
  int32_t next_in_bucket;
} edge;

struct ds_suffix {
  int32_t *tokens;
  state *states;
  edge *edges;
  int32_t *buckets; /* hash of (state, token) -> first edge */
  int32_t n_tokens, n_states, n_edges;
  int32_t capacity; /* in tokens: room for 2 states and 3 edges each, so that an append cannot fail halfway */
  uint32_t bucket_mask;
  int32_t last;   /* the state of the whole text */
  int32_t window; /* the state of its last window_length tokens */
  int32_t window_length;
};

/* ---- Edges --------------------------------------------------------------------------------------------- */

static uint32_t bucket_of(const ds_suffix *s, int32_t from, int32_t token) {
  uint64_t key = (uint64_t)(uint32_t)from << 32 | (uint32_t)token;
  key *= 0x9E3779B97F4A7C15u; /* Fibonacci hashing: the high half mixes both words */
  key ^= key >> 29;
  key *= 0xBF58476D1CE4E5B9u;
  return (uint32_t)(key >> 32) & s->bucket_mask;
}

static edge *find_edge(const ds_suffix *s, int32_t from, int32_t token) {
  for (int32_t i = s->buckets[bucket_of(s, from, token)]; i != NONE; i = s->edges[i].next_in_bucket)
    if (s->edges[i].from == from && s->edges[i].token == token) return &s->edges[i];
  return NULL;
}

static void add_edge(ds_suffix *s, int32_t from, int32_t token, int32_t to) {
  int32_t *bucket = &s->buckets[bucket_of(s, from, token)];
  s->edges[s->n_edges] = (edge){from, token, to, s->states[from].first_edge, *bucket};
  s->states[from].first_edge = *bucket = s->n_edges++;
}

/* ---- Memory -------------------------------------------------------------------------------------------- */

static int32_t grow_array(void **array, size_t count, size_t size) {
  void *grown = realloc(*array, count * size);
  if (!grown) return ds_fail(DS_ERROR_MEMORY, "no memory for a suffix index of %zu entries", count);
  *array = grown;
  return DS_OK;
}

/* Make room for `wanted` tokens. On failure the handle is as it was: grown arrays hold what they held. */
static int32_t reserve(ds_suffix *s, int64_t wanted) {
  if (wanted <= s->capacity) return DS_OK;
  if (wanted > DS_SUFFIX_MAX_TOKENS)
    return ds_fail(DS_ERROR_MEMORY, "a suffix index holds at most %d tokens", DS_SUFFIX_MAX_TOKENS);
  size_t capacity = 64;
  while (capacity < (size_t)wanted) capacity *= 2;
  size_t n_buckets = 4 * capacity;
  int32_t *buckets = malloc(n_buckets * sizeof *buckets);
  if (!buckets) return ds_fail(DS_ERROR_MEMORY, "no memory for a suffix index of %zu tokens", capacity);
  int32_t status = grow_array((void **)&s->tokens, capacity, sizeof *s->tokens);
  if (status == DS_OK) status = grow_array((void **)&s->states, 2 * capacity, sizeof *s->states);
  if (status == DS_OK) status = grow_array((void **)&s->edges, 3 * capacity, sizeof *s->edges);
  if (status != DS_OK) {
    free(buckets);
    return status;
  }
  free(s->buckets);
  s->buckets = buckets;
  s->bucket_mask = (uint32_t)(n_buckets - 1);
  s->capacity = (int32_t)capacity;
  memset(buckets, 0xff, n_buckets * sizeof *buckets); /* all NONE */
  for (int32_t i = 0; i < s->n_edges; ++i) {
    int32_t *bucket = &buckets[bucket_of(s, s->edges[i].from, s->edges[i].token)];
    s->edges[i].next_in_bucket = *bucket;
    *bucket = i;
  }
  return DS_OK;
}

ds_suffix *ds_suffix_create(void) {
  ds_suffix *s = calloc(1, sizeof *s);
  if (!s) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a suffix index");
    return NULL;
  }
  if (reserve(s, 1) != DS_OK) {
    ds_suffix_free(s);
    return NULL;
  }
  s->states[ROOT] = (state){0, NONE, NONE, NONE, NONE, 0};
  s->n_states = 1;
  return s;
}

void ds_suffix_free(ds_suffix *s) {
  if (!s) return;
  free(s->tokens);
  free(s->states);
  free(s->edges);
  free(s->buckets);
  free(s);
}

/* ---- Appending ----------------------------------------------------------------------------------------- */

static int32_t add_state(ds_suffix *s, int32_t length, int32_t link) {
  s->states[s->n_states] = (state){length, link, NONE, NONE, NONE, 0};
  return s->n_states++;
}

/* Give the substrings of `q` that are at most `length` long a state of their own, now that they end at a
 * place where the longer ones do not. `p` and its links are the states that lead to them by `token`. */
static int32_t split(ds_suffix *s, int32_t q, int32_t length, int32_t p, int32_t token) {
  int32_t clone = add_state(s, length, s->states[q].link);
  s->states[clone].recent = s->states[q].recent;
  s->states[clone].count = s->states[q].count;
  for (int32_t i = s->states[q].first_edge; i != NONE; i = s->edges[i].next_of_state)
    add_edge(s, clone, s->edges[i].token, s->edges[i].to);
  s->states[q].link = clone;
  for (; p != NONE; p = s->states[p].link) {
    edge *e = find_edge(s, p, token);
    if (e->to != q) break;
    e->to = clone;
  }
  return clone;
}

/* The state of the last `wanted` tokens of a match whose state is `v`, or was before `v` was split. */
static int32_t shorten(const ds_suffix *s, int32_t v, int32_t wanted) {
  while (v != ROOT && s->states[s->states[v].link].length >= wanted) v = s->states[v].link;
  return v;
}

static void append_token(ds_suffix *s, int32_t token) {
  s->tokens[s->n_tokens++] = token;
  int32_t p = s->last, link = ROOT;
  int32_t whole = add_state(s, s->n_tokens, ROOT);
  edge *known = NULL;
  for (; p != NONE && !(known = find_edge(s, p, token)); p = s->states[p].link) add_edge(s, p, token, whole);
  if (known) {
    int32_t length = s->states[p].length + 1;
    link = s->states[known->to].length == length ? known->to : split(s, known->to, length, p, token);
  }
  s->states[whole].link = link;
  s->last = whole;

  if (s->window_length == DS_SUFFIX_MAX_MATCH) s->window = shorten(s, s->window, --s->window_length);
  s->window = find_edge(s, s->window, token)->to;
  ++s->window_length;
  for (int32_t v = s->window; v != ROOT; v = s->states[v].link) {
    s->states[v].before = s->states[v].recent;
    s->states[v].recent = s->n_tokens;
    s->states[v].count += 1;
  }
}

int32_t ds_suffix_append(ds_suffix *s, const int32_t *tokens, int32_t n_tokens) {
  if (!s || n_tokens < 0 || (n_tokens > 0 && !tokens))
    return ds_fail(DS_ERROR_ARGUMENT, "append wants a handle and %d tokens", n_tokens);
  for (int32_t i = 0; i < n_tokens; ++i)
    if (tokens[i] < 0) return ds_fail(DS_ERROR_ARGUMENT, "token %d is %d, not a token id", i, tokens[i]);
  int32_t status = reserve(s, (int64_t)s->n_tokens + n_tokens);
  if (status != DS_OK) return status;
  for (int32_t i = 0; i < n_tokens; ++i) append_token(s, tokens[i]);
  return DS_OK;
}

int32_t ds_suffix_reserve(ds_suffix *s, int32_t n_tokens) {
  if (!s || n_tokens < 0)
    return ds_fail(DS_ERROR_ARGUMENT, "reserve wants a handle and room for %d tokens", n_tokens);
  return reserve(s, n_tokens);
}

/* ---- Drafting ------------------------------------------------------------------------------------------ */

/* The text that is drafted for: the committed tokens, then the tail. */
typedef struct {
  const ds_suffix *index;
  const int32_t *tail;
  int32_t n_tail, length;
} text;

static int32_t token_at(const text *t, int32_t i) {
  int32_t committed = t->index->n_tokens;
  return i < committed ? t->index->tokens[i] : t->tail[i - committed];
}

typedef struct {
  int32_t length, end; /* the last `length` tokens of the text also end at `end`, before its own end */
} match;

/* The state of the longest end of the text that occurs within the committed tokens, and its length; without a tail
 * that is the end of those themselves. */
static int32_t find_state(const text *t, int32_t max_match, int32_t *matched) {
  const ds_suffix *s = t->index;
  int32_t length = s->window_length < max_match ? s->window_length : max_match;
  int32_t v = shorten(s, s->window, length);
  for (int32_t i = 0; i < t->n_tail; ++i) {
    edge *e;
    while (!(e = find_edge(s, v, t->tail[i])) && v != ROOT) {
      v = s->states[v].link;
      length = s->states[v].length;
    }
    if (!e) continue; /* at the root, where length is 0 */
    v = e->to;
    if (length < max_match)
      ++length;
    else
      v = shorten(s, v, length);
  }
  *matched = length;
  return v;
}

/* The best match that ends within the committed tokens. */
static match match_committed(const text *t, int32_t max_match) {
  const ds_suffix *s = t->index;
  int32_t length, v = find_state(t, max_match, &length);
  if (t->n_tail) return (match){length, s->states[v].recent};
  while (v != ROOT && s->states[v].before == NONE) { /* the most recent place is the end of the text itself */
    v = s->states[v].link;
    length = s->states[v].length;
  }
  return (match){length, s->states[v].before};
}

/* The best match that ends within the tail, if it is no worse than `best`; it is the more recent one. */
static match match_tail(const text *t, int32_t max_match, match best) {
  for (int32_t end = t->index->n_tokens + 1; end < t->length; ++end) {
    int32_t length = 0;
    while (length < max_match && length < end &&
           token_at(t, end - 1 - length) == token_at(t, t->length - 1 - length))
      ++length;
    if (length > 0 && length >= best.length) best = (match){length, end};
  }
  return best;
}

static int32_t check_draft(const ds_suffix *s, const int32_t *tail, int32_t n_tail, int32_t min_match,
                           int32_t max_match, int32_t max_draft, const void *draft, const void *also) {
  if (!s || n_tail < 0 || (n_tail > 0 && !tail) || max_draft < 0 || (max_draft > 0 && !draft) || !also)
    return ds_fail(DS_ERROR_ARGUMENT, "a handle, %d tail tokens and room for %d drafted ones are wanted",
                   n_tail, max_draft);
  if (!(1 <= min_match && min_match <= max_match && max_match <= DS_SUFFIX_MAX_MATCH))
    return ds_fail(DS_ERROR_ARGUMENT, "match lengths %d to %d are not within 1 to %d", min_match, max_match,
                   DS_SUFFIX_MAX_MATCH);
  if (n_tail > DS_SUFFIX_MAX_TOKENS)
    return ds_fail(DS_ERROR_ARGUMENT, "a tail of %d tokens is longer than %d", n_tail, DS_SUFFIX_MAX_TOKENS);
  return DS_OK;
}

int32_t ds_suffix_draft(const ds_suffix *s, const int32_t *tail, int32_t n_tail, int32_t min_match,
                        int32_t max_match, int32_t max_draft, int32_t *draft, int32_t *match_length) {
  int32_t status = check_draft(s, tail, n_tail, min_match, max_match, max_draft, draft, match_length);
  if (status != DS_OK) return status;
  text t = {s, tail, n_tail, s->n_tokens + n_tail};
  match best = match_tail(&t, max_match, match_committed(&t, max_match));
  *match_length = best.length >= min_match ? best.length : 0;
  if (*match_length == 0) return 0;
  for (int32_t i = 0; i < max_draft; ++i) {
    int32_t source = best.end + i;
    draft[i] = source < t.length ? token_at(&t, source) : draft[source - t.length];
  }
  return max_draft;
}

enum {
  MOST_EDGES = 64, /* of a state that are looked at: a pair of common words has thousands in a large text */
  MOST_FOLLOWERS = 256,
};

typedef struct {
  int32_t n, edges[MOST_FOLLOWERS]; /* the first edge by which each was found: that of the longest match */
  double chances[MOST_FOLLOWERS];
} followers;

static void add_follower(const ds_suffix *s, followers *f, int32_t e, double chance) {
  int32_t i = 0;
  while (i < f->n && s->edges[f->edges[i]].token != s->edges[e].token) ++i;
  if (i == MOST_FOLLOWERS) return;
  if (i == f->n) {
    f->edges[f->n++] = e;
    f->chances[i] = 0;
  }
  f->chances[i] += chance;
}

/* What follows a state, and what follows its suffixes where that says nothing: how sure a match is goes to its own
 * continuations by their counts, the latest counted twice, and the rest to those of the next shorter match (as in
 * prediction by partial matching). `v` holds a match of `length` tokens. */
static void find_followers(const ds_suffix *s, int32_t v, int32_t length, int32_t min_match, followers *f) {
  double left = 1;
  f->n = 0;
  for (; v != ROOT && length >= min_match; v = s->states[v].link, length = s->states[v].length) {
    int32_t total = 1, latest = NONE, n_edges = 0;
    for (int32_t i = s->states[v].first_edge; i != NONE && n_edges < MOST_EDGES; ++n_edges) {
      const state *to = &s->states[s->edges[i].to];
      total += to->count;
      if (latest == NONE || to->recent > s->states[s->edges[latest].to].recent) latest = i;
      i = s->edges[i].next_of_state;
    }
    if (latest == NONE) continue;
    double sure = ds_chance_of_match(length);
    for (int32_t i = s->states[v].first_edge; n_edges > 0; --n_edges, i = s->edges[i].next_of_state)
      add_follower(s, f, i, left * sure * (s->states[s->edges[i].to].count + (i == latest)) / total);
    left *= 1 - sure;
  }
}

int32_t ds_suffix_draft_tree(const ds_suffix *s, const int32_t *tail, int32_t n_tail, int32_t min_match,
                             int32_t max_match, int32_t max_nodes, int32_t max_depth, int32_t *tokens,
                             int32_t *parents, double *chances) {
  int32_t status = check_draft(s, tail, n_tail, min_match, max_match, max_nodes, tokens, parents);
  if (status == DS_OK && max_nodes > 0 && !chances)
    status = ds_fail(DS_ERROR_ARGUMENT, "no room for chances");
  if (status != DS_OK) return status;
  text t = {s, tail, n_tail, s->n_tokens + n_tail};
  int32_t lengths[DS_MAX_DRAFT + 1],
      states[DS_MAX_DRAFT + 1]; /* of the match behind each node; first: the text */
  states[0] = find_state(&t, max_match, &lengths[0]);
  followers next;
  ds_growth growth;
  ds_growth_begin(&growth, max_nodes, max_depth, tokens, parents, chances);
  for (int32_t node = -1;;) {
    find_followers(s, states[node + 1], lengths[node + 1], min_match, &next);
    for (int32_t i = 0; i < next.n; ++i)
      if (s->edges[next.edges[i]].token != DS_END_OF_REFERENCE)
        ds_growth_offer(&growth, node, s->edges[next.edges[i]].token, next.chances[i], next.edges[i]);
    if ((node = ds_growth_take(&growth)) < 0) return growth.n_nodes;
    const edge *taken = &s->edges[growth.marks[node]];
    int32_t parent = parents[node] + 1;
    int32_t length = 1 + (taken->from == states[parent] ? lengths[parent] : s->states[taken->from].length);
    lengths[node + 1] = length < max_match ? length : max_match;
    states[node + 1] = shorten(s, taken->to, lengths[node + 1]);
  }
}
