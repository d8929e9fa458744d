/* Drives joint decoding from C for the sanitizers to watch: random laws and proposals, engines that fail, memory
 * that runs out, and arguments that must be refused. Linked as exercise_loop.c.
 */
#include "exercise.h"
#include "joint.h"
#include "model.h"

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
    model models[2] = {make_model(vocab, 0), make_model(vocab, below(50))};
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
