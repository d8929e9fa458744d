/* Draft lengths from costs and frequencies; the rule is in schedule.h. */
#include "schedule.h"
#include "leaders.h"

#include <string.h>

enum {
  PACE_TOKENS = 32,  /* the rate is that of about so many tokens */
  TRUST_DRAFTS = 64, /* and a frequency that of at most so many drafts */
  PRIOR_DRAFTS = 4,  /* what the first guess weighs */
  IDLE_ROUNDS = 16,  /* between explorations */
};

/* The first guess for a link of a chain, and for a node whose drafter gives it a chance in the bucket. */
static const double PRIOR[DS_BUCKETS] = {0.4, 0.55, 0.7, 0.85, 0.95, 0.015, 0.06, 0.2, 0.45, 0.8};

/* ---- Time ---------------------------------------------------------------------------------------------- */

double ds_pace_of_call(const ds_pace *pace, int32_t n_rows) {
  if (!pace->costs) return 0;
  return pace->costs[(n_rows < pace->n_costs ? n_rows : pace->n_costs) - 1];
}

/* To begin with, the level decodes alone. */
void ds_pace_reset(ds_pace *pace) {
  pace->gained = PACE_TOKENS;
  pace->spent = PACE_TOKENS * ds_pace_of_call(pace, 1);
}

void ds_pace_add(ds_pace *pace, double milliseconds, int32_t n_tokens) {
  double keep = 1 - (double)n_tokens / PACE_TOKENS;
  if (keep < 0) keep = 0;
  pace->gained = keep * pace->gained + n_tokens;
  pace->spent = keep * pace->spent + milliseconds;
}

/* Milliseconds a token: never more than without drafts, which is always to be had. */
static double rate(const ds_pace *pace) {
  if (!pace->costs) return 0;
  double now = pace->spent / pace->gained;
  return now < pace->costs[0] ? now : pace->costs[0];
}

/* ---- Acceptance ---------------------------------------------------------------------------------------- */

void ds_trust_reset(ds_trust *trust) { memset(trust, 0, sizeof *trust); }

static double frequency(double accepted, double tried, double prior) {
  return (accepted + PRIOR_DRAFTS * prior) / (tried + PRIOR_DRAFTS);
}

double ds_trust_in(const ds_trust *trust, uint8_t bucket) {
  return frequency(trust->accepted[bucket], trust->tried[bucket], PRIOR[bucket]);
}

/* Of a token that is not drafted yet, so that its bucket is unknown. */
static double trust_in_next(const ds_trust *trust) {
  double accepted = 0, tried = 0;
  for (int b = 0; b < DS_BUCKETS; ++b) {
    accepted += trust->accepted[b];
    tried += trust->tried[b];
  }
  return frequency(accepted, tried, PRIOR[DS_GRADES / 2]);
}

static uint8_t bucket_of(double value, const double limits[DS_GRADES - 1]) {
  uint8_t b = 0;
  while (b < DS_GRADES - 1 && value >= limits[b]) ++b;
  return b;
}

static const double MATCHES[DS_GRADES - 1] = {3, 5, 9, 17};

uint8_t ds_bucket_of_match(int32_t length) { return bucket_of(length, MATCHES); }

double ds_chance_of_match(int32_t length) { return PRIOR[ds_bucket_of_match(length)]; }

int32_t ds_match_of_chance(double chance) {
  int b = 0;
  while (b < DS_GRADES - 1 && chance >= (PRIOR[b] + PRIOR[b + 1]) / 2) ++b;
  return b ? (int32_t)MATCHES[b - 1] : 1;
}

uint8_t ds_bucket_of_law(const float *logits, const float *peaks, int32_t vocab) {
  static const double limits[DS_GRADES - 1] = {0.5, 1, 2, 4};
  float most[2];
  int32_t tokens[2];
  ds_find_leaders(logits, peaks, vocab, 2, most, tokens);
  return bucket_of((double)most[0] - (double)most[1], limits);
}

