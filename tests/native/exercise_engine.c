/* Drives engines on ONNX Runtime for the sanitizers to watch: our operators within its graphs, prompts, single
 * tokens, trees, what was taken back, errors, memory that runs out, and closing in every order.
 *
 *   exercise_engine LIBONNXRUNTIME BUNDLE
 *
 * Link with -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc: ONNX Runtime's own allocations never fail.
 */
#include "exercise.h"
#include "failing.h"
#include "loop.h"
#include "onnx.h"
#include "swift.h"

enum { MAX_SEQ_LEN = 320, ROOM = 100, PROMPT = 40, ROWS = 7 };

static const char *library, *bundle;

static ds_engine *open_engine(ds_onnx *onnx, const char *inside) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", bundle, inside);
  return ds_onnx_open(onnx, path, MAX_SEQ_LEN, 1);
}

/* A call whose inputs are blocks of their exact size, and its logits in a block of theirs. */
static float *read_rows(ds_engine *engine, int32_t n_rows, const int32_t *ids, int32_t start,
                        const int64_t *positions, const uint8_t *mask, int32_t n_logits) {
  size_t n = (size_t)n_rows, n_mask = n * (size_t)(start + n_rows);
  size_t size = (size_t)n_logits * (size_t)engine->vocab * sizeof(float);
  int32_t *own_ids = memcpy(malloc(n * sizeof *ids), ids, n * sizeof *ids);
  int64_t *own_positions =
      positions ? memcpy(malloc(n * sizeof *positions), positions, n * sizeof *positions) : NULL;
  uint8_t *own_mask = mask ? memcpy(malloc(n_mask), mask, n_mask) : NULL;
  const float *logits;
  CHECK(engine->forward(engine, n_rows, own_ids, start, own_positions, own_mask, n_logits, &logits) == DS_OK);
  free(own_ids);
  free(own_positions);
  free(own_mask);
  return memcpy(malloc(size), logits, size);
}

static void expect_same(const ds_engine *engine, float *one, float *other, int32_t n_rows) {
  CHECK(!memcmp(one, other, (size_t)n_rows * (size_t)engine->vocab * sizeof(float)));
  free(one);
  free(other);
}

static void draw_ids(const ds_engine *engine, int32_t n, int32_t *ids) {
  for (int32_t i = 0; i < n; ++i) ids[i] = below(engine->vocab);
}

/* ---- One engine ---------------------------------------------------------------------------------------- */

/* Every token behind its own parent, which is an earlier token or the prompt. */
static void exercise_tree(ds_engine *engine, const int32_t *prompt) {
  enum { SEEN = PROMPT + ROWS };
  int32_t ids[ROWS], parents[ROWS], path[ROWS];
  int64_t positions[ROWS];
  uint8_t mask[ROWS * SEEN] = {0};
  draw_ids(engine, ROWS, ids);
  for (int32_t r = 0; r < ROWS; ++r) {
    uint8_t *sees = mask + r * SEEN;
    parents[r] = below(r + 1) - 1;
    memcpy(sees, mask + (parents[r] < 0 ? r : parents[r]) * SEEN, SEEN);
    memset(sees, 1, PROMPT);
    sees[PROMPT + r] = 1;
    positions[r] = parents[r] < 0 ? PROMPT : positions[parents[r]] + 1;
  }
  free(read_rows(engine, PROMPT, prompt, 0, NULL, NULL, 1));
  float *tree = read_rows(engine, ROWS, ids, PROMPT, positions, mask, ROWS);
  int32_t n = 0;
  for (int32_t r = ROWS - 1; r >= 0; r = parents[r]) path[n++] = ids[r];
  for (int32_t i = 0; i < n / 2; ++i) {
    int32_t kept = path[i];
    path[i] = path[n - 1 - i];
    path[n - 1 - i] = kept;
  }
  float *last = malloc((size_t)engine->vocab * sizeof *last);
  memcpy(last, tree + (size_t)(ROWS - 1) * (size_t)engine->vocab, (size_t)engine->vocab * sizeof *last);
  free(tree);
  expect_same(engine, last, read_rows(engine, n, path, PROMPT, NULL, NULL, 1), 1);
}

