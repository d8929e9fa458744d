/* Drives the decode loop from C for the sanitizers to watch: random ladders over engines that check what they
 * are asked, engines that fail, memory that runs out, and arguments that must be refused.
 *
 * Link with -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc: no allocation is granted during a step.
 */
#include "exercise.h"
#include "loop.h"
#include "model.h"

#include <math.h>

enum { LONG = 70 };

/* Proposes any tree whatever, or one that breaks a promise. */
typedef struct {
  ds_drafter drafter;
  int32_t vocab, excess, wrong_parent;
} gardener;

static int32_t count_none(ds_drafter *drafter, int32_t n_tokens) {
  (void)drafter, (void)n_tokens;
  return DS_OK;
}

static int32_t learn_none(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens) {
  (void)drafter, (void)tokens, (void)n_tokens;
  return DS_OK;
}

static int32_t draft_none(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                          int32_t *draft, int32_t *support) {
  (void)drafter, (void)tail, (void)n_tail, (void)max_draft, (void)draft, (void)support;
  return 0;
}

static int32_t grow(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                    int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances) {
  const gardener *g = (const gardener *)drafter;
  int32_t depths[DS_MAX_DRAFT], n = below(max_nodes + 1);
  (void)tail, (void)n_tail;
  CHECK(max_nodes >= 1 && max_nodes <= DS_MAX_DRAFT && max_depth >= 1);
  for (int32_t i = 0; i < n; ++i) {
    do parents[i] = below(i + 1) - 1;
    while (parents[i] >= 0 && depths[parents[i]] + 1 >= max_depth);
    depths[i] = parents[i] < 0 ? 0 : depths[parents[i]] + 1;
    tokens[i] = below(g->vocab);
    chances[i] = uniform();
  }
  if (n && g->wrong_parent) parents[n - 1] = g->wrong_parent > 0 ? n - 1 : -2;
  return n + g->excess;
}

static gardener make_gardener(int32_t vocab) {
  return (gardener){
      {.begin = count_none, .append = learn_none, .draft = draft_none, .draft_tree = grow}, vocab, 0, 0};
}

static double costs[DS_MAX_LEVELS][DS_MAX_DRAFT + 1];

/* Up to three drafting engines and perhaps a drafter that is none; returns the number of levels. */
static int32_t make_ladder(model models[4], ds_level levels[5], gardener *trees) {
  int32_t vocab = 2 + below(12), n = 0, n_models = 1 + below(4);
  *trees = make_gardener(vocab);
  if (below(3)) levels[n++] = (ds_level){NULL, 1 + below(9), 0, NULL, NULL, 0};
  if (n && below(2)) {
    levels[0].n_draft = 1 + below(DS_MAX_DRAFT);
    levels[0].drafter = &trees->drafter;
    levels[0].tree = 1;
  }
  for (int32_t i = n_models - 1; i >= 0; --i) {
    int32_t padding = i > 0 ? below(4) - 1 : 0;
    models[i] = make_model(vocab + padding, i);
    levels[n] = (ds_level){&models[i].engine, i ? 1 + below(6) : 0, 0, NULL, NULL, 0};
    if (below(2)) {
      double cost = 0.1 + 3 * uniform();
      for (int32_t r = 0; r <= DS_MAX_DRAFT; ++r) costs[n][r] = cost += below(2) ? 0 : 0.2 * uniform();
      levels[n].costs = costs[n];
      levels[n].n_costs = DS_MAX_DRAFT + 1;
    }
    if (n == 0 && i > 0 && below(3)) { /* a model that drafts trees */
      levels[n].tree = 1 + below(DS_SEQUOIA);
      levels[n].n_draft = 1 + below(DS_MAX_DRAFT);
    }
    ++n;
  }
  return n;
}

static void check_counters(const ds_decoder *decoder, int32_t n_levels, int32_t emitted) {
  ds_level_stats stats, drafter = {0};
  CHECK(ds_decoder_stats(decoder, n_levels - 1, &stats) == DS_OK);
  if (n_levels > 1) CHECK(ds_decoder_stats(decoder, n_levels - 2, &drafter) == DS_OK);
  CHECK(stats.rounds + drafter.accepted == emitted + stats.discarded);
  for (int32_t i = 0; i < n_levels; ++i) {
    CHECK(ds_decoder_stats(decoder, i, &stats) == DS_OK && stats.accepted <= stats.drafted);
    int64_t drafted = 0, accepted = 0;
    for (int32_t k = 0; k < DS_MAX_DRAFT; ++k) {
      drafted += stats.drafted_at[k];
      accepted += stats.accepted_at[k];
    }
    CHECK(drafted <= stats.drafted && accepted == stats.accepted); /* a tree has many nodes at a depth */
  }
}

