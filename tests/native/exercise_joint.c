/* Drives joint decoding from C for the sanitizers to watch: random laws and proposals, engines that fail, memory
 * that runs out, and arguments that must be refused. Linked as exercise_loop.c.
 */
#include "exercise.h"
#include "failing.h"
#include "joint.h"

enum { SLOTS = 200 };

/* Logits are a function of the last token; memory is of the exact size, so that reading past it is seen. */
typedef struct {
  ds_engine engine;
  uint32_t own;
  int32_t last, n_filled, calls_left;
  float *logits;
} model;

static int32_t reserve(ds_engine *engine, int32_t n_slots) {
  CHECK(n_slots >= 1 && n_slots <= engine->max_seq_len);
  ((model *)engine)->n_filled = 0;
  return DS_OK;
}

static int32_t forward(ds_engine *engine, int32_t n_rows, const int32_t *ids, int32_t start,
                       const int64_t *positions, const uint8_t *mask, int32_t n_logits,
                       const float **logits) {
  model *m = (model *)engine;
  CHECK(n_rows >= 1 && n_logits >= 1 && n_logits <= n_rows && !positions && !mask);
  CHECK(start >= 0 && start <= m->n_filled && start + n_rows <= engine->max_seq_len);
  if (m->calls_left-- == 0) {
    ds_set_error("this engine had enough");
    return DS_ERROR_ENGINE;
  }
  int32_t kept = spared;
  spared = INT32_MAX; /* an engine may allocate; a round may not */
  free(m->logits);
  m->logits = malloc((size_t)n_logits * (size_t)engine->vocab * sizeof *m->logits);
  spared = kept;
  m->n_filled = start + n_rows;
  for (int32_t i = 0; i < n_logits * engine->vocab; ++i) {
    uint32_t last = (uint32_t)ids[n_rows - n_logits + i / engine->vocab];
    uint32_t x = (last * 0x9E3779B1u ^ (uint32_t)(i % engine->vocab) * 0x85EBCA77u) + m->own;
    m->logits[i] = (float)((x ^ x >> 15) % 1000) * 0.006f;
  }
  *logits = m->logits;
  return DS_OK;
}

static model make_model(int32_t vocab, uint32_t own) {
  ds_engine engine = {.vocab = vocab, .max_seq_len = SLOTS, .reserve = reserve, .forward = forward};
  return (model){.engine = engine, .own = own, .calls_left = -1};
}

static ds_joint_settings random_settings(void) {
  static const double temperatures[] = {0, 0.5, 1, 2};
  return (ds_joint_settings){
      .kind = below(2),
      .weight = uniform(),
      .cutoff = below(2) ? 0 : uniform(),
      .temperature = temperatures[below(4)],
      .top_k = below(2) ? 0 : 1 + below(6),
      .top_p = below(2) ? 1 : 0.3 + 0.7 * uniform(),
      .seed = counter,
      .rule = below(2) ? DS_RULE_TOKEN : DS_RULE_BLOCK,
      .n_draft = {below(4), below(6)},
  };
}

static void decode_at_random(void) {
  for (int32_t round = 0; round < 400; ++round) {
    int32_t vocab = 1 + below(20), prompt[150], n_prompt = 1 + below(150), n_new = 1 + below(50);
    for (int32_t i = 0; i < n_prompt; ++i) prompt[i] = below(vocab);
    model models[2] = {make_model(vocab, 0), make_model(vocab, (uint32_t)below(50))};
    if (below(10) == 0) models[below(2)].calls_left = below(8);
    ds_joint *joint = ds_joint_create(&models[0].engine, &models[1].engine);
    CHECK(joint);
    ds_joint_settings settings = random_settings();
    int32_t eos = below(vocab), total = 0, count, tokens[DS_JOINT_MAX_DRAFT + 1];
    if (below(10) == 0) spared = below(6);
    int32_t status = ds_joint_begin(joint, &settings, prompt, n_prompt, n_new, &eos, below(2));
    int ran_out = spared != INT32_MAX && status == DS_ERROR_MEMORY;
    spared = status == DS_OK ? 0 : INT32_MAX; /* no allocation in a round */
    CHECK(status == DS_OK || ran_out);
    if (status == DS_OK) {
      while ((count = ds_joint_step(joint, tokens, DS_JOINT_MAX_DRAFT + 1)) > 0) total += count;
      CHECK(count == 0 || (count == DS_ERROR_ENGINE && strstr(ds_error_message(), "had enough")));
      CHECK(total <= n_new);
      if (count < 0) REFUSED(ds_joint_step(joint, tokens, DS_JOINT_MAX_DRAFT + 1), "no generation");
      ds_joint_stats stats;
      for (int32_t m = 0; m < DS_JOINT_MODELS; ++m) {
        CHECK(ds_joint_count(joint, m, &stats) == DS_OK);
        CHECK(stats.accepted <= stats.proposed && stats.calls <= stats.rows);
      }
    }
    spared = INT32_MAX;
    ds_joint_free(joint);
    free(models[0].logits);
    free(models[1].logits);
  }
}