static void exercise_errors(ds_engine *engine) {
  int32_t high[2] = {0, engine->vocab}, good[2] = {1, 2};
  int64_t late[2] = {0, MAX_SEQ_LEN};
  const float *logits;
  REFUSED(engine->reserve(engine, 0), "0 are wanted");
  REFUSED(engine->reserve(engine, MAX_SEQ_LEN + 1), "are wanted");
  REFUSED(engine->forward(engine, 2, high, 0, NULL, NULL, 1, &logits), "vocabulary");
  REFUSED(engine->forward(engine, 2, good, 0, late, NULL, 1, &logits), "position");
  REFUSED(engine->forward(engine, 2, good, ROOM - 1, NULL, NULL, 1, &logits), "reserved for");
  REFUSED(engine->forward(engine, 2, good, 0, NULL, NULL, 3, &logits), "logits of 3");
  REFUSED(engine->forward(engine, 2, NULL, 0, NULL, NULL, 1, &logits), "NULL");
}

/* `exact`: rows do not depend on their company, so what is read again has the same bits. */
static void exercise_graph(ds_onnx *onnx, const char *inside, int exact) {
  ds_engine *engine = open_engine(onnx, inside);
  CHECK(engine && engine->max_seq_len == MAX_SEQ_LEN);
  int32_t prompt[PROMPT];
  const uint8_t blind[4] = {0};
  draw_ids(engine, PROMPT, prompt);
  for (int32_t room = ROOM; room <= 2 * ROOM; room += ROOM) { /* the second cache is another */
    CHECK(engine->reserve(engine, room) == DS_OK);
    float *together = read_rows(engine, PROMPT, prompt, 0, NULL, NULL, PROMPT);
    for (int32_t i = 0; i < PROMPT; ++i) {
      float *alone = read_rows(engine, 1, prompt + i, i, NULL, NULL, 1);
      size_t row = (size_t)i * (size_t)engine->vocab;
      if (exact) CHECK(!memcmp(alone, together + row, (size_t)engine->vocab * sizeof *alone));
      free(alone);
    }
    /* Half of it is rejected and read anew. */
    float *again = read_rows(engine, PROMPT / 2, prompt + PROMPT / 2, PROMPT / 2, NULL, NULL, 1);
    size_t last = (size_t)(PROMPT - 1) * (size_t)engine->vocab;
    if (exact) CHECK(!memcmp(again, together + last, (size_t)engine->vocab * sizeof *again));
    free(again);
    free(together);
    if (exact) exercise_tree(engine, prompt);
    free(read_rows(engine, 2, prompt, 0, NULL, blind, 2));
    free(read_rows(engine, 1, prompt, room - 1, NULL, NULL, 1)); /* the last slot */
  }
  CHECK(engine->reserve(engine, ROOM) == DS_OK);
  exercise_errors(engine);
  engine->close(engine);
}

/* ---- All of them --------------------------------------------------------------------------------------- */

static int32_t decode(const ds_level *levels, int32_t n_levels, const int32_t *prompt, int32_t *out) {
  ds_sampling greedy = {0, 0, 1, 0, DS_RULE_BLOCK, NULL};
  ds_decoder *decoder = ds_decoder_create(levels, n_levels);
  CHECK(decoder && ds_decoder_begin(decoder, &greedy, prompt, PROMPT, ROOM, NULL, 0) == DS_OK);
  int32_t n = 0, tokens[DS_MAX_DRAFT + 1], count;
  while ((count = ds_decoder_step(decoder, tokens, DS_MAX_DRAFT + 1)) > 0)
    for (int32_t i = 0; i < count; ++i) out[n++] = tokens[i];
  CHECK(count == 0);
  ds_decoder_free(decoder);
  return n;
}

/* A ladder of three levels says what the last of them says alone. */
static void check_lossless(const ds_level *levels) {
  int32_t prompt[PROMPT], drafted[ROOM], plain[ROOM];
  draw_ids(levels[2].engine, PROMPT, prompt);
  CHECK(decode(levels, 3, prompt, drafted) == ROOM && decode(levels + 2, 1, prompt, plain) == ROOM);
  CHECK(!memcmp(drafted, plain, sizeof plain));
}

/* Two engines in turns; the runtime is given up before them. */
static void exercise_ladder(void) {
  ds_onnx *onnx = ds_onnx_create(library, 2);
  ds_engine *target = open_engine(onnx, "target/cpu.onnx"),
            *drafter = open_engine(onnx, "drafters/int8/cpu.onnx");
  CHECK(target && drafter);
  ds_onnx_free(onnx);
  ds_level levels[3] = {{.n_draft = 4}, {.engine = drafter, .n_draft = 3}, {.engine = target}};
  check_lossless(levels);
  target->close(target);
  drafter->close(drafter);
}

/* Is there no engine of `host` without `skips`, and do the words say why? */
static int is_refused(ds_engine *host, const uint8_t *skips, int32_t n, const char *words) {
  return !ds_onnx_skip(host, skips, n) && strstr(ds_error_message(), words);
}

