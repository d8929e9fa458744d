#include "skip_search.h"
#include "draftsmith.h"
#include "error.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  KEPT = 2,        /* sublayers at either end */
  MODEL_EVERY = 5, /* sets, of which one is the model's */
  MOST_IDLE = 300,
  MOST_TRIED = 1000,
};
static const double GOOD_ENOUGH = 0.93;
static const double RIDGE = 0.2;        /* scores that the first guess, no effect, weighs */
static const double LEAST_MATCH = 0.02; /* added to a score: one of 50 tokens */
static const double NOISE = 0.14;       /* deviation of the logarithm of a score of 1: of 50 tokens */
static const uint64_t STREAM = UINT64_C(1) << 32; /* of uniforms that no level of a ladder draws */

int32_t ds_skip_search_init(ds_skip_search *search, int32_t n_sublayers, double share) {
  int32_t n_free = n_sublayers - 2 * KEPT;
  if (n_sublayers % 2 || n_free < 2)
    return ds_fail(DS_ERROR_ARGUMENT,
                   "%d sublayers: the first and the last layer are kept, so at least 3 layers are wanted",
                   n_sublayers);
  if (!(share > 0 && share < 1))
    return ds_fail(DS_ERROR_ARGUMENT, "a share of %g of the sublayers; above 0 and below 1 is wanted", share);
  size_t n = (size_t)n_free;
  *search =
      (ds_skip_search){.n_sublayers = n_sublayers, .n_skipped = (int32_t)(n_free * share), .n_free = n_free};
  if (search->n_skipped < 1) search->n_skipped = 1;
  search->best = malloc((size_t)n_sublayers);
  search->tried = malloc((size_t)n_sublayers);
  search->effects = malloc(n * sizeof(double));
  search->covariance = malloc(n * n * sizeof(double));
  search->scratch = malloc(n * sizeof(double));
  if (!search->best || !search->tried || !search->effects || !search->covariance || !search->scratch) {
    ds_skip_search_free(search);
    return ds_fail(DS_ERROR_MEMORY, "no memory to search %d sublayers", n_sublayers);
  }
  ds_skip_search_reset(search);
  return DS_OK;
}

void ds_skip_search_free(ds_skip_search *search) {
  free(search->best);
  free(search->tried);
  free(search->effects);
  free(search->covariance);
  free(search->scratch);
}

void ds_skip_search_reset(ds_skip_search *search) {
  size_t n = (size_t)search->n_free;
  search->n_tried = search->n_idle = 0;
  search->match = search->tried_match = 0;
  memset(search->effects, 0, n * sizeof(double));
  memset(search->covariance, 0, n * n * sizeof(double));
  for (size_t i = 0; i < n; ++i) search->covariance[i * n + i] = 1 / RIDGE;
  ds_skip_search_propose(search);
  memcpy(search->best, search->tried, (size_t)search->n_sublayers);
}

bool ds_skip_search_is_over(const ds_skip_search *search) {
  return search->match >= GOOD_ENOUGH || search->n_idle >= MOST_IDLE || search->n_tried >= MOST_TRIED;
}

/* ---- Sets ------------------------------------------------------------------------------------------------ */

static void space_evenly(int32_t n, int32_t n_chosen, uint8_t *chosen) {
  for (int32_t i = 0; i < n_chosen; ++i) chosen[(int32_t)(((int64_t)2 * i + 1) * n / (2 * n_chosen))] = 1;
}

/* One for each sublayer, into scratch. */
static void draw_uniforms(ds_skip_search *search) {
  uint64_t n = (uint64_t)search->n_free;
  ds_uniforms(0, STREAM, (uint64_t)search->n_tried * n, search->n_free, search->scratch);
}

/* Every set of that size is as likely (Knuth, The Art of Computer Programming 2, algorithm 3.4.2 S). */
static void draw(ds_skip_search *search, uint8_t *chosen) {
  int32_t n = search->n_free, left = search->n_skipped;
  draw_uniforms(search);
  for (int32_t i = 0; i < n; ++i) left -= chosen[i] = search->scratch[i] * (n - i) < left;
}

/* Those with the largest effects, each drawn from what is known of it (Thompson sampling, Biometrika 1933): of its mean
 * and its deviation, evenly. Of equals the first. */
static void choose_by_model(ds_skip_search *search, uint8_t *chosen) {
  int32_t n = search->n_free;
  double *drawn = search->scratch;
  draw_uniforms(search);
  for (int32_t i = 0; i < n; ++i) {
    double variance =
        12 * search->covariance[(size_t)i * (size_t)n + (size_t)i]; /* of one from 0 to 1: 1/12 */
    drawn[i] = search->effects[i] + NOISE * sqrt(variance) * (drawn[i] - 0.5);
  }
  for (int32_t k = 0; k < search->n_skipped; ++k) {
    int32_t best = -1;
    for (int32_t i = 0; i < n; ++i)
      if (!chosen[i] && (best < 0 || drawn[i] > drawn[best])) best = i;
    chosen[best] = 1;
  }
}

void ds_skip_search_propose(ds_skip_search *search) {
  uint8_t *chosen = search->tried + KEPT;
  memset(search->tried, 0, (size_t)search->n_sublayers);
  if (search->n_tried == 0)
    space_evenly(search->n_free, search->n_skipped, chosen);
  else if ((search->n_tried + 1) % MODEL_EVERY == 0)
    choose_by_model(search, chosen);
  else
    draw(search, chosen);
}

/* ---- Scores ---------------------------------------------------------------------------------------------- */

/* One more row x, the set, in a weighted regression: the gain is C x / (1 / weight + x' C x). The deviation of the
 * logarithm of a count is that of the count, its root, over itself: so a score weighs what it is. */
static void learn(ds_skip_search *search, const uint8_t *chosen, double match) {
  int32_t n = search->n_free;
  double *moved = search->scratch, weight = match + LEAST_MATCH, spread = 1 / weight, error = log(weight);
  for (int32_t i = 0; i < n; ++i) {
    const double *row = search->covariance + (size_t)i * (size_t)n;
    moved[i] = 0;
    for (int32_t j = 0; j < n; ++j)
      if (chosen[j]) moved[i] += row[j];
  }
  for (int32_t i = 0; i < n; ++i)
    if (chosen[i]) {
      spread += moved[i];
      error -= search->effects[i];
    }
  for (int32_t i = 0; i < n; ++i) {
    double *row = search->covariance + (size_t)i * (size_t)n, gain = moved[i] / spread;
    search->effects[i] += gain * error;
    for (int32_t j = 0; j < n; ++j) row[j] -= gain * moved[j];
  }
}

void ds_skip_search_score(ds_skip_search *search, double match) {
  learn(search, search->tried + KEPT, match);
  bool is_better = search->n_tried == 0 || match > search->match;
  search->tried_match = match;
  search->n_tried += 1;
  search->n_idle = is_better ? 0 : search->n_idle + 1;
  if (!is_better) return;
  search->match = match;
  memcpy(search->best, search->tried, (size_t)search->n_sublayers);
}
