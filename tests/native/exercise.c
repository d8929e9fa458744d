/* Calls every function of the native library, on good input and bad, for the sanitizers to watch.
 *
 * It asserts what a caller relies on (statuses, ranges, messages); that results are right is for the Python
 * tests. Link with -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc: allocations fail here when told to.
 */
#include "exercise.h"
#include "failing.h"

#include <math.h>

/* Exact-size heap blocks, so that reading one past the end is seen. */
static float *floats(size_t n) { return malloc((n ? n : 1) * sizeof(float)); }
static double *doubles(size_t n) { return malloc((n ? n : 1) * sizeof(double)); }
static int32_t *integers(size_t n) { return malloc((n ? n : 1) * sizeof(int32_t)); }

/* ---- The functions ------------------------------------------------------------------------------------- */

static void exercise_uniforms(void) {
  double out[9];
  ds_uniforms(0, 0, UINT64_MAX - 3, 9, out);
  for (int i = 0; i < 9; ++i) CHECK(out[i] >= 0 && out[i] < 1);
  ds_uniforms(0, 0, 0, 0, NULL);
}

static void exercise_laws(void) {
  static const float junk[] = {0, -0.0f, 1, -1, 3e38f, -3e38f, 1e-45f, INFINITY, -INFINITY, NAN, -NAN};
  static const double temperatures[] = {0, 1e-300, 0.7, 1, 1e300};
  for (int trial = 0; trial < 3000; ++trial) {
    int32_t n_rows = below(3), vocab = 1 + below(trial % 3 ? 9 : 300);
    size_t size = (size_t)n_rows * (size_t)vocab;
    float *logits = floats(size);
    double *laws = doubles(size);
    for (size_t i = 0; i < size; ++i)
      logits[i] = trial % 5 == 0   ? junk[below(11)]
                  : trial % 5 == 1 ? (float)below(3)
                                   : (float)(9 * uniform());
    int32_t status = ds_laws_from_logits(logits, n_rows, vocab, temperatures[below(5)], below(2 * vocab),
                                         below(2) ? 1 : uniform(), laws);
    CHECK(status == DS_OK || (status == DS_ERROR_ARGUMENT && trial % 5 == 0));
    if (status == DS_OK) CHECK(ds_normalize_laws(n_rows, vocab, 1e-12, laws) == DS_OK);
    for (int32_t r = 0; r < n_rows; ++r) {
      int32_t best = ds_argmax(logits + (size_t)r * (size_t)vocab, vocab);
      CHECK(best < vocab && (best >= 0 || trial % 5 == 0));
    }
    free(logits);
    free(laws);
  }
  float row[2] = {0, 1};
  double law[2];
  REFUSED(ds_argmax(NULL, 2), "at least one");
  REFUSED(ds_argmax(row, 0), "at least one");
  REFUSED(ds_laws_from_logits(row, -1, 2, 1, 0, 1, law), "[-1, 2]");
  REFUSED(ds_laws_from_logits(row, 1, 0, 1, 0, 1, law), "[1, 0]");
  REFUSED(ds_laws_from_logits(NULL, 1, 2, 1, 0, 1, law), "NULL");
  REFUSED(ds_laws_from_logits(row, 1, 2, 1, 0, 1, NULL), "NULL");
  REFUSED(ds_laws_from_logits(row, 1, 2, NAN, 0, 1, law), "temperature");
  REFUSED(ds_laws_from_logits(row, 1, 2, -1, 0, 1, law), "temperature");
  REFUSED(ds_laws_from_logits(row, 1, 2, 1, -1, 1, law), "top_k");
  REFUSED(ds_laws_from_logits(row, 1, 2, 1, 0, 1.5, law), "top_p");
  REFUSED(ds_normalize_laws(1, 0, 1e-6, law), "[1, 0]");
  REFUSED(ds_normalize_laws(1, 2, 1e-6, NULL), "NULL");
  law[0] = law[1] = 0.6;
  REFUSED(ds_normalize_laws(1, 2, 1e-6, law), "sums to 1.2");
  law[1] = NAN;
  REFUSED(ds_normalize_laws(1, 2, 1e-6, law), "token 1");
}

