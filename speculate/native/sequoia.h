/* Trees of one shape: which is best, by how often the first, the second, .. child of an accepted node is the one that
 * is accepted next (Sequoia, arXiv 2402.12374).
 *
 * The chance that a node is accepted is taken to depend on its place among its siblings alone. Then a tree gives
 * 1 + the sum over its nodes of the products of these rates along their paths. The paper finds the best tree of every size
 * and depth by a dynamic program. Where the rates do not rise from sibling to sibling, the best are the nodes with the
 * largest products, so best-first growth (growth.h) finds the same trees; rates that rise are taken for noise and
 * levelled out.
 *
 * The shape stands before a token is drafted, and rates come from verdicts of the past: nothing is anticipated.
 */
#ifndef DRAFTSMITH_SEQUOIA_H
#define DRAFTSMITH_SEQUOIA_H

#include "schedule.h"

enum { DS_SEQUOIA_WIDTH = 8 /* children of a node */ };

typedef struct {
  /* By place among siblings: behind how many accepted nodes there was one, and how often it was accepted. */
  double tried[DS_SEQUOIA_WIDTH], accepted[DS_SEQUOIA_WIDTH];
  int32_t n_proposals; /* so far */
  int32_t n_nodes;     /* that pay; those behind them are next best */
  int32_t parents[DS_MAX_DRAFT], ranks[DS_MAX_DRAFT], depths[DS_MAX_DRAFT];
} ds_sequoia;

void ds_sequoia_reset(ds_sequoia *sequoia);

/* Make the shape of the next proposal, of up to max_nodes: with costs (`own` of the drafter, `above` of its verifier)
 * the one with the least time a token, else the one with the most tokens. From time to time only, the others stay as
 * the one before. */
void ds_sequoia_update(ds_sequoia *sequoia, int32_t max_nodes, const ds_pace *own, const ds_pace *above);

/* Of a proposal the nodes path[0 .. n_accepted) were accepted. */
void ds_sequoia_learn(ds_sequoia *sequoia, const ds_tree *tree, const int32_t *path, int32_t n_accepted);

#endif
