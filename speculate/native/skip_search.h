/* SWIFT's search for sublayers to skip (Xia et al., arXiv 2410.06916): sets are tried one at a time, and the best
 * stays.
 *
 * Sublayers are attention and MLP of each layer in turn. Those of the first and the last layer are kept, and of the
 * others every set skips as many. The first set is evenly spaced: below a share of one half no layer loses both of
 * its sublayers. Then sets are drawn at random, and every fifth is the one that a model of all scores so far finds
 * best. The paper asks a Gaussian process for every 25th. This model costs next to nothing: in it each skipped sublayer
 * leaves a share of the match, whatever else is skipped. So the logarithm of a score is a sum of effects, which
 * weighted ridge regression estimates in closed form (recursive least squares). Random sets of one size tell them
 * apart, and the best set of that size is the one with the largest.
 *
 * A function of the scores it is told, on one machine: its random numbers are always the same.
 */
#ifndef DRAFTSMITH_SKIP_SEARCH_H
#define DRAFTSMITH_SKIP_SEARCH_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
  int32_t n_sublayers, n_skipped;
  int32_t n_tried, n_idle; /* sets, and those since the best */
  double match, tried_match;
  uint8_t *best, *tried; /* [n_sublayers]: whether each is skipped; at first, both are the first set */

  /* The model, over the sublayers that may be skipped. */
  int32_t n_free;
  double *effects;    /* [n_free]: of skipping each, on the logarithm of a score */
  double *covariance; /* [n_free, n_free]: of the effects, but for NOISE squared */
  double *scratch;    /* [n_free] */
} ds_skip_search;

/* Skip this share, above 0 and below 1, of the sublayers that may be: at least one. Returns DS_OK or an error, after
 * which there is nothing to free. */
int32_t ds_skip_search_init(ds_skip_search *search, int32_t n_sublayers, double share);
void ds_skip_search_free(ds_skip_search *search);
void ds_skip_search_reset(ds_skip_search *search); /* as after init */

/* Whether the best is good enough (0.93), has stood for 300 sets, or 1000 were tried. */
bool ds_skip_search_is_over(const ds_skip_search *search);

/* Make `tried` the set to be scored next. */
void ds_skip_search_propose(ds_skip_search *search);

/* Its score, in [0, 1]: it is the best if that is larger than any before. */
void ds_skip_search_score(ds_skip_search *search, double match);

#endif