static void exercise_verification(void) {
  static const double junk[] = {0, 0.25, 1, -1, 1e308, 5e-324, INFINITY, NAN};
  for (int trial = 0; trial < 3000; ++trial) {
    int32_t rule = trial % 3, n_draft = below(7), vocab = 1 + below(20), accepted, next;
    size_t size = (size_t)n_draft * (size_t)vocab, rows = size + (size_t)vocab;
    float *logits = floats(rows);
    double *p = doubles(rows), *q = doubles(size), *uniforms = doubles((size_t)n_draft + 2);
    int32_t *draft = integers((size_t)n_draft);
    for (size_t i = 0; i < rows; ++i) logits[i] = (float)(5 * uniform());
    for (int32_t i = 0; i < n_draft; ++i) draft[i] = below(vocab);
    for (int32_t i = 0; i < n_draft + 2; ++i) uniforms[i] = below(4) ? uniform() : below(2) ? 0 : 1 - 0x1p-53;
    CHECK(ds_laws_from_logits(logits, n_draft + 1, vocab, 1, 3, 0.9, p) == DS_OK);
    CHECK(ds_laws_from_logits(logits, n_draft, vocab, 2, 0, 1, q) == DS_OK);
    int garbage = trial % 4 == 0;
    if (garbage) {
      for (size_t i = 0; i < rows; ++i) p[i] = junk[below(8)];
      for (size_t i = 0; i < size; ++i) q[i] = junk[below(8)];
    }
    int32_t status =
        ds_verify_chain(rule, n_draft, vocab, p, trial % 5 ? q : NULL, draft, uniforms, &accepted, &next);
    if (garbage && status != DS_OK)
      CHECK(strstr(ds_error_message(), "not a law"));
    else
      CHECK(status == DS_OK && accepted >= 0 && accepted <= n_draft && next >= 0 && next < vocab);
    CHECK(ds_verify_greedy(n_draft, vocab, logits, draft, &accepted, &next) == DS_OK);
    CHECK(accepted >= 0 && accepted <= n_draft && next >= 0 && next < vocab);
    free(logits);
    free(p);
    free(q);
    free(uniforms);
    free(draft);
  }
  double p[4] = {0.5, 0.5, 0.5, 0.5}, uniforms[3] = {0, 0, 0};
  float logits[4] = {0, 1, NAN, 0};
  int32_t one = 1, two = 2, accepted, next;
  REFUSED(ds_verify_chain(3, 1, 2, p, NULL, &one, uniforms, &accepted, &next), "rule 3");
  REFUSED(ds_verify_chain(0, -1, 2, p, NULL, &one, uniforms, &accepted, &next), "n_draft is -1");
  REFUSED(ds_verify_chain(0, INT32_MAX, 2, p, NULL, &one, uniforms, &accepted, &next), "n_draft");
  REFUSED(ds_verify_chain(0, 1, 0, p, NULL, &one, uniforms, &accepted, &next), "vocab is 0");
  REFUSED(ds_verify_chain(0, 1, 2, NULL, NULL, &one, uniforms, &accepted, &next), "NULL");
  REFUSED(ds_verify_chain(0, 1, 2, p, NULL, NULL, uniforms, &accepted, &next), "draft is missing");
  REFUSED(ds_verify_chain(0, 1, 2, p, NULL, &one, NULL, &accepted, &next), "NULL");
  REFUSED(ds_verify_chain(0, 1, 2, p, NULL, &one, uniforms, NULL, &next), "NULL");
  REFUSED(ds_verify_chain(0, 1, 2, p, NULL, &one, uniforms, &accepted, NULL), "NULL");
  REFUSED(ds_verify_chain(0, 1, 2, p, NULL, &two, uniforms, &accepted, &next), "draft[0] is 2");
  uniforms[2] = 1;
  REFUSED(ds_verify_chain(0, 1, 2, p, NULL, &one, uniforms, &accepted, &next), "uniforms[2] is 1");
  REFUSED(ds_verify_greedy(1, 2, NULL, &one, &accepted, &next), "NULL");
  REFUSED(ds_verify_greedy(1, 2, logits, &two, &accepted, &next), "draft[0] is 2");
  REFUSED(ds_verify_greedy(1, 2, logits, &one, &accepted, &next), "NaN");
}