static void refuse(void) {
  model a = make_model(4, 0), b = make_model(4, 1), wide = make_model(5, 1);
  CHECK(!ds_joint_create(&a.engine, NULL) && strstr(ds_error_message(), "model 1 has no functions"));
  CHECK(!ds_joint_create(&a.engine, &a.engine) && strstr(ds_error_message(), "one engine"));
  CHECK(!ds_joint_create(&a.engine, &wide.engine) && strstr(ds_error_message(), "of 4 and 5 tokens"));
  ds_joint *joint = ds_joint_create(&a.engine, &b.engine);
  CHECK(joint);
  int32_t prompt[] = {1, 2}, wrong[] = {1, 4}, tokens[DS_JOINT_MAX_DRAFT + 1];
  ds_joint_settings good = {.weight = 0.5, .top_p = 1, .rule = DS_RULE_BLOCK, .n_draft = {1, 4}}, bad;
  ds_joint_stats stats;
  REFUSED(ds_joint_step(joint, tokens, DS_JOINT_MAX_DRAFT + 1), "begin one");
  REFUSED(ds_joint_begin(NULL, &good, prompt, 2, 4, NULL, 0), "begin wants");
  REFUSED(ds_joint_begin(joint, NULL, prompt, 2, 4, NULL, 0), "settings are missing");
  REFUSED(ds_joint_begin(joint, &good, NULL, 2, 4, NULL, 0), "at least one of each");
  REFUSED(ds_joint_begin(joint, &good, prompt, 2, 0, NULL, 0), "at least one of each");
  REFUSED(ds_joint_begin(joint, &good, wrong, 2, 4, NULL, 0), "prompt[1] is 4");
  REFUSED(ds_joint_begin(joint, &good, prompt, 2, 4, wrong, 2), "eos[1] is 4");
  REFUSED(ds_joint_begin(joint, &good, prompt, 2, SLOTS, NULL, 0), "do not fit");
  REFUSED((bad = good, bad.kind = 2, ds_joint_begin(joint, &bad, prompt, 2, 4, NULL, 0)), "kind 2");
  REFUSED((bad = good, bad.weight = 2, ds_joint_begin(joint, &bad, prompt, 2, 4, NULL, 0)), "weight is 2");
  REFUSED((bad = good, bad.cutoff = -1, ds_joint_begin(joint, &bad, prompt, 2, 4, NULL, 0)), "cutoff");
  REFUSED((bad = good, bad.rule = DS_RULE_EXACT, ds_joint_begin(joint, &bad, prompt, 2, 4, NULL, 0)), "rule");
  REFUSED((bad = good, bad.n_draft[1] = 33, ds_joint_begin(joint, &bad, prompt, 2, 4, NULL, 0)),
          "proposes 33");
  CHECK(ds_joint_begin(joint, &good, prompt, 2, 4, NULL, 0) == DS_OK);
  REFUSED(ds_joint_step(joint, tokens, DS_JOINT_MAX_DRAFT), "a round gives up to");
  REFUSED(ds_joint_step(joint, NULL, DS_JOINT_MAX_DRAFT + 1), "room for tokens");
  REFUSED(ds_joint_count(joint, 2, &stats), "model 2");
  double law[2];
  float row[2] = {0, 1}, never[2] = {0, -1e38f * 10};
  REFUSED(ds_joint_law(&good, 0, row, row, law), "two rows of 0");
  REFUSED(ds_joint_law(&good, 2, row, NULL, law), "two rows of 2");
  bad = good;
  bad.kind = DS_JOINT_CONTRASTIVE;
  REFUSED(ds_joint_law(&bad, 2, row, never, law), "no contrast");
  ds_joint_free(joint);
  ds_joint_free(NULL);
}

int main(void) {
  refuse();
  decode_at_random();
  puts("clean");
  return 0;
}