/* A generation to its end or to its failure; returns the number of tokens or the error. */
static int32_t decode(ds_decoder *decoder, const ds_sampling *sampling, const int32_t *prompt,
                      int32_t n_prompt, int32_t wanted, int32_t *out, int32_t n_eos, const int32_t *eos) {
  int32_t status = ds_decoder_begin(decoder, sampling, prompt, n_prompt, wanted, eos, n_eos), n = 0;
  if (status != DS_OK) return status;
  int32_t tokens[DS_MAX_DRAFT + 1];
  for (;;) {
    int32_t granted = spared;
    spared = 0;
    int32_t count = ds_decoder_step(decoder, tokens, DS_MAX_DRAFT + 1);
    spared = granted;
    if (count < 0) return count;
    if (count == 0) break;
    CHECK(n + count <= wanted);
    for (int32_t i = 0; i < count; ++i) out[n++] = tokens[i];
  }
  CHECK(ds_decoder_step(decoder, tokens, DS_MAX_DRAFT + 1) == 0);
  CHECK(n == wanted || (n_eos && out[n - 1] == eos[0]));
  return n;
}

static void exercise_ladders(void) {
  for (int trial = 0; trial < 400; ++trial) {
    model models[4];
    ds_level levels[5];
    gardener trees;
    int32_t n_levels = make_ladder(models, levels, &trees), vocab = models[0].engine.vocab;
    ds_decoder *decoder = ds_decoder_create(levels, n_levels),
               *plain = ds_decoder_create(&levels[n_levels - 1], 1);
    CHECK(decoder && plain);
    for (int again = 0; again < 2; ++again) { /* a decoder serves many generations */
      int32_t n_prompt = 1 + below(below(4) ? 20 : 200), wanted = 1 + below(60);
      int32_t eos = below(vocab), n_eos = below(2), alone[SLOTS], out[SLOTS];
      int32_t *prompt = malloc((size_t)n_prompt * sizeof *prompt);
      for (int32_t i = 0; i < n_prompt; ++i) prompt[i] = below(vocab);
      ds_sampling sampling = {below(2) ? 0 : 1.2, below(3), 0.9, (uint64_t)trial, trial % 3, NULL};
      int32_t n = decode(decoder, &sampling, prompt, n_prompt, wanted, out, n_eos, &eos);
      CHECK(n >= 1);
      check_counters(decoder, n_levels, n);
      if (sampling.temperature == 0 || sampling.rule == DS_RULE_EXACT) {
        CHECK(decode(plain, &sampling, prompt, n_prompt, wanted, alone, n_eos, &eos) == n);
        CHECK(!memcmp(alone, out, (size_t)n * sizeof *out));
      }
      free(prompt);
    }
    ds_decoder_free(decoder);
    ds_decoder_free(plain);
    for (int32_t i = 0; i < 4; ++i)
      if (n_levels - i > (levels[0].engine == NULL)) free(models[i].logits);
  }
}

/* The largest drafts that there can be, all accepted and all rejected. */
static void exercise_limits(void) {
  for (int32_t own = 0; own < 200; own += 199) {
    model target = make_model(9, 0), drafter = make_model(9, own);
    ds_level levels[3] = {{NULL, DS_MAX_DRAFT, 0, NULL, NULL, 0},
                          {&drafter.engine, DS_MAX_DRAFT, 0, NULL, NULL, 0},
                          {&target.engine, 0, 0, NULL, NULL, 0}};
    ds_decoder *decoder = ds_decoder_create(levels, 3);
    int32_t prompt[1] = {3}, out[SLOTS];
    for (int32_t rule = DS_RULE_TOKEN; rule <= DS_RULE_EXACT; ++rule) {
      ds_sampling sampling = {rule, 0, 1, 1, rule, NULL};
      CHECK(decode(decoder, &sampling, prompt, 1, LONG, out, 0, NULL) == LONG);
    }
    ds_decoder_free(decoder);
    free(target.logits);
    free(drafter.logits);
  }
}

static const ds_sampling WARM = {1, 0, 1, 7, DS_RULE_BLOCK, NULL};

static int32_t give_no_logits(ds_engine *engine, int32_t n_rows, const int32_t *ids, int32_t start,
                              const int64_t *positions, const uint8_t *mask, int32_t n_logits,
                              const float **logits) {
  (void)engine, (void)n_rows, (void)ids, (void)start, (void)positions, (void)mask, (void)n_logits,
      (void)logits;
  return DS_OK;
}