static void exercise_trees(void) {
  static const double junk[] = {0, 0.25, 1, -1, 1e308, 5e-324, INFINITY, NAN};
  for (int trial = 0; trial < 3000; ++trial) {
    int32_t rule = DS_RULE_EXACT + below(4), n = below(12), vocab = 1 + below(20), depth, next, token, which;
    size_t rows = (size_t)(n + 1), size = rows * (size_t)vocab;
    float *logits = floats(size);
    double *p = doubles(size), *q = doubles(size), *uniforms = doubles(rows + 1);
    int32_t *tokens = integers(rows), *parents = integers((size_t)n), *path = integers((size_t)n);
    for (size_t i = 0; i < size; ++i) logits[i] = (float)(5 * uniform());
    for (int32_t i = 0; i < n + 1; ++i) tokens[i] = below(vocab);
    for (int32_t i = 0; i < n; ++i) parents[i] = below(i + 1) - 1;
    for (int32_t i = 0; i < n + 2; ++i) uniforms[i] = below(4) ? uniform() : below(2) ? 0 : 1 - 0x1p-53;
    CHECK(ds_laws_from_logits(logits, n + 1, vocab, 1, 3, 0.9, p) == DS_OK);
    CHECK(ds_laws_from_logits(logits, n + 1, vocab, 2, 0, 1, q) == DS_OK);
    int garbage = trial % 4 == 0;
    for (size_t i = 0; garbage && i < size; ++i) {
      p[i] = junk[below(8)];
      q[i] = junk[below(8)];
    }
    int32_t status = ds_verify_tree(rule, n, vocab, p, trial % 5 ? q : NULL, tokens, parents, uniforms, path,
                                    &depth, &next);
    if (garbage && status != DS_OK)
      CHECK(strstr(ds_error_message(), "not a law"));
    else
      CHECK(status == DS_OK && depth >= 0 && depth <= n && next >= 0 && next < vocab);
    status = ds_verify_kseq(n + 1, vocab, p, q, tokens, uniforms, &which, &token);
    if (garbage && status != DS_OK)
      CHECK(strstr(ds_error_message(), "not a law"));
    else
      CHECK(status == DS_OK && which >= -1 && which <= n && token >= 0 && token < vocab);
    free(logits);
    free(p);
    free(q);
    free(uniforms);
    free(tokens);
    free(parents);
    free(path);
  }
  double p[6] = {0.5, 0.5, 0.5, 0.5, 0.5, 0.5}, u[4] = {0, 0, 0, 0};
  int32_t tokens[2] = {0, 1}, parents[2] = {-1, 0}, path[2], depth, next;
  REFUSED(ds_verify_tree(DS_RULE_TOKEN, 2, 2, p, p, tokens, parents, u, path, &depth, &next), "rule 0");
  REFUSED(ds_verify_tree(3, -1, 2, p, p, tokens, parents, u, path, &depth, &next), "-1 nodes");
  REFUSED(ds_verify_tree(3, DS_MAX_TREE + 1, 2, p, p, tokens, parents, u, path, &depth, &next), "nodes");
  REFUSED(ds_verify_tree(3, 2, 0, p, p, tokens, parents, u, path, &depth, &next), "vocab is 0");
  REFUSED(ds_verify_tree(3, 2, 2, NULL, p, tokens, parents, u, path, &depth, &next), "NULL");
  REFUSED(ds_verify_tree(3, 2, 2, p, p, NULL, parents, u, path, &depth, &next), "missing");
  REFUSED(ds_verify_tree(3, 2, 2, p, p, tokens, NULL, u, path, &depth, &next), "missing");
  REFUSED(ds_verify_tree(3, 2, 2, p, p, tokens, parents, NULL, path, &depth, &next), "NULL");
  REFUSED(ds_verify_tree(3, 2, 2, p, p, tokens, parents, u, NULL, &depth, &next), "NULL");
  REFUSED(ds_verify_tree(3, 2, 2, p, p, tokens, parents, u, path, NULL, &next), "NULL");
  REFUSED(ds_verify_tree(3, 2, 2, p, p, tokens, parents, u, path, &depth, NULL), "NULL");
  parents[1] = 1;
  REFUSED(ds_verify_tree(3, 2, 2, p, p, tokens, parents, u, path, &depth, &next), "parents[1] is 1");
  parents[1] = -2;
  REFUSED(ds_verify_tree(3, 2, 2, p, p, tokens, parents, u, path, &depth, &next), "parents[1] is -2");
  parents[1] = 0;
  tokens[1] = 2;
  REFUSED(ds_verify_tree(3, 2, 2, p, p, tokens, parents, u, path, &depth, &next), "tokens[1] is 2");
  REFUSED(ds_verify_kseq(2, 2, p, p, tokens, u, &depth, &next), "drafts[1] is 2");
  tokens[1] = 1;
  CHECK(ds_verify_tree(3, 0, 2, p, NULL, NULL, NULL, u, NULL, &depth, &next) == DS_OK && depth == 0);
  REFUSED(ds_verify_kseq(0, 2, p, p, tokens, u, &depth, &next), "0 drafts");
  REFUSED(ds_verify_kseq(2, 0, p, p, tokens, u, &depth, &next), "vocab is 0");
  REFUSED(ds_verify_kseq(2, 2, p, NULL, tokens, u, &depth, &next), "NULL");
  REFUSED(ds_verify_kseq(2, 2, p, p, NULL, u, &depth, &next), "NULL");
  REFUSED(ds_verify_kseq(2, 2, p, p, tokens, u, NULL, &next), "NULL");
  u[2] = u[3] = 1;
  REFUSED(ds_verify_tree(3, 2, 2, p, p, tokens, parents, u, path, &depth, &next), "uniforms[2] is 1");
  REFUSED(ds_verify_kseq(2, 2, p, p, tokens, u, &depth, &next), "uniforms[2] is 1");
}

