/* Best-first trees: of all tokens that were offered behind a node of the tree, the one whose path is the likeliest
 * joins next. So the nodes are in the order in which they are worth a row, and any number of the first of them is
 * the best tree of that size (the greedy expansion of SuffixDecoding, arXiv 2411.04975, and of SpecExec, arXiv
 * 2406.02532). */
#ifndef DRAFTSMITH_GROWTH_H
#define DRAFTSMITH_GROWTH_H

#include "loop.h"

typedef struct {
  int32_t parent, token, mark;
  double chance, reach; /* of the token given its parent, and of its whole path */
} ds_offer;

typedef struct {
  int32_t max_nodes, max_depth, n_nodes, n_offers;
  int32_t *tokens, *parents; /* the tree, as draft_tree gives it */
  double *chances;
  int32_t depths[DS_MAX_DRAFT], marks[DS_MAX_DRAFT];
  double reach[DS_MAX_DRAFT];
  ds_offer offers[DS_MAX_DRAFT]; /* more could never join */
} ds_growth;

void ds_growth_begin(ds_growth *growth, int32_t max_nodes, int32_t max_depth, int32_t *tokens,
                     int32_t *parents, double *chances);

/* `token` may follow node `parent`, or the text if that is -1; once at most. `mark` is the caller's. */
void ds_growth_offer(ds_growth *growth, int32_t parent, int32_t token, double chance, int32_t mark);

/* The node that joins, with its mark in `marks`; -1: none is left, or the tree is full. Of equally likely offers the
 * first joins. */
int32_t ds_growth_take(ds_growth *growth);

/* Proposals merged (SpecInfer, arXiv 2305.09781): a tree in which no two siblings are the same token. Empty with
 * n_nodes 0. */
typedef struct {
  int32_t n_nodes;
  int32_t tokens[DS_MAX_LEVELS * DS_MAX_DRAFT], parents[DS_MAX_LEVELS * DS_MAX_DRAFT];
  double chances[DS_MAX_LEVELS * DS_MAX_DRAFT];
} ds_grove;

/* The node that is `token` behind node `parent`, or behind the text if that is -1, with at least this chance. */
int32_t ds_grove_plant(ds_grove *grove, int32_t parent, int32_t token, double chance);

/* The best-first tree of it, as draft_tree gives it. Returns how many nodes. */
int32_t ds_grove_grow(const ds_grove *grove, int32_t max_nodes, int32_t max_depth, int32_t *tokens,
                      int32_t *parents, double *chances);

#endif