static int32_t refuse_room(ds_engine *engine, int32_t n_slots) {
  (void)engine, (void)n_slots;
  ds_set_error("no slots today");
  return DS_ERROR_ENGINE;
}

static int32_t accept_too_much(int32_t rule, int32_t n_nodes, int32_t vocab, const double *p, const double *q,
                               const int32_t *tokens, const int32_t *parents, const double *uniforms,
                               int32_t *accepted, int32_t *n_accepted, int32_t *next_token) {
  (void)rule, (void)vocab, (void)p, (void)q, (void)tokens, (void)parents, (void)uniforms, (void)accepted;
  *n_accepted = n_nodes + 1;
  *next_token = 0;
  return DS_OK;
}

/* The last node alone, which has others before it. */
static int32_t accept_no_path(int32_t rule, int32_t n_nodes, int32_t vocab, const double *p, const double *q,
                              const int32_t *tokens, const int32_t *parents, const double *uniforms,
                              int32_t *accepted, int32_t *n_accepted, int32_t *next_token) {
  (void)rule, (void)vocab, (void)p, (void)q, (void)tokens, (void)parents, (void)uniforms;
  *next_token = 0;
  if ((*n_accepted = n_nodes > 1)) accepted[0] = n_nodes - 1;
  return DS_OK;
}

/* Wherever an engine fails, its words come out, the generation is over, and the next one works. */
static void exercise_failing_engines(void) {
  model target = make_model(6, 0), drafter = make_model(6, 1);
  ds_level levels[3] = {{NULL, 3, 0, NULL, NULL, 0},
                        {&drafter.engine, 4, 0, NULL, NULL, 0},
                        {&target.engine, 0, 0, NULL, NULL, 0}};
  ds_decoder *decoder = ds_decoder_create(levels, 3);
  int32_t prompt[3] = {1, 2, 3}, out[40];
  for (int32_t after = 0; after < 8; ++after)
    for (int which = 0; which < 2; ++which) {
      model *failing = which ? &target : &drafter;
      failing->calls_left = after;
      CHECK(decode(decoder, &WARM, prompt, 3, 40, out, 0, NULL) == DS_ERROR_ENGINE);
      CHECK(!strcmp(ds_error_message(), "this engine had enough"));
      REFUSED(ds_decoder_step(decoder, out, 40), "begin one");
      failing->calls_left = -1;
      CHECK(decode(decoder, &WARM, prompt, 3, 40, out, 0, NULL) == 40);
    }
  drafter.engine.forward = give_no_logits;
  CHECK(decode(decoder, &WARM, prompt, 3, 40, out, 0, NULL) == DS_ERROR_ENGINE);
  CHECK(strstr(ds_error_message(), "no logits"));
  drafter.engine.forward = forward;
  drafter.engine.reserve = refuse_room;
  CHECK(decode(decoder, &WARM, prompt, 3, 40, out, 0, NULL) == DS_ERROR_ENGINE);
  CHECK(!strcmp(ds_error_message(), "no slots today"));
  drafter.engine.reserve = reserve;
  ds_sampling wrong = WARM;
  wrong.verify = accept_too_much;
  CHECK(decode(decoder, &wrong, prompt, 3, 40, out, 0, NULL) == DS_ERROR_ARGUMENT);
  CHECK(strstr(ds_error_message(), "accepts 1 of 0"));
  wrong.verify = accept_no_path;
  CHECK(decode(decoder, &wrong, prompt, 3, 40, out, 0, NULL) == DS_ERROR_ARGUMENT);
  CHECK(strstr(ds_error_message(), "behind node -1"));
  ds_decoder_free(decoder);
  free(target.logits);
  free(drafter.logits);
}