static void exercise_suffix(void) {
  int32_t found, draft[16], tokens[64];
  for (int trial = 0; trial < 200; ++trial) {
    ds_suffix *suffix = ds_suffix_create();
    CHECK(suffix);
    for (int round = 0; round < 30; ++round) {
      int32_t n = below(64), n_tail = below(20), alphabet = 1 + below(4),
              max_match = 1 + below(DS_SUFFIX_MAX_MATCH);
      for (int32_t i = 0; i < n; ++i) tokens[i] = below(alphabet);
      CHECK(ds_suffix_append(suffix, tokens, n) == DS_OK);
      int32_t *tail = integers((size_t)n_tail);
      for (int32_t i = 0; i < n_tail; ++i) tail[i] = below(alphabet + 1) - (below(50) == 0);
      int32_t wanted = below(17),
              count = ds_suffix_draft(suffix, tail, n_tail, 1, max_match, wanted, draft, &found);
      CHECK((count == 0 || count == wanted) && found >= 0 && found <= max_match);
      free(tail);
    }
    ds_suffix_free(suffix);
  }
  ds_suffix *suffix = ds_suffix_create();
  tokens[0] = 5;
  tokens[1] = -1;
  REFUSED(ds_suffix_append(NULL, tokens, 1), "handle");
  REFUSED(ds_suffix_append(suffix, NULL, 1), "handle");
  REFUSED(ds_suffix_append(suffix, tokens, -1), "-1 tokens");
  REFUSED(ds_suffix_append(suffix, tokens, 2), "token 1 is -1");
  CHECK(ds_suffix_append(suffix, NULL, 0) == DS_OK);
  CHECK(ds_suffix_draft(suffix, NULL, 0, 1, 8, 0, NULL, &found) == 0 && found == 0);
  REFUSED(ds_suffix_draft(NULL, NULL, 0, 1, 8, 1, draft, &found), "handle");
  REFUSED(ds_suffix_draft(suffix, NULL, 1, 1, 8, 1, draft, &found), "handle");
  REFUSED(ds_suffix_draft(suffix, NULL, 0, 1, 8, -1, draft, &found), "-1 drafted");
  REFUSED(ds_suffix_draft(suffix, NULL, 0, 0, 8, 1, draft, &found), "0 to 8");
  REFUSED(ds_suffix_draft(suffix, NULL, 0, 9, 8, 1, draft, &found), "9 to 8");
  REFUSED(ds_suffix_draft(suffix, NULL, 0, 1, DS_SUFFIX_MAX_MATCH + 1, 1, draft, &found), "1 to 65");
  CHECK(ds_suffix_append(suffix, tokens, 1) == DS_OK);
  REFUSED(ds_suffix_reserve(NULL, 1), "handle");
  REFUSED(ds_suffix_reserve(suffix, -1), "-1 tokens");
  CHECK(ds_suffix_reserve(suffix, INT32_MAX) == DS_ERROR_MEMORY);
  CHECK(ds_suffix_reserve(suffix, 1000) == DS_OK);
  spared = 0; /* room that is there needs no memory */
  for (int i = 0; i < 999; ++i) CHECK(ds_suffix_append(suffix, tokens, 1) == DS_OK);
  spared = INT32_MAX;
  ds_suffix_free(suffix);
  ds_suffix_free(NULL);
}

