/* The rows of a tree in its drafter's cache; see tree_cache.h. */
#include "tree_cache.h"
#include "vector.h"

#include <stddef.h>
#include <string.h>

int32_t ds_tree_cache_room(const level *l, int32_t length) {
  int32_t most = DS_TREE_ROWS, slots = l->n_slots - length;
  return slots < most ? slots : most;
}

int32_t ds_tree_cache_add(ds_tree_cache *c, int32_t parent, int32_t token) {
  c->tokens[c->n_rows] = token;
  c->parents[c->n_rows] = parent;
  c->depths[c->n_rows] = parent < 0 ? 0 : c->depths[parent] + 1;
  return c->n_rows++;
}

int32_t ds_tree_cache_read(ds_decoder *d, level *l, int32_t length, int32_t first, const float **logits) {
  const ds_tree_cache *c = d->cache;
  int32_t n = c->n_rows - first, end = length + c->n_rows;
  for (int32_t row = first; row < c->n_rows; ++row) {
    uint8_t *sees = d->mask + (size_t)(row - first) * (size_t)end;
    d->positions[row - first] = length + c->depths[row];
    memset(sees, 1, (size_t)length);
    memset(sees + length, 0, (size_t)c->n_rows);
    for (int32_t at = row; at >= 0; at = c->parents[at]) sees[length + at] = 1;
  }
  double began = ds_now_ms();
  ds_rows rows = {n, length + first, c->tokens + first, d->positions, d->mask};
  int32_t status = ds_read_rows(d, l, rows, n, logits);
  l->stats.forward_ms += ds_now_ms() - began;
  l->clock += ds_pace_of_call(&l->pace, n);
  return status;
}

int32_t ds_tree_cache_keep(ds_decoder *d, level *l, int32_t length, const int32_t *path, int32_t n_accepted) {
  const ds_tree_cache *c = d->cache;
  int32_t slots[DS_MAX_DRAFT], n_read = 0, in_place = 0, last = -1;
  if (n_accepted == 0) return DS_OK;
  for (; n_read < n_accepted; ++n_read) {
    int32_t row = c->rows[path[n_read]];
    if (row < 0 || c->parents[row] != last) break; /* not read, or for another path */
    slots[n_read] = length + (last = row);
  }
  while (in_place < n_read && slots[in_place] == length + in_place) ++in_place;
  l->kept = length + in_place;
  if (in_place == n_read || !l->engine->keep) return DS_OK;
  l->kept = length + n_read;
  return l->engine->keep(l->engine, length + in_place, slots + in_place, n_read - in_place);
}

/* ---- Candidates ---------------------------------------------------------------------------------------- */

static void enter(ds_candidates *c, int32_t most, int32_t token, double chance) {
  int32_t place = c->n < most ? c->n++ : most - 1;
  for (; place > 0 && c->chances[place - 1] < chance; --place) {
    c->tokens[place] = c->tokens[place - 1];
    c->chances[place] = c->chances[place - 1];
  }
  c->tokens[place] = token;
  c->chances[place] = chance;
}

/* Hardly any block holds a new one, and that question vectorizes. */
DS_WIDE static void find_likeliest(ds_candidates *c, const double *law, int32_t vocab, int32_t most) {
  enum { BLOCK = 64 };
  double least = 0; /* what more than this has enters */
  for (int32_t start = 0; start < vocab; start += BLOCK) {
    int32_t end = vocab - start < BLOCK ? vocab : start + BLOCK;
    int news = 0;
    for (int32_t x = start; x < end; ++x) news |= law[x] > least;
    for (int32_t x = start; news && x < end; ++x) {
      if (!(law[x] > least)) continue;
      enter(c, most, x, law[x]);
      if (c->n == most) least = c->chances[most - 1];
    }
  }
}

void ds_list_candidates(ds_tree_cache *cache, int32_t row, const double *law, int32_t vocab, int32_t most) {
  ds_candidates *c = &cache->candidates[row + 1];
  c->n = 0;
  find_likeliest(c, law, vocab, most);
}