/* Drafters that break their word about trees. */
static void exercise_bad_trees(void) {
  model target = make_model(6, 0);
  gardener trees = make_gardener(6);
  ds_level levels[2] = {{NULL, 7, 0, NULL, &trees.drafter, 1}, {&target.engine, 0, 0, NULL, NULL, 0}};
  ds_decoder *decoder = ds_decoder_create(levels, 2);
  int32_t prompt[1] = {1}, out[SLOTS];
  ds_sampling greedy = {0, 0, 1, 1, 0, NULL};
  CHECK(decode(decoder, &greedy, prompt, 1, 200, out, 0, NULL) == 200);
  trees.excess = 8;
  CHECK(decode(decoder, &greedy, prompt, 1, 200, out, 0, NULL) == DS_ERROR_ARGUMENT);
  CHECK(strstr(ds_error_message(), "nodes where 7 were asked for"));
  trees.excess = 0;
  for (trees.wrong_parent = -1; trees.wrong_parent < 2; trees.wrong_parent += 2) {
    CHECK(decode(decoder, &greedy, prompt, 1, 200, out, 0, NULL) == DS_ERROR_ARGUMENT);
    CHECK(strstr(ds_error_message(), "one before it is wanted"));
  }
  trees.excess = trees.wrong_parent = 0;
  trees.vocab = 99;
  CHECK(decode(decoder, &greedy, prompt, 1, 200, out, 0, NULL) == DS_ERROR_ARGUMENT);
  CHECK(strstr(ds_error_message(), "outside the vocabulary of 6"));
  trees.vocab = 6;
  CHECK(decode(decoder, &greedy, prompt, 1, SLOTS - 1, out, 0, NULL) == SLOTS - 1); /* to the last slot */
  ds_decoder_free(decoder);
  free(target.logits);
}

static void exercise_bad_arguments(void) {
  model target = make_model(6, 0), drafter = make_model(6, 1), hollow = make_model(6, 1);
  hollow.engine.forward = NULL;
  double table[5] = {1, 1, 1, 1, NAN};
#define REFUSED_LADDER(words, ...)                                                                           \
  do {                                                                                                       \
    ds_level bad[] = {__VA_ARGS__};                                                                          \
    CHECK(!ds_decoder_create(bad, sizeof bad / sizeof *bad) && strstr(ds_error_message(), words));           \
  } while (0)
  ds_level good[2] = {{&drafter.engine, 4, 4, table, NULL, 0}, {&target.engine, 0, 0, NULL, NULL, 0}};
  CHECK(!ds_decoder_create(NULL, 1) && strstr(ds_error_message(), "1 levels"));
  CHECK(!ds_decoder_create(good, 0) && strstr(ds_error_message(), "0 levels"));
  CHECK(!ds_decoder_create(good, DS_MAX_LEVELS + 1) && strstr(ds_error_message(), "9 levels"));
  REFUSED_LADDER("level 0 has no engine", {NULL, 0, 0, NULL, NULL, 0});
  REFUSED_LADDER("level 1 has no engine", good[0], {NULL, 3, 0, NULL, NULL, 0}, good[1]);
  REFUSED_LADDER("no functions", {&hollow.engine, 1, 0, NULL, NULL, 0}, good[1]);
  REFUSED_LADDER("drafts 0 tokens", {&drafter.engine, 0, 0, NULL, NULL, 0}, good[1]);
  REFUSED_LADDER("drafts 65 tokens", {&drafter.engine, DS_MAX_DRAFT + 1, 0, NULL, NULL, 0}, good[1]);
  REFUSED_LADDER("drafts 2 tokens", {&target.engine, 2, 0, NULL, NULL, 0});
  REFUSED_LADDER("share an engine", good[0], good[0], good[1]);
  REFUSED_LADDER("has no costs", {NULL, 3, 4, table, NULL, 0}, good[1]);
  REFUSED_LADDER("so it comes first", {NULL, 1, 0, NULL, NULL, 0}, {&drafter.engine, 1, 0, NULL, NULL, 1},
                 good[1]);
  REFUSED_LADDER("so it comes first", {&target.engine, 0, 0, NULL, NULL, DS_TREE});
  REFUSED_LADDER("tree is 9", {&drafter.engine, 1, 0, NULL, NULL, 9}, good[1]);
  REFUSED_LADDER("tree is 2, none of ds_branching for", {NULL, 1, 0, NULL, NULL, DS_GRAPH}, good[1]);
  REFUSED_LADDER("costs of 4 row counts; 5", good[0], {&target.engine, 0, 4, table, NULL, 0});
  REFUSED_LADDER("5 rows cost nan", good[0], {&target.engine, 0, 5, table, NULL, 0});

  ds_decoder *decoder = ds_decoder_create(good, 2);
  CHECK(decoder);
  int32_t prompt[3] = {1, 2, 3}, out[8], high = 6, low = -1;
  ds_sampling rule = WARM, heat = WARM;
  rule.rule = 3;
  heat.temperature = NAN;
  ds_level_stats stats;
  REFUSED(ds_decoder_step(decoder, out, 8), "begin one");
  REFUSED(ds_decoder_begin(NULL, &WARM, prompt, 3, 5, NULL, 0), "decoder");
  REFUSED(ds_decoder_begin(decoder, NULL, prompt, 3, 5, NULL, 0), "missing");
  REFUSED(ds_decoder_begin(decoder, &rule, prompt, 3, 5, NULL, 0), "rule 3");
  REFUSED(ds_decoder_begin(decoder, &heat, prompt, 3, 5, NULL, 0), "temperature");
  REFUSED(ds_decoder_begin(decoder, &WARM, NULL, 3, 5, NULL, 0), "prompt");
  REFUSED(ds_decoder_begin(decoder, &WARM, prompt, -1, 5, NULL, 0), "prompt");
  REFUSED(ds_decoder_begin(decoder, &WARM, prompt, 0, 5, NULL, 0), "0 prompt tokens");
  REFUSED(ds_decoder_begin(decoder, &WARM, prompt, 3, 0, NULL, 0), "0 new ones");
  REFUSED(ds_decoder_begin(decoder, &WARM, &high, 1, 5, NULL, 0), "prompt[0] is 6");
  REFUSED(ds_decoder_begin(decoder, &WARM, &low, 1, 5, NULL, 0), "prompt[0] is -1");
  REFUSED(ds_decoder_begin(decoder, &WARM, prompt, 3, 5, &high, 1), "eos[0] is 6");
  REFUSED(ds_decoder_begin(decoder, &WARM, prompt, 3, 5, NULL, 1), "eos");
  REFUSED(ds_decoder_begin(decoder, &WARM, prompt, 3, SLOTS - 2, NULL, 0), "do not fit the 300 slots");
  REFUSED(ds_decoder_begin(decoder, &WARM, prompt, 3, INT32_MAX, NULL, 0), "do not fit");
  CHECK(ds_decoder_begin(decoder, &WARM, prompt, 3, 5, NULL, 0) == DS_OK);
  REFUSED(ds_decoder_step(decoder, NULL, 8), "room");
  REFUSED(ds_decoder_step(NULL, out, 8), "decoder");
  REFUSED(ds_decoder_step(decoder, out, 4), "room for 4 tokens");
  CHECK(ds_decoder_step(decoder, out, 8) == 1);
  REFUSED(ds_decoder_stats(decoder, 2, &stats), "level 2");
  REFUSED(ds_decoder_stats(decoder, -1, &stats), "level -1");
  REFUSED(ds_decoder_stats(NULL, 0, &stats), "level 0");
  REFUSED(ds_decoder_stats(decoder, 0, NULL), "NULL");
  REFUSED(ds_decoder_kept(decoder, 2), "level 2");
  CHECK(ds_decoder_kept(decoder, 1) == 3 && ds_decoder_kept(decoder, 0) == 0);
  ds_decoder_free(decoder);
  ds_decoder_free(NULL);
  free(target.logits);
}