/* Whichever allocation fails, the call says so, nothing leaks, and an index goes on as if it had not been. */
static void exercise_memory(void) {
  float row[3] = {0, 1, 2};
  double law[3];
  spared = 0;
  CHECK(ds_laws_from_logits(row, 1, 3, 1, 2, 0.9, law) == DS_ERROR_MEMORY);
  spared = INT32_MAX;
  CHECK(ds_laws_from_logits(row, 1, 3, 1, 2, 0.9, law) == DS_OK);

  int32_t tokens[200], draft[4], found, failures = 0;
  for (int32_t i = 0; i < 200; ++i) tokens[i] = i % 7;
  for (int32_t after = 0;; ++after) {
    spared = after;
    ds_suffix *suffix = ds_suffix_create();
    if (suffix) {
      CHECK(ds_suffix_append(suffix, tokens, 10) == DS_OK);
      while (ds_suffix_append(suffix, tokens + 10, 190) != DS_OK) {
        CHECK(strstr(ds_error_message(), "no memory"));
        CHECK(ds_suffix_draft(suffix, NULL, 0, 1, 9, 4, draft, &found) == 4 && draft[0] == 3 && found == 3);
        ++failures;
      }
      CHECK(ds_suffix_draft(suffix, NULL, 0, 1, 64, 4, draft, &found) == 4 && draft[0] == 200 % 7 &&
            found == 64);
      ds_suffix_free(suffix);
    } else {
      ++failures;
    }
    if (spared >= 0) break; /* it got by without the allocation that was to fail */
  }
  spared = INT32_MAX;
  CHECK(failures == 9); /* the handle and four arrays when it is made, four arrays when it grows */
}

int main(void) {
  CHECK(strlen(ds_version()) > 0);
  ds_set_error("in a caller's words");
  CHECK(!strcmp(ds_error_message(), "in a caller's words"));
  ds_set_error(NULL);
  CHECK(!strcmp(ds_error_message(), ""));
  exercise_uniforms();
  exercise_laws();
  exercise_verification();
  exercise_trees();
  exercise_suffix();
  exercise_memory();
  puts("clean");
  return 0;
}
