/* Lookahead decoding (arXiv 2402.02057): n-grams from a window of guesses about the text to come.
 *
 * The window has some columns of guesses. The first of each, level 0, make a chain behind the text; behind each of
 * them hangs the rest of its column. What the level above would say at the end of a column, right or wrong as
 * the guesses before may be, is a step of a Jacobi iteration: it joins the column as its last guess. A column
 * of full height then is an n-gram, which is kept, and loses its first guess. So the window is a tree as any
 * other, and needs no mask of its own: its rows are in the proposal, along with the n-grams that begin with the
 * last token, most recent first.
 *
 * Rows of the window are worth their cost for what is learnt from them; right themselves they seldom are. Where
 * a tree is cut to what pays they are the first to go. (The paper draws the first guesses at random from the
 * prompt; here they are spread over it.)
 */
#include "drafter.h"
#include "error.h"
#include "growth.h"
#include "schedule.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_LEVELS = 4, MOST_COLUMNS = 8, NONE = -1 };
enum { GRAM = MOST_LEVELS + 1, WAYS = 8, SET_BITS = 12, SETS = 1 << SET_BITS };

/* How likely the k-th n-gram begins with the right token, its next token is right if those before were, and a guess
 * in the window is. */
static const double FIRST[WAYS] = {0.3, 0.1, 0.07, 0.05, 0.04, 0.03, 0.025, 0.02}, NEXT = 0.5, GUESS = 0.02;

typedef struct {
  int32_t tokens[GRAM]; /* NONE behind the end of a short one */
} gram;

typedef struct {
  int32_t height, guesses[MOST_LEVELS];
} column;

typedef struct {
  ds_drafter drafter;
  int32_t vocab, n_columns, n_levels; /* none until it is known how large trees may be */
  column columns[MOST_COLUMNS];
  int32_t n_latest, latest[GRAM]; /* the last tokens that stand */
  gram pool[SETS][WAYS];          /* by the first token; in each set the latest come first */
  ds_grove grove;
} lookahead_drafter;

static int32_t begin(ds_drafter *drafter, int32_t n_tokens) {
  lookahead_drafter *l = (lookahead_drafter *)drafter;
  (void)n_tokens;
  l->n_columns = l->n_levels = l->n_latest = 0;
  memset(l->columns, 0, sizeof l->columns);
  memset(l->pool, 0xff, sizeof l->pool); /* all NONE */
  return DS_OK;
}

/* ---- The pool ------------------------------------------------------------------------------------------ */

static gram *find_set(lookahead_drafter *l, int32_t token) {
  return l->pool[(uint32_t)token * 2654435769u >> (32 - SET_BITS)]; /* Fibonacci hashing */
}

/* The next n-gram that begins with a token, of those from place `way` of its set on; WAYS: there is none. */
static int32_t find_gram(const gram *set, int32_t token, int32_t way) {
  while (way < WAYS && set[way].tokens[0] != token) ++way;
  return way;
}

/* First in its set; those before its old place move back by one, and the last falls out if it is new. */
static void keep_gram(lookahead_drafter *l, const int32_t *tokens, int32_t n_tokens) {
  gram kept, *set = find_set(l, tokens[0]);
  memset(&kept, 0xff, sizeof kept); /* all NONE */
  memcpy(kept.tokens, tokens, (size_t)n_tokens * sizeof *tokens);
  int32_t place = 0;
  while (place < WAYS - 1 && memcmp(&set[place], &kept, sizeof kept)) ++place;
  memmove(set + 1, set, (size_t)place * sizeof *set);
  set[0] = kept;
}

/* ---- Learning ------------------------------------------------------------------------------------------ */

/* The first guesses, spread over the text: by the golden ratio, so that those of any first few columns are. */
static void guess_from(lookahead_drafter *l, const int32_t *tokens, int32_t n_tokens) {
  for (int32_t i = 0; i < MOST_COLUMNS; ++i) {
    double place = fmod((i + 1) * 0.6180339887498949, 1);
    l->columns[i] = (column){1, {tokens[(int32_t)(place * n_tokens)]}};
  }
}

static int32_t append(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens) {
  lookahead_drafter *l = (lookahead_drafter *)drafter;
  if (l->n_latest == 0 && n_tokens > 0) guess_from(l, tokens, n_tokens);
  for (int32_t i = 0; i < n_tokens; ++i) {
    if (l->n_latest == GRAM) memmove(l->latest, l->latest + 1, (size_t)--l->n_latest * sizeof *l->latest);
    l->latest[l->n_latest++] = tokens[i];
    if (l->n_latest == GRAM) keep_gram(l, l->latest, GRAM);
  }
  return DS_OK;
}

/* Row of `token` behind row `from`, or -1. */
static int32_t find_row(const int32_t *tokens, const int32_t *parents, int32_t n_rows, int32_t from,
                        int32_t token) {
  for (int32_t row = from + 1; row < n_rows; ++row)
    if (parents[row - 1] == from - 1 && tokens[row] == token) return row;
  return -1;
}