/* Whichever allocation fails, create or begin says so, and a later one works. Returns how many there are. */
static int32_t exercise_allocations(const ds_level *levels, int32_t n_levels) {
  int32_t prompt[3] = {1, 2, 3}, out[200], failures = 0;
  for (int32_t after = 0;; ++after) {
    spared = after;
    ds_decoder *decoder = ds_decoder_create(levels, n_levels);
    int32_t status = decoder ? ds_decoder_begin(decoder, &WARM, prompt, 3, 200, NULL, 0) : DS_ERROR_MEMORY;
    int32_t reached = spared;
    spared = INT32_MAX;
    if (status != DS_OK) {
      CHECK(status == DS_ERROR_MEMORY && strstr(ds_error_message(), "no memory"));
      ++failures;
      if (decoder) CHECK(decode(decoder, &WARM, prompt, 3, 200, out, 0, NULL) == 200);
    }
    ds_decoder_free(decoder);
    if (status == DS_OK && reached >= 0) break;
  }
  return failures;
}

static void exercise_memory(void) {
  model target = make_model(6, 0), drafter = make_model(6, 1);
  double table[5] = {1, 1.1, 1.2, 1.3, 1.4};
  ds_level levels[3] = {{NULL, 3, 0, NULL, NULL, 0},
                        {&drafter.engine, 4, 5, table, NULL, 0},
                        {&target.engine, 0, 5, table, NULL, 0}};
  /* handle, two tables; ids, eos, scratch, laws, the suffix index and its growth */
  CHECK(exercise_allocations(levels, 3) >= 12);
  levels[1].tree = DS_GRAPH;
  CHECK(exercise_allocations(levels + 1, 2) >= 11); /* no index; what was read, a law, positions, a mask */
  free(target.logits);
  free(drafter.logits);
}

int main(void) {
  exercise_ladders();
  exercise_limits();
  exercise_failing_engines();
  exercise_bad_trees();
  exercise_bad_arguments();
  exercise_memory();
  puts("clean");
  return 0;
}
