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
 * so a short state always knows its two most recent places:
 *   - No state becomes short: its shortest substring only grows, when a clone takes the shorter ones.
 *   - A clone has the places of the state that it is split from until the present append adds one. If the
 *     clone is short then so was that state, so its most recent place is right to copy; and the clone is on
 *     the path, so the present append makes that the one before.
 * Two places, because the most recent one of a suffix of the text is the end of the text itself.
 *
 * How often. Short states count their places in the same walk. The places of a state that go on with a token
 * are those of the state that the edge leads to, so an edge's frequency is there to be read; and as counts only
 * grow, a state knows its most frequent edge by comparing the one that the text takes with the one that led
 * before. A clone has the edges of the state that it is split from, and so its favourite.
 */
#include "suffix.h"
#include "drafter.h"
#include "error.h"
#include "growth.h"
#include "schedule.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { ROOT = 0, NONE = -1, LEAST_BUCKETS = 256 };

typedef struct {
  int32_t length; /* of the longest substring */
  int32_t link;
  int32_t recent, before; /* the two most recent places it ends at, counted in tokens; NONE if never */
  int32_t count;          /* of the places */
  int32_t first_edge;
  int32_t favourite; /* the edge that most places take, of equals the latest; NONE if none goes on */
} state;

typedef struct {
  int32_t from, token, to;
  int32_t next_of_state; /* cloning copies a state's edges */
  int32_t next_in_bucket;
} edge;

static const state EMPTY_STATE = {0, ROOT, NONE, NONE, 0, NONE, NONE};

struct ds_suffix {
  int32_t *tokens;
  state *states;
  edge *edges;
  int32_t *buckets; /* hash of (state, token) -> first edge plus one */
  int32_t n_tokens, n_states, n_edges;
  int32_t capacity; /* in tokens: room for 2 states and 3 edges each, so that an append cannot fail halfway */
  uint32_t bucket_mask; /* of those in use, which double with the edges: room for more takes no memory yet */
  int32_t last;         /* the state of the whole text */
  int32_t window;       /* the state of its last window_length tokens */
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
  for (int32_t i = s->buckets[bucket_of(s, from, token)] - 1; i != NONE; i = s->edges[i].next_in_bucket)
    if (s->edges[i].from == from && s->edges[i].token == token) return &s->edges[i];
  return NULL;
}

static void enter_bucket(ds_suffix *s, int32_t i) {
  int32_t *bucket = &s->buckets[bucket_of(s, s->edges[i].from, s->edges[i].token)];
  s->edges[i].next_in_bucket = *bucket - 1;
  *bucket = i + 1;
}

/* Use `n_buckets`, a power of two within the room. */
static void spread(ds_suffix *s, uint32_t n_buckets) {
  s->bucket_mask = n_buckets - 1;
  memset(s->buckets, 0, n_buckets * sizeof *s->buckets);
  for (int32_t i = 0; i < s->n_edges; ++i) enter_bucket(s, i);
}

static void add_edge(ds_suffix *s, int32_t from, int32_t token, int32_t to) {
  if ((uint32_t)s->n_edges > s->bucket_mask) spread(s, 2 * (s->bucket_mask + 1));
  int32_t i = s->n_edges++;
  s->edges[i] = (edge){from, token, to, s->states[from].first_edge, NONE};
  s->states[from].first_edge = i;
  enter_bucket(s, i);
}

/* ---- Memory -------------------------------------------------------------------------------------------- */

static int32_t grow_array(void **array, size_t count, size_t size) {
  void *grown = realloc(*array, count * size);
  if (!grown) return ds_fail(DS_ERROR_MEMORY, "no memory for a suffix index of %zu entries", count);
  *array = grown;
  return DS_OK;
}

static size_t buckets_for(size_t capacity) {
  size_t n = LEAST_BUCKETS;
  while (n < 3 * capacity) n *= 2;
  return n;
}