static void step(lookahead_drafter *l, column *c, int32_t said) {
  if (c->height == l->n_levels) {
    int32_t found[GRAM];
    memcpy(found, c->guesses, (size_t)c->height * sizeof *found);
    found[c->height] = said;
    keep_gram(l, found, c->height + 1);
    memmove(c->guesses, c->guesses + 1, (size_t)--c->height * sizeof *c->guesses);
  }
  c->guesses[c->height++] = said;
}

/* What was not read, since the tree was cut or others had the room, waits for another round. */
static int32_t observe(ds_drafter *drafter, const int32_t *tokens, const int32_t *parents, int32_t n_rows,
                       const float *logits, const float *peaks, int32_t vocab) {
  lookahead_drafter *l = (lookahead_drafter *)drafter;
  (void)peaks;
  int32_t first = 0;
  for (column *c = l->columns; c < l->columns + l->n_columns; ++c) {
    int32_t row = first = find_row(tokens, parents, n_rows, first, c->guesses[0]);
    if (first < 0) break;
    for (int32_t i = 1; i < c->height && row >= 0; ++i)
      row = find_row(tokens, parents, n_rows, row, c->guesses[i]);
    if (row < 0) continue;
    int32_t said = ds_argmax(logits + (size_t)row * (size_t)vocab, vocab < l->vocab ? vocab : l->vocab);
    if (said >= 0) step(l, c, said);
  }
  return DS_OK;
}

/* ---- Drafting ------------------------------------------------------------------------------------------ */

/* The token behind which a draft begins, or NONE. */
static int32_t find_start(const lookahead_drafter *l, const int32_t *tail, int32_t n_tail) {
  return n_tail ? tail[n_tail - 1] : l->n_latest ? l->latest[l->n_latest - 1] : NONE;
}

/* The latest n-gram behind the last token, then the latest behind its end: a chain has no window. */
static int32_t draft(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                     int32_t *tokens, int32_t *support) {
  lookahead_drafter *l = (lookahead_drafter *)drafter;
  int32_t token = find_start(l, tail, n_tail), drafted = 0;
  while (token != NONE && drafted < max_draft) {
    const gram *set = find_set(l, token);
    int32_t way = find_gram(set, token, 0);
    if (way == WAYS) break;
    for (int32_t i = 1; i < GRAM && set[way].tokens[i] != NONE && drafted < max_draft; ++i) {
      token = tokens[drafted] = set[way].tokens[i];
      support[drafted++] = ds_match_of_chance(i > 1 ? NEXT : FIRST[0]);
    }
  }
  return drafted;
}

/* Half of the tree for the window and half for n-grams, as the paper has it; higher where there is more room. */
static void choose_sizes(lookahead_drafter *l, int32_t max_nodes) {
  l->n_levels = max_nodes >= 40 ? 4 : max_nodes >= 12 ? 3 : 2;
  l->n_columns = max_nodes / (2 * l->n_levels);
  if (l->n_columns < 1) l->n_columns = 1;
  if (l->n_columns > MOST_COLUMNS) l->n_columns = MOST_COLUMNS;
}

static void plant_grams(lookahead_drafter *l, int32_t token, int32_t room) {
  const gram *set = find_set(l, token);
  int32_t way = find_gram(set, token, 0);
  for (int32_t rank = 0; way < WAYS && l->grove.n_nodes + l->n_levels <= room; ++rank) {
    for (int32_t i = 1, node = -1; i <= l->n_levels && set[way].tokens[i] != NONE; ++i)
      node = ds_grove_plant(&l->grove, node, set[way].tokens[i], i > 1 ? NEXT : FIRST[rank]);
    way = find_gram(set, token, way + 1);
  }
}

static void plant_window(lookahead_drafter *l) {
  int32_t first = -1;
  for (const column *c = l->columns; c < l->columns + l->n_columns && c->height > 0; ++c) {
    int32_t node = first = ds_grove_plant(&l->grove, first, c->guesses[0], GUESS);
    for (int32_t i = 1; i < c->height; ++i) node = ds_grove_plant(&l->grove, node, c->guesses[i], GUESS);
  }
}

static int32_t draft_tree(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                          int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances) {
  lookahead_drafter *l = (lookahead_drafter *)drafter;
  int32_t token = find_start(l, tail, n_tail);
  if (l->n_columns == 0) choose_sizes(l, max_nodes);
  l->grove.n_nodes = 0;
  if (token != NONE) plant_grams(l, token, max_nodes - l->n_columns * l->n_levels);
  plant_window(l);
  return ds_grove_grow(&l->grove, max_nodes, max_depth, tokens, parents, chances);
}

/* ---- Life ---------------------------------------------------------------------------------------------- */

static void close_drafter(ds_drafter *drafter) { free(drafter); }

ds_drafter *ds_lookahead_drafter_create(int32_t vocab) {
  if (vocab < 1) {
    ds_fail(DS_ERROR_ARGUMENT, "vocab is %d; at least 1 is wanted", vocab);
    return NULL;
  }
  lookahead_drafter *l = malloc(sizeof *l);
  if (!l) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a pool of n-grams");
    return NULL;
  }
  l->drafter = (ds_drafter){.begin = begin,
                            .append = append,
                            .observe = observe,
                            .draft = draft,
                            .draft_tree = draft_tree,
                            .close = close_drafter};
  l->vocab = vocab;
  begin(&l->drafter, 0);
  return &l->drafter;
}