uint8_t ds_bucket_of_chance(double chance) {
  static const double limits[DS_GRADES - 1] = {0.03, 0.1, 0.3, 0.6};
  return DS_GRADES + bucket_of(chance, limits);
}

void ds_trust_learn(ds_trust *trust, const uint8_t *buckets, const ds_tree *tree, const int32_t *path,
                    int32_t n_accepted) {
  for (int32_t i = 0; i < tree->n_nodes; ++i) {
    int32_t depth = tree->depths[i];
    if (depth > n_accepted || (depth > 0 && path[depth - 1] != tree->parents[i])) continue;
    uint8_t b = buckets[i];
    if (trust->tried[b] >= TRUST_DRAFTS) {
      trust->tried[b] /= 2;
      trust->accepted[b] /= 2;
    }
    trust->tried[b] += 1;
    trust->accepted[b] += depth < n_accepted && path[depth] == i;
  }
  for (int32_t depth = 0; depth <= n_accepted; ++depth) {
    int32_t node = depth > 0 ? path[depth - 1] : -1, child = node + 1;
    while (child < tree->n_nodes && tree->parents[child] != node) ++child;
    if (child == tree->n_nodes) break;
    if (trust->places >= TRUST_DRAFTS) {
      trust->places /= 2;
      trust->met /= 2;
    }
    trust->places += 1;
    trust->met += depth < n_accepted;
  }
}

void ds_trust_note(ds_trust *trust, int32_t n_draft) { trust->idle = n_draft ? 0 : trust->idle + 1; }

bool ds_explores(const ds_trust *trust) { return trust->idle >= IDLE_ROUNDS; }

/* ---- Length -------------------------------------------------------------------------------------------- */

/* Whether some number of steps behind n_draft tokens pays, each of which costs step_ms and is right with probability
 * `next` if all before it were. */
static bool steps_pay(const ds_pace *above, double step_ms, double reach, double next, int32_t n_draft,
                      int32_t room) {
  double gain = 0;
  for (int32_t n = 1; n <= room; ++n) {
    reach *= next;
    gain += rate(above) * reach;
    double cost = n * step_ms + ds_pace_of_call(above, n_draft + n + 1) - ds_pace_of_call(above, n_draft + 1);
    if (gain > cost) return true;
  }
  return false;
}

bool ds_pays_to_go_on(const ds_pace *above, const ds_pace *own, const ds_trust *trust, const uint8_t *buckets,
                      int32_t n_draft, int32_t room) {
  if (n_draft == 0 && ds_explores(trust)) return true;
  double reach = 1;
  for (int32_t i = 0; i < n_draft; ++i) reach *= ds_trust_in(trust, buckets[i]);
  return steps_pay(above, rate(own), reach, trust_in_next(trust), n_draft, room);
}

static double trust_in_places(const ds_trust *trust) {
  return frequency(trust->met, trust->places, PRIOR[DS_GRADES / 2]);
}

bool ds_pays_to_read(const ds_pace *above, const ds_trust *trust, double call_ms, double reach,
                     int32_t n_nodes, int32_t room) {
  if (n_nodes == 0 && ds_explores(trust)) return true;
  return steps_pay(above, call_ms, reach, trust_in_places(trust), n_nodes, room);
}

double ds_worth_of_reading(const ds_pace *above, const ds_trust *trust, double reach) {
  return rate(above) * reach * trust_in_places(trust);
}

int32_t ds_length_that_pays(const ds_pace *above, const ds_trust *trust, const uint8_t *buckets,
                            const ds_tree *tree) {
  double reach[DS_MAX_DRAFT], gain = 0, most = 0;
  int32_t best = 0;
  for (int32_t i = 0; i < tree->n_nodes; ++i) {
    int32_t parent = tree->parents[i];
    reach[i] = (parent < 0 ? 1 : reach[parent]) * ds_trust_in(trust, buckets[i]);
    gain += rate(above) * reach[i];
    double profit = gain - (ds_pace_of_call(above, i + 2) - ds_pace_of_call(above, 1));
    if (profit > most || (i == 0 && ds_explores(trust))) {
      most = profit;
      best = i + 1;
    }
  }
  return best;
}
