/* Who follows whom among the tokens of a proposal. A chain is a tree whose every node has one child. */
#ifndef DRAFTSMITH_TREE_H
#define DRAFTSMITH_TREE_H

#include "loop.h"

#include <stdbool.h>

typedef struct {
  int32_t n_nodes;
  bool is_chain;
  int32_t parents[DS_MAX_DRAFT]; /* of each node: one before it, or -1, the text that is proposed for */
  int32_t depths[DS_MAX_DRAFT];  /* how many nodes it follows */
} ds_tree;

void ds_tree_make_chain(ds_tree *tree, int32_t n_nodes);

/* Complete a tree of which n_nodes parents are there; an error if one of them is no node before its child or a
 * node follows max_depth others. */
int32_t ds_tree_measure(ds_tree *tree, int32_t n_nodes, int32_t max_depth);

/* The first n_nodes alone, which are a tree too. */
void ds_tree_cut(ds_tree *tree, int32_t n_nodes);

int32_t ds_tree_count_levels(const ds_tree *tree);

/* Positions int64 [n_rows] and mask uint8 [n_rows, start + n_rows] for a call that reads the sequence from slot
 * `start` on: the tokens up to `length`, which see what is before them, then the tree's, which see their path. */
void ds_tree_lay_out(const ds_tree *tree, int32_t start, int32_t length, int64_t *positions, uint8_t *mask);

#endif