size_t ds_suffix_bytes(int32_t capacity) {
  size_t n = (size_t)capacity;
  return sizeof(ds_suffix) + n * (sizeof(int32_t) + 2 * sizeof(state) + 3 * sizeof(edge)) +
         buckets_for(n) * sizeof(int32_t);
}

/* Make room for `capacity` tokens. On failure the handle is as it was: grown arrays hold what they held. */
static int32_t resize(ds_suffix *s, size_t capacity) {
  int32_t status = grow_array((void **)&s->tokens, capacity, sizeof *s->tokens);
  if (status == DS_OK) status = grow_array((void **)&s->states, 2 * capacity, sizeof *s->states);
  if (status == DS_OK) status = grow_array((void **)&s->edges, 3 * capacity, sizeof *s->edges);
  if (status == DS_OK) status = grow_array((void **)&s->buckets, buckets_for(capacity), sizeof *s->buckets);
  if (status == DS_OK) s->capacity = (int32_t)capacity;
  return status;
}

static int32_t check_room(int64_t wanted) {
  if (wanted <= DS_SUFFIX_MAX_TOKENS) return DS_OK;
  return ds_fail(DS_ERROR_MEMORY, "a suffix index holds at most %d tokens", DS_SUFFIX_MAX_TOKENS);
}

/* By doubling, so that appending is amortized O(1). */
static int32_t grow(ds_suffix *s, int64_t wanted) {
  if (wanted <= s->capacity) return DS_OK;
  int32_t status = check_room(wanted);
  if (status != DS_OK) return status;
  size_t capacity = 64;
  while (capacity < (size_t)wanted) capacity *= 2;
  return resize(s, capacity);
}

void ds_suffix_clear(ds_suffix *s) {
  s->n_tokens = s->n_edges = s->last = s->window = s->window_length = 0;
  spread(s, LEAST_BUCKETS);
  s->states[ROOT] = EMPTY_STATE;
  s->states[ROOT].link = NONE;
  s->n_states = 1;
}

ds_suffix *ds_suffix_create(void) {
  ds_suffix *s = calloc(1, sizeof *s);
  if (!s) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a suffix index");
    return NULL;
  }
  if (grow(s, 1) != DS_OK) {
    ds_suffix_free(s);
    return NULL;
  }
  ds_suffix_clear(s);
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
  s->states[s->n_states] = EMPTY_STATE;
  s->states[s->n_states].length = length;
  s->states[s->n_states].link = link;
  return s->n_states++;
}

/* Give the substrings of `q` that are at most `length` long a state of their own, now that they end at a
 * place where the longer ones do not. `p` and its links are the states that lead to them by `token`. */
