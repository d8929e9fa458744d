/* What a drafter that is a model has read of the tree that it drafts: rows in its cache, in the slots behind the text
 * and in the order in which they were read. That order is seldom the one in which the tree has them: a row may be read
 * early, or for nothing. */
#ifndef DRAFTSMITH_TREE_CACHE_H
#define DRAFTSMITH_TREE_CACHE_H

#include "decoder.h"
#include "sequoia.h"

/* Tokens that may come next, the likeliest first. */
typedef struct {
  int32_t n;
  int32_t tokens[DS_MAX_DRAFT];
  double chances[DS_MAX_DRAFT];
} ds_candidates;

struct ds_tree_cache {
  int32_t n_rows;
  int32_t tokens[DS_TREE_ROWS], parents[DS_TREE_ROWS],
      depths[DS_TREE_ROWS];                   /* parents: rows, or -1: the text */
  int32_t rows[DS_MAX_DRAFT];                 /* of each node of the proposal, or -1: it was not read */
  ds_candidates candidates[DS_TREE_ROWS + 1]; /* behind the text, and behind each row */
  double *law;                                /* [vocab] to work in */
  ds_sequoia sequoia;                         /* of DS_SEQUOIA */
};

/* How many rows may be read for a proposal behind the first `length` tokens. */
int32_t ds_tree_cache_room(const level *l, int32_t length);

/* Enter a row that is to be read; returns which it is. */
int32_t ds_tree_cache_add(ds_tree_cache *cache, int32_t parent, int32_t token);

/* Read the rows from `first` on, each behind its own path; the logits after each. */
int32_t ds_tree_cache_read(ds_decoder *d, level *l, int32_t length, int32_t first, const float **logits);

/* Of the proposal behind the first `length` tokens the nodes path [n_accepted] stand: what was read of them moves
 * together behind the text, so that it need not be read again. */
int32_t ds_tree_cache_keep(ds_decoder *d, level *l, int32_t length, const int32_t *path, int32_t n_accepted);

/* The likeliest tokens of the law behind a row, or behind the text if that is -1: up to `most`, of equals the
 * first; none without mass. */
void ds_list_candidates(ds_tree_cache *cache, int32_t row, const double *law, int32_t vocab, int32_t most);

#endif