/* The target, of 4 layers, drafts for itself in its own cache; trees are drafted for it there. */
static void exercise_guest(void) {
  const uint8_t some[8] = {0, 1, 1, 0}, all[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  ds_onnx *onnx = ds_onnx_create(library, 2);
  ds_engine *target = open_engine(onnx, "target/cpu.onnx"), *stock = open_engine(onnx, "target/model.onnx");
  CHECK(target && stock);
  CHECK(is_refused(NULL, some, 8, "no engine") && is_refused(target, NULL, 8, "nothing said"));
  CHECK(is_refused(stock, some, 8, "export it again") && is_refused(target, some, 6, "8 sublayers, not 6"));
  CHECK(is_refused(target, all, 8, "all 8 sublayers"));
  spared = 0;
  CHECK(is_refused(target, some, 8, "memory"));
  spared = INT32_MAX;
  ds_engine *guest = ds_onnx_skip(target, some, 8);
  CHECK(guest && is_refused(guest, some, 8, "no engine"));
  ds_level levels[3] = {{.n_draft = 7, .tree = 1}, {.engine = guest, .n_draft = 3}, {.engine = target}};
  check_lossless(levels);
  levels[1].n_draft = 0;
  CHECK(!ds_decoder_create(levels, 2) && strstr(ds_error_message(), "not above it"));
  stock->close(stock);
  target->close(target);
  guest->close(guest);
  ds_onnx_free(onnx);
}

/* A copy drafts in the target's cache, in a ladder and beside one of its own, and is still an engine by itself. */
static void exercise_copy(void) {
  ds_onnx *onnx = ds_onnx_create(library, 2);
  ds_engine *target = open_engine(onnx, "target/cpu.onnx"), *stock = open_engine(onnx, "target/model.onnx"),
            *copy = open_engine(onnx, "drafters/int8/cpu.onnx");
  CHECK(target && stock && copy);
  CHECK(!ds_onnx_share(NULL, copy) && !ds_onnx_share(target, NULL) && !ds_onnx_share(target, target));
  CHECK(!ds_onnx_share(target, stock) && strstr(ds_error_message(), "stock operators"));
  spared = 0;
  CHECK(!ds_onnx_share(target, copy) && strstr(ds_error_message(), "memory"));
  spared = INT32_MAX;
  ds_engine *guest = ds_onnx_share(target, copy);
  CHECK(guest && !ds_onnx_share(target, guest) && !ds_onnx_share(guest, copy));
  ds_level levels[3] = {
      {.engine = guest, .n_draft = 7, .tree = DS_TREE}, {.engine = copy, .n_draft = 3}, {.engine = target}};
  check_lossless(levels);
  stock->close(stock);
  guest->close(guest);
  target->close(target);
  copy->close(copy);
  ds_onnx_free(onnx);
}

/* Is there no engine by that share of so many sublayers of `host`, and do the words say why? */
static int is_no_swift(ds_engine *host, int32_t n, double share, const char *words) {
  return !ds_swift_create(host, n, share) && strstr(ds_error_message(), words);
}

/* A search in the cache of the target while that decodes, and through memory that runs out. */
static void exercise_search(void) {
  enum { SUBLAYERS = 8, GENERATIONS = 4 };
  ds_onnx *onnx = ds_onnx_create(library, 2);
  ds_engine *target = open_engine(onnx, "target/cpu.onnx"), *swift = NULL;
  CHECK(target && is_no_swift(target, 4, 0.4, "at least 3 layers") && is_no_swift(target, 7, 0.4, "7 sub"));
  CHECK(is_no_swift(target, SUBLAYERS, 0, "a share of 0") &&
        is_no_swift(target, SUBLAYERS, 1, "a share of 1"));
  CHECK(is_no_swift(target, 6, 0.4, "8 sublayers, not 6") && is_no_swift(NULL, SUBLAYERS, 0.4, "no engine"));
  int32_t failures = 0;
  while (!swift) {
    spared = failures;
    swift = ds_swift_create(target, SUBLAYERS, 0.6);
    spared = INT32_MAX;
    if (!swift) CHECK(strstr(ds_error_message(), "memory") && ++failures);
  }
  CHECK(failures == 7); /* the engine, five of its search, the drafter */
  ds_swift_state state;
  REFUSED(ds_swift_look(target, &state), "ds_swift_create");
  REFUSED(ds_swift_look(swift, NULL), "NULL");
  REFUSED(ds_swift_forget(target), "ds_swift_create");
  CHECK(ds_swift_look(swift, &state) == DS_OK && state.n_sublayers == SUBLAYERS && state.n_tried == 0);

  ds_level levels[3] = {{.n_draft = 7, .tree = 1}, {.engine = swift, .n_draft = 3}, {.engine = target}};
  int32_t prompt[PROMPT], drafted[ROOM], plain[ROOM];
  for (int32_t i = 0; i < GENERATIONS; ++i) {
    draw_ids(target, PROMPT, prompt);
    CHECK(decode(levels, 3, prompt, drafted) == ROOM && decode(levels + 2, 1, prompt, plain) == ROOM);
    CHECK(!memcmp(drafted, plain, sizeof plain));
    CHECK(ds_swift_look(swift, &state) == DS_OK);
  }
  CHECK(state.n_tried >= 2 || state.is_over);
  spared = 0;
  CHECK(ds_swift_forget(swift) == DS_ERROR_MEMORY);
  spared = INT32_MAX;
  CHECK(ds_swift_forget(swift) == DS_OK && ds_swift_look(swift, &state) == DS_OK && !state.n_tried);
  for (failures = 0;; ++failures) { /* where memory is short nothing is tried */
    CHECK(target->reserve(target, 2 * ROOM) == DS_OK);
    free(read_rows(target, ROOM - 1, plain, 0, NULL, NULL, 1));
    CHECK(swift->adapt(swift, plain, ROOM, 1) == 0);
    spared = failures;
    int32_t read = swift->adapt(swift, plain, ROOM, 40);
    spared = INT32_MAX;
    if (read > 0) break;
    CHECK(read == 0 && strstr(ds_error_message(), "memory"));
  }
  CHECK(failures >= 2); /* the drafter, the mask */
  swift->close(swift);
  target->close(target);
  ds_onnx_free(onnx);
}

static void exercise_wrong_files(void) {
  CHECK(!ds_onnx_create(NULL, 1) && strstr(ds_error_message(), "no path"));
  CHECK(!ds_onnx_create(bundle, 1));
  CHECK(!ds_onnx_create(library, 0) && strstr(ds_error_message(), "n_threads"));
  ds_onnx *onnx = ds_onnx_create(library, 1);
  CHECK(onnx && strlen(ds_onnx_isa(onnx)) > 0);
  CHECK(!open_engine(NULL, "target/cpu.onnx"));
  CHECK(!open_engine(onnx, "nowhere.onnx"));
  CHECK(!open_engine(onnx, "manifest.json"));
  CHECK(!open_engine(onnx, "target"));
  CHECK(!open_engine(onnx, "target/cpu.data"));
  ds_onnx_free(onnx);
}

/* Whichever allocation fails, there is an error, and nothing is left behind. */
static void exercise_memory(void) {
  int32_t failures = 0, ids[3] = {1, 2, 3};
  for (int32_t after = 0;; ++after) {
    const float *logits;
    spared = after;
    ds_onnx *onnx = ds_onnx_create(library, 1);
    ds_engine *engine = onnx ? open_engine(onnx, "drafters/int8/cpu.onnx") : NULL;
    int read = engine && engine->reserve(engine, ROOM) == DS_OK &&
               engine->forward(engine, 3, ids, 0, NULL, NULL, 2, &logits) == DS_OK;
    int32_t reached = spared;
    spared = INT32_MAX;
    if (!read) {
      CHECK(strstr(ds_error_message(), "memory"));
      ++failures;
      if (engine) { /* what failed once works when there is memory */
        CHECK(engine->reserve(engine, ROOM) == DS_OK);
        free(read_rows(engine, 3, ids, 0, NULL, NULL, 2));
      }
    }
    if (engine) engine->close(engine);
    ds_onnx_free(onnx);
    if (read && reached >= 0) break;
  }
  CHECK(failures >= 12); /* runtime, engine, operators, nodes, names, cache, rows and logits */
}

int main(int n_words, char **words) {
  CHECK(n_words == 3);
  library = words[1];
  bundle = words[2];
  exercise_wrong_files();
  for (int32_t n_threads = 1; n_threads <= 2; ++n_threads) {
    ds_onnx *onnx = ds_onnx_create(library, n_threads);
    exercise_graph(onnx, "target/cpu.onnx", 1);
    exercise_graph(onnx, "drafters/int8/cpu.onnx", 1);
    exercise_graph(onnx, "target/model.onnx", 0);
    exercise_graph(onnx, "drafters/int8/model.onnx", 0);
    ds_onnx_free(onnx);
  }
  exercise_ladder();
  exercise_guest();
  exercise_copy();
  exercise_search();
  exercise_memory();
  puts("clean");
  return 0;
}