static int32_t split(ds_suffix *s, int32_t q, int32_t length, int32_t p, int32_t token) {
  int32_t clone = add_state(s, length, s->states[q].link);
  s->states[clone].recent = s->states[q].recent;
  s->states[clone].count = s->states[q].count;
  for (int32_t i = s->states[q].first_edge; i != NONE; i = s->edges[i].next_of_state) {
    add_edge(s, clone, s->edges[i].token, s->edges[i].to);
    if (i == s->states[q].favourite) s->states[clone].favourite = s->n_edges - 1;
  }
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

static int32_t count_of(const ds_suffix *s, const edge *e) { return s->states[e->to].count; }

/* The text has just taken edge `e` of `v`. */
static void prefer(ds_suffix *s, int32_t v, const edge *e) {
  int32_t *favourite = &s->states[v].favourite;
  if (*favourite == NONE || count_of(s, e) >= count_of(s, &s->edges[*favourite]))
    *favourite = (int32_t)(e - s->edges);
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

  if (s->window_length == DS_SUFFIX_MAX_MATCH) --s->window_length;
  int32_t before = shorten(s, s->window, s->window_length); /* the appended token follows it and its links */
  s->window = find_edge(s, before, token)->to;
  ++s->window_length;
  for (int32_t v = s->window; v != ROOT; v = s->states[v].link) {
    s->states[v].before = s->states[v].recent;
    s->states[v].recent = s->n_tokens;
    ++s->states[v].count;
  }
  for (int32_t v = before; v != ROOT; v = s->states[v].link) prefer(s, v, find_edge(s, v, token));
}

int32_t ds_suffix_append(ds_suffix *s, const int32_t *tokens, int32_t n_tokens) {
  if (!s || n_tokens < 0 || (n_tokens > 0 && !tokens))
    return ds_fail(DS_ERROR_ARGUMENT, "append wants a handle and %d tokens", n_tokens);
  for (int32_t i = 0; i < n_tokens; ++i)
    if (tokens[i] < 0) return ds_fail(DS_ERROR_ARGUMENT, "token %d is %d, not a token id", i, tokens[i]);
  int32_t status = grow(s, (int64_t)s->n_tokens + n_tokens);
  if (status != DS_OK) return status;
  for (int32_t i = 0; i < n_tokens; ++i) append_token(s, tokens[i]);
  return DS_OK;
}

int32_t ds_suffix_reserve(ds_suffix *s, int32_t n_tokens) {
  if (!s || n_tokens < 0)
    return ds_fail(DS_ERROR_ARGUMENT, "reserve wants a handle and room for %d tokens", n_tokens);
  if (n_tokens <= s->capacity) return DS_OK;
  int32_t status = check_room(n_tokens);
  return status == DS_OK ? resize(s, (size_t)n_tokens) : status;
}

const int32_t *ds_suffix_tokens(const ds_suffix *s, int32_t *n_tokens) {
  *n_tokens = s->n_tokens;
  return s->tokens;
}

/* ---- Matching ------------------------------------------------------------------------------------------ */

ds_match ds_suffix_match_end(const ds_suffix *s) { return (ds_match){s->window, s->window_length}; }

ds_match ds_suffix_match_less(const ds_suffix *s, ds_match m) {
  int32_t link = m.state == ROOT ? ROOT : s->states[m.state].link;
  return (ds_match){link, s->states[link].length};
}

static ds_match extend(const ds_suffix *s, ds_match m, int32_t token, int32_t max_match) {
  const edge *e;
  while (!(e = find_edge(s, m.state, token)) && m.state != ROOT) m = ds_suffix_match_less(s, m);
  if (!e) return (ds_match){ROOT, 0};
  if (m.length < max_match) return (ds_match){e->to, m.length + 1};
  return (ds_match){shorten(s, e->to, m.length), m.length};
}

ds_match ds_suffix_match_next(const ds_suffix *s, ds_match m, int32_t token) {
  return extend(s, m, token, DS_SUFFIX_MAX_MATCH);
}

int32_t ds_suffix_follow(const ds_suffix *s, ds_match *m, double *share) {
  if (m->length == DS_SUFFIX_MAX_MATCH) m->state = shorten(s, m->state, --m->length);
  const state *v = &s->states[m->state];
  if (v->favourite == NONE) return NONE;
  const edge *e = &s->edges[v->favourite];
  int32_t going_on = v->count - (v->recent == s->n_tokens); /* all but the end of the text */
  *share = (double)count_of(s, e) / going_on;
  *m = (ds_match){e->to, m->length + 1};
  return e->token;
}

int32_t ds_suffix_next(const ds_suffix *s, const int32_t *context, int32_t n_context, int32_t room,
                       int32_t *tokens, int32_t *counts) {
  if (!s || n_context < 1 || n_context >= DS_SUFFIX_MAX_MATCH || !context || room < 0 ||
      (room > 0 && (!tokens || !counts)))
    return ds_fail(DS_ERROR_ARGUMENT, "a handle, 1 to %d tokens of context (%d) and room for %d are wanted",
                   DS_SUFFIX_MAX_MATCH - 1, n_context, room);
  int32_t v = ROOT, n = 0;
  for (int32_t i = 0; i < n_context; ++i) {
    const edge *e = find_edge(s, v, context[i]);
    if (!e) return 0;
    v = e->to;
  }
  int32_t recent[DS_SUFFIX_MAX_NEXT];
  if (room > DS_SUFFIX_MAX_NEXT) room = DS_SUFFIX_MAX_NEXT;
  for (int32_t i = s->states[v].first_edge; i != NONE; i = s->edges[i].next_of_state) {
    const state *to = &s->states[s->edges[i].to];
    int32_t place = n;
    while (place > 0 && (to->count > counts[place - 1] ||
                         (to->count == counts[place - 1] && to->recent > recent[place - 1])))
      --place;
    if (place == room) continue;
    if (n < room) ++n;
    for (int32_t k = n - 1; k > place; --k) {
      tokens[k] = tokens[k - 1];
      counts[k] = counts[k - 1];
      recent[k] = recent[k - 1];
    }
    tokens[place] = s->edges[i].token;
    counts[place] = to->count;
    recent[place] = to->recent;
  }
  return n;
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

/* The longest end of the text that occurs within the committed tokens; without a tail, the end of those. */
static ds_match find_match(const text *t, int32_t max_match) {
  const ds_suffix *s = t->index;
  ds_match m = {s->window, s->window_length < max_match ? s->window_length : max_match};
  m.state = shorten(s, m.state, m.length);
  for (int32_t i = 0; i < t->n_tail; ++i) m = extend(s, m, t->tail[i], max_match);
  return m;
}

/* The best match that ends within the committed tokens. */
static match match_committed(const text *t, int32_t max_match) {
  const ds_suffix *s = t->index;
  ds_match m = find_match(t, max_match);
  if (t->n_tail) return (match){m.length, s->states[m.state].recent};
  /* The most recent place is the end of the text itself: look for one before it. */
  while (m.state != ROOT && s->states[m.state].before == NONE) m = ds_suffix_match_less(s, m);
  return (match){m.length, s->states[m.state].before};
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
 * prediction by partial matching). */
static void find_followers(const ds_suffix *s, ds_match m, int32_t min_match, followers *f) {
  double left = 1;
  f->n = 0;
  for (; m.state != ROOT && m.length >= min_match; m = ds_suffix_match_less(s, m)) {
    int32_t total = 1, latest = NONE, n_edges = 0;
    for (int32_t i = s->states[m.state].first_edge; i != NONE && n_edges < MOST_EDGES; ++n_edges) {
      const state *to = &s->states[s->edges[i].to];
      total += to->count;
      if (latest == NONE || to->recent > s->states[s->edges[latest].to].recent) latest = i;
      i = s->edges[i].next_of_state;
    }
    if (latest == NONE) continue;
    double sure = ds_chance_of_match(m.length);
    for (int32_t i = s->states[m.state].first_edge; n_edges > 0; --n_edges, i = s->edges[i].next_of_state)
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
  ds_match matches[DS_MAX_DRAFT + 1]; /* behind each node; first: of the text */
  matches[0] = find_match(&t, max_match);
  followers next;
  ds_growth growth;
  ds_growth_begin(&growth, max_nodes, max_depth, tokens, parents, chances);
  for (int32_t node = -1;;) {
    find_followers(s, matches[node + 1], min_match, &next);
    for (int32_t i = 0; i < next.n; ++i)
      if (s->edges[next.edges[i]].token != DS_END_OF_REFERENCE)
        ds_growth_offer(&growth, node, s->edges[next.edges[i]].token, next.chances[i], next.edges[i]);
    if ((node = ds_growth_take(&growth)) < 0) return growth.n_nodes;
    const edge *taken = &s->edges[growth.marks[node]];
    ds_match from = matches[parents[node] + 1];
    int32_t length = 1 + (taken->from == from.state ? from.length : s->states[taken->from].length);
    if (length > max_match) length = max_match;
    matches[node + 1] = (ds_match){shorten(s, taken->to, length), length};
  }
}
