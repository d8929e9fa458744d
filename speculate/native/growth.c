/* Best-first trees; see growth.h. */
#include "growth.h"

#include <stddef.h>

void ds_growth_begin(ds_growth *g, int32_t max_nodes, int32_t max_depth, int32_t *tokens, int32_t *parents,
                     double *chances) {
  g->max_nodes = max_nodes < DS_MAX_DRAFT ? max_nodes : DS_MAX_DRAFT;
  g->max_depth = max_depth;
  g->n_nodes = g->n_offers = 0;
  g->tokens = tokens;
  g->parents = parents;
  g->chances = chances;
}

/* An offer that as many better ones stand before as nodes can still join never joins: it gives way. */
static ds_offer *find_room(ds_growth *g, double reach) {
  if (g->n_offers < g->max_nodes - g->n_nodes) return &g->offers[g->n_offers++];
  ds_offer *worst = NULL;
  for (int32_t i = 0; i < g->n_offers; ++i)
    if (!worst || g->offers[i].reach <= worst->reach) worst = &g->offers[i];
  return worst && worst->reach < reach ? worst : NULL;
}

void ds_growth_offer(ds_growth *g, int32_t parent, int32_t token, double chance, int32_t mark) {
  int32_t depth = parent < 0 ? 0 : g->depths[parent] + 1;
  if (depth >= g->max_depth || !(chance > 0)) return;
  double reach = parent < 0 ? 1 : g->reach[parent];
  ds_offer offer = {parent, token, mark, chance, chance * reach};
  ds_offer *room = find_room(g, offer.reach);
  if (room) *room = offer;
}

int32_t ds_growth_take(ds_growth *g) {
  int32_t best = -1, node = g->n_nodes;
  if (node == g->max_nodes) return -1;
  for (int32_t i = 0; i < g->n_offers; ++i)
    if (best < 0 || g->offers[i].reach > g->offers[best].reach) best = i;
  if (best < 0) return -1;
  ds_offer offer = g->offers[best];
  --g->n_offers;
  for (int32_t i = best; i < g->n_offers; ++i)
    g->offers[i] = g->offers[i + 1]; /* the others keep their order */
  g->tokens[node] = offer.token;
  g->parents[node] = offer.parent;
  g->chances[node] = offer.chance;
  g->depths[node] = offer.parent < 0 ? 0 : g->depths[offer.parent] + 1;
  g->marks[node] = offer.mark;
  g->reach[node] = offer.reach;
  return g->n_nodes++;
}

int32_t ds_grove_plant(ds_grove *g, int32_t parent, int32_t token, double chance) {
  for (int32_t i = parent + 1; i < g->n_nodes; ++i)
    if (g->parents[i] == parent && g->tokens[i] == token) {
      if (g->chances[i] < chance) g->chances[i] = chance;
      return i;
    }
  g->tokens[g->n_nodes] = token;
  g->parents[g->n_nodes] = parent;
  g->chances[g->n_nodes] = chance;
  return g->n_nodes++;
}

int32_t ds_grove_grow(const ds_grove *g, int32_t max_nodes, int32_t max_depth, int32_t *tokens,
                      int32_t *parents, double *chances) {
  ds_growth growth;
  ds_growth_begin(&growth, max_nodes, max_depth, tokens, parents, chances);
  for (int32_t node = -1, at = -1;; at = growth.marks[node]) {
    for (int32_t k = at + 1; k < g->n_nodes; ++k)
      if (g->parents[k] == at) ds_growth_offer(&growth, node, g->tokens[k], g->chances[k], k);
    if ((node = ds_growth_take(&growth)) < 0) return growth.n_nodes;
  }
}
