/* Drafters that are no models, from begin to close, with good and bad input and failing memory. */
#include "datastore.h"
#include "drafter.h"
#include "exercise.h"
#include "failing.h"
#include "ngrams.h"

#include <math.h>

enum { VOCAB = 7 };

/* Blocks of the exact size, so that writing past them is seen. */
static void check_tree(ds_drafter *drafter, const int32_t *tail, int32_t n_tail) {
  int32_t most = below(40), depth = 1 + below(9), depths[40];
  int32_t *tokens = malloc((size_t)most * sizeof *tokens), *parents = malloc((size_t)most * sizeof *parents);
  double *chances = malloc((size_t)most * sizeof *chances);
  int32_t n = drafter->draft_tree(drafter, tail, n_tail, most, depth, tokens, parents, chances);
  CHECK(n >= 0 && n <= most);
  for (int32_t i = 0; i < n; ++i) {
    CHECK(tokens[i] >= 0 && tokens[i] < VOCAB && parents[i] >= -1 && parents[i] < i);
    depths[i] = parents[i] < 0 ? 1 : depths[parents[i]] + 1;
    CHECK(depths[i] <= depth && chances[i] > 0 && chances[i] <= 1 + 1e-12);
  }
  free(tokens);
  free(parents);
  free(chances);
}

/* One generation: tokens come in bunches, drafts are asked for behind tails, logits are shown. */
static void generate(ds_drafter *drafter) {
  enum { PEAKS = (VOCAB + DS_PEAK_WIDTH - 1) / DS_PEAK_WIDTH };
  int32_t tokens[64], tail[16], draft[20], support[20], parents[4], total = 400;
  float logits[5 * VOCAB], peaks[5 * PEAKS];
  CHECK(drafter->begin(drafter, total) >= 0);
  while (total > 0) {
    int32_t n = 1 + below(total < 60 ? total : 60), n_tail = below(16), wanted = below(21);
    for (int32_t i = 0; i < n; ++i) tokens[i] = below(VOCAB);
    for (int32_t i = 0; i < n_tail; ++i) tail[i] = below(VOCAB);
    total -= n;
    CHECK(drafter->append(drafter, tokens, n) >= 0);
    if (drafter->observe) {
      for (int32_t i = 0; i < 5 * VOCAB; ++i) logits[i] = below(9) ? (float)(9 * uniform()) : NAN;
      for (int32_t i = 0; i < 4; ++i) parents[i] = below(2) ? i - 1 : below(i + 1) - 1;
      for (int32_t i = 0; i < 5 * PEAKS; ++i) peaks[i] = -INFINITY;
      for (int32_t i = 0; i < 5 * VOCAB; ++i) {
        float *peak = &peaks[i / VOCAB * PEAKS + i % VOCAB / DS_PEAK_WIDTH];
        if (logits[i] > *peak) *peak = logits[i];
      }
      CHECK(drafter->observe(drafter, tokens, parents, n < 5 ? n : 5, logits, below(2) ? peaks : NULL,
                             VOCAB) >= 0);
    }
    int32_t count = drafter->draft(drafter, tail, n_tail, wanted, draft, support);
    CHECK(count >= 0 && count <= wanted);
    for (int32_t i = 0; i < count; ++i) CHECK(draft[i] >= 0 && draft[i] < VOCAB && support[i] > 0);
    if (drafter->draft_tree) check_tree(drafter, tail, n_tail);
  }
}

static void exercise_suffix_drafter(void) {
  int32_t references[90];
  for (int trial = 0; trial < 50; ++trial) {
    int32_t n = below(90);
    for (int32_t i = 0; i < n; ++i) references[i] = below(9) ? below(VOCAB) : DS_END_OF_REFERENCE;
    ds_drafter *drafter = ds_suffix_drafter_create(references, n);
    CHECK(drafter);
    for (int round = 0; round < 3; ++round) generate(drafter);
    CHECK(drafter->begin(drafter, INT32_MAX) < 0 && strstr(ds_error_message(), "tokens behind"));
    CHECK(drafter->begin(drafter, -1) < 0);
    generate(drafter);
    ds_drafter_close(drafter);
  }
  references[0] = -1;
  CHECK(!ds_suffix_drafter_create(references, 1) && strstr(ds_error_message(), "token 0 is -1"));
  CHECK(!ds_suffix_drafter_create(NULL, 1) && strstr(ds_error_message(), "references"));
  CHECK(!ds_suffix_drafter_create(references, -1) && strstr(ds_error_message(), "-1 tokens"));
  ds_drafter_close(ds_suffix_drafter_create(references, 0)); /* without having begun */
  ds_drafter_close(NULL);
}

static void exercise_recycling(void) {
  int32_t tokens[1] = {VOCAB}, candidates[DS_RECYCLING_WIDTH], draft[2], support[2];
  float logits[2 * VOCAB] = {0};
  for (int trial = 0; trial < 50; ++trial) {
    ds_drafter *drafter = ds_recycling_drafter_create(VOCAB);
    CHECK(drafter);
    for (int round = 0; round < 3; ++round) generate(drafter);
    for (int32_t token = 0; token < VOCAB; ++token) {
      int32_t n = ds_recycling_candidates(drafter, token, candidates);
      CHECK(n >= 0 && n <= VOCAB);
    }
    CHECK(drafter->observe(drafter, tokens, NULL, 0, NULL, NULL, 1) == DS_OK);
    REFUSED(drafter->observe(drafter, tokens, NULL, 1, logits, NULL, VOCAB), "token 7 is outside");
    REFUSED(drafter->append(drafter, tokens, 1), "token 7 is outside");
    REFUSED(drafter->draft(drafter, tokens, 1, 2, draft, support), "token 7 is outside");
    REFUSED(ds_recycling_candidates(drafter, -1, candidates), "token -1");
    REFUSED(ds_recycling_candidates(drafter, 1, NULL), "room");
    tokens[0] = 2;
    CHECK(drafter->observe(drafter, tokens, NULL, 1, logits, NULL, 2 * VOCAB) == DS_OK); /* a wider level */
    CHECK(drafter->observe(drafter, tokens, NULL, 1, logits, NULL, 2) == DS_OK); /* and a narrower one */
    CHECK(ds_recycling_candidates(drafter, 2, candidates) == 2);
    tokens[0] = VOCAB;
    ds_drafter_close(drafter);
  }
  REFUSED(ds_recycling_candidates(NULL, 1, candidates), "a drafter");
  CHECK(!ds_recycling_drafter_create(0) && strstr(ds_error_message(), "vocab is 0"));
}

static void exercise_lookahead(void) {
  for (int trial = 0; trial < 50; ++trial) {
    ds_drafter *drafter = ds_lookahead_drafter_create(VOCAB);
    CHECK(drafter);
    for (int round = 0; round < 3; ++round) generate(drafter);
    CHECK(drafter->observe(drafter, NULL, NULL, 0, NULL, NULL, 1) == DS_OK);
    ds_drafter_close(drafter);
  }
  CHECK(!ds_lookahead_drafter_create(0) && strstr(ds_error_message(), "vocab is 0"));
}

enum { HISTORY_BYTES = 400000 };

static void exercise_history(void) {
  ds_history_size size;
  for (int trial = 0; trial < 3; ++trial) {
    ds_drafter *drafter = ds_history_drafter_create(HISTORY_BYTES);
    CHECK(drafter);
    for (int round = 0; round < 30; ++round) generate(drafter);
    CHECK(ds_history_kept(drafter, &size) == DS_OK && size.n_bytes <= HISTORY_BYTES);
    CHECK(size.n_outputs > 1 && size.n_outputs < 29 && size.n_tokens > size.n_outputs);
    REFUSED(drafter->begin(drafter, -1), "-1 tokens");
    CHECK(drafter->begin(drafter, INT32_MAX) == DS_ERROR_MEMORY);
    int32_t bad = -1;
    REFUSED(drafter->append(drafter, &bad, 1), "token 0 is -1");
    generate(drafter);
    REFUSED(ds_history_kept(drafter, NULL), "room");
    ds_drafter_close(drafter);
  }
  REFUSED(ds_history_kept(NULL, &size), "a drafter");
  CHECK(!ds_history_drafter_create(1) && strstr(ds_error_message(), "1 bytes"));
}

static int32_t refuse_to_begin(ds_drafter *drafter, int32_t n_tokens) {
  (void)drafter;
  return n_tokens == 7 ? DS_ERROR_ARGUMENT : DS_OK;
}

static void exercise_hybrid(void) {
  ds_drafter *parts[3] = {ds_suffix_drafter_create(NULL, 0), ds_recycling_drafter_create(VOCAB),
                          ds_history_drafter_create(HISTORY_BYTES)};
  for (int32_t n = 1; n <= 3; ++n) {
    ds_drafter *drafter = ds_hybrid_drafter_create(parts, n);
    CHECK(drafter);
    for (int round = 0; round < 5; ++round) generate(drafter);
    CHECK(drafter->begin(drafter, -1) < 0);
    ds_drafter_close(drafter);
  }
  ds_drafter *merged = ds_hybrid_drafter_create(parts, 2);
  int32_t outside[1] = {VOCAB}, parents[1];
  double chances[1];
  CHECK(merged && merged->begin(merged, 9) >= 0);
  REFUSED(merged->draft_tree(merged, outside, 1, 1, 1, outside, parents, chances), "token 7 is outside");
  ds_drafter_close(merged);
  ds_drafter failing = {.begin = refuse_to_begin,
                        .append = parts[0]->append,
                        .draft = parts[0]->draft,
                        .close = parts[0]->close};
  ds_drafter *both[2] = {&failing, parts[1]};
  ds_drafter *drafter = ds_hybrid_drafter_create(both, 2);
  CHECK(drafter && drafter->begin(drafter, 7) == DS_ERROR_ARGUMENT);
  ds_drafter_close(drafter);
  both[1] = NULL;
  CHECK(!ds_hybrid_drafter_create(both, 2) && strstr(ds_error_message(), "a hybrid of 2"));
  failing.draft = NULL;
  CHECK(!ds_hybrid_drafter_create(both, 1) && !ds_hybrid_drafter_create(NULL, 1));
  CHECK(!ds_hybrid_drafter_create(parts, 0) && !ds_hybrid_drafter_create(parts, 99));
  for (int32_t i = 0; i < 3; ++i) ds_drafter_close(parts[i]);
}

static const uint8_t NO_TOKENIZER[DS_TOKENIZER_BYTES];
static const char *scratch; /* a file to write */

static void tell(int64_t done, int64_t total) { CHECK(done >= 0 && done <= total); }

/* A datastore of some texts, in `scratch`; DS_OK or why not. */
static int32_t write_texts(int32_t n_texts, int32_t chunk_tokens) {
  ds_datastore_writer *writer = ds_datastore_writer_create(scratch, NO_TOKENIZER, chunk_tokens);
  if (!writer) return DS_ERROR_MEMORY;
  int32_t text[50], status = DS_OK;
  for (int32_t i = 0; i < n_texts && status == DS_OK; ++i) {
    int32_t n = below(49);
    for (int32_t k = 0; k < n; ++k) text[k] = below(VOCAB - i % 5);
    text[n] = DS_END_OF_REFERENCE;
    status = ds_datastore_writer_append(writer, text, n + 1);
  }
  if (status == DS_OK) status = ds_datastore_writer_finish(writer, tell);
  ds_datastore_writer_free(writer);
  return status;
}

static void damage_scratch(void) {
  FILE *file = fopen(scratch, "r+b");
  CHECK(file && fseek(file, 0, SEEK_END) == 0);
  int32_t size = (int32_t)ftell(file);
  for (int i = 0; i < 20; ++i) {
    int32_t at = 64 + below(size - 64);
    CHECK(fseek(file, at, SEEK_SET) == 0 && fputc(below(256), file) != EOF);
  }
  CHECK(fclose(file) == 0);
}

static void exercise_datastore(void) {
  for (int trial = 0; trial < 40; ++trial) {
    CHECK(write_texts(1 + below(20), below(3) ? 1 + below(100) : 0) == DS_OK);
    if (trial % 2) damage_scratch();
    ds_datastore *datastore = ds_datastore_open(scratch, VOCAB, NO_TOKENIZER);
    CHECK(datastore && ds_datastore_n_tokens(datastore) > 0);
    ds_drafter *drafter = ds_datastore_drafter_create(datastore);
    CHECK(drafter);
    for (int round = 0; round < 3; ++round) generate(drafter);
    int32_t context[3] = {1, 2, 3}, draft[3], support[3];
    REFUSED(ds_datastore_draft(NULL, context, 3, 3, draft, support), "a datastore");
    REFUSED(ds_datastore_draft(datastore, NULL, 3, 3, draft, support), "a datastore");
    REFUSED(ds_datastore_draft(datastore, context, -1, 3, draft, support), "-1 tokens");
    REFUSED(ds_datastore_draft(datastore, context, 3, -1, draft, support), "-1 drafted");
    REFUSED(ds_datastore_draft(datastore, context, 3, 3, draft, NULL), "room");
    CHECK(ds_datastore_draft(datastore, NULL, 0, 0, NULL, NULL) == 0);
    ds_drafter_close(drafter);
    ds_datastore_free(datastore);
  }
  CHECK(!ds_datastore_drafter_create(NULL) && strstr(ds_error_message(), "wants a datastore"));
  CHECK(!ds_datastore_open(NULL, 2, NO_TOKENIZER) && strstr(ds_error_message(), "a path"));
  CHECK(!ds_datastore_open(scratch, 2, NULL) && !ds_datastore_open(scratch, 0, NO_TOKENIZER));
  CHECK(!ds_datastore_open("/", 2, NO_TOKENIZER) && strstr(ds_error_message(), "no datastore"));
  CHECK(!ds_datastore_open("", 2, NO_TOKENIZER) && strstr(ds_error_message(), "cannot be opened"));
  ds_datastore_free(NULL);
  CHECK(ds_datastore_n_tokens(NULL) == 0);

  int32_t tokens[2] = {3, -1};
  CHECK(!ds_datastore_writer_create(NULL, NO_TOKENIZER, 0) && !ds_datastore_writer_create(scratch, NULL, 0));
  CHECK(!ds_datastore_writer_create(scratch, NO_TOKENIZER, -1) && strstr(ds_error_message(), "-1 tokens"));
  CHECK(!ds_datastore_writer_create("/no/folder", NO_TOKENIZER, 0) && strstr(ds_error_message(), "written"));
  ds_datastore_writer_free(NULL);
  ds_datastore_writer *writer = ds_datastore_writer_create(scratch, NO_TOKENIZER, 0);
  REFUSED(ds_datastore_writer_append(NULL, tokens, 1), "being written");
  REFUSED(ds_datastore_writer_append(writer, NULL, 1), "being written");
  REFUSED(ds_datastore_writer_append(writer, tokens, -1), "-1 tokens");
  REFUSED(ds_datastore_writer_append(writer, tokens, 2), "token 1 is -1");
  REFUSED(ds_datastore_writer_finish(NULL, NULL), "being written");
  REFUSED(ds_datastore_writer_finish(writer, NULL), "no tokens");
  CHECK(ds_datastore_writer_append(writer, tokens, 1) == DS_OK);
  CHECK(ds_datastore_writer_finish(writer, NULL) == DS_OK); /* no place, but a datastore */
  REFUSED(ds_datastore_writer_append(writer, tokens, 1), "being written");
  REFUSED(ds_datastore_writer_finish(writer, NULL), "being written");
  ds_datastore_writer_free(writer);
  ds_datastore *datastore = ds_datastore_open(scratch, VOCAB, NO_TOKENIZER);
  int32_t draft[2], support[2], context[2] = {3, 3};
  CHECK(datastore && ds_datastore_draft(datastore, context, 2, 2, draft, support) == 0);
  ds_datastore_free(datastore);
}

static const uint8_t NO_MODEL[DS_MODEL_BYTES];

/* A table of VOCAB tokens with `width` in a row, cut to `size` bytes, in `scratch`. */
static void write_ngrams(uint32_t width, size_t size) {
  char whole[4096] = "DSNGRAM1";
  uint32_t numbers[4] = {1, VOCAB, width, 0};
  size_t at = 8, count = (VOCAB + 1) * (width < 9 ? width : 9);
  memcpy(whole + at, numbers, sizeof numbers);
  at += sizeof numbers + DS_MODEL_BYTES;
  for (size_t i = 0; i < count; ++i, at += 4) memcpy(whole + at, &(int32_t){(int32_t)(i * 5 % VOCAB)}, 4);
  for (size_t i = 0; i < count; ++i, at += 4) memcpy(whole + at, &(float){(float)uniform()}, 4);
  FILE *file = fopen(scratch, "wb");
  CHECK(file && fwrite(whole, 1, size < at ? size : at, file) > 0 && fclose(file) == 0);
}

static void exercise_ngrams(void) {
  int32_t tokens[9];
  float probabilities[9];
  write_ngrams(3, SIZE_MAX);
  ds_ngrams *ngrams = ds_ngrams_open(scratch, VOCAB, NO_MODEL);
  CHECK(ngrams && ds_ngrams_next(ngrams, -1, 9, tokens, probabilities) == 3);
  CHECK(ds_ngrams_next(ngrams, VOCAB - 1, 2, tokens, probabilities) == 2);
  CHECK(ds_ngrams_next(ngrams, 0, 0, NULL, NULL) == 0);
  REFUSED(ds_ngrams_next(ngrams, VOCAB, 2, tokens, probabilities), "token 7");
  REFUSED(ds_ngrams_next(ngrams, -2, 2, tokens, probabilities), "token -2");
  REFUSED(ds_ngrams_next(ngrams, 0, 2, tokens, NULL), "room");
  REFUSED(ds_ngrams_next(NULL, 0, 2, tokens, probabilities), "a table");
  ds_drafter *drafter = ds_bigram_drafter_create(ngrams);
  CHECK(drafter && drafter->begin(drafter, 3) == DS_OK);
  CHECK(drafter->draft(drafter, NULL, 0, 4, tokens, tokens + 4) == 4); /* before any token */
  for (int round = 0; round < 3; ++round) generate(drafter);
  tokens[0] = VOCAB;
  REFUSED(drafter->draft(drafter, tokens, 1, 1, tokens + 1, tokens + 2), "token 7");
  ds_drafter_close(drafter);
  ds_ngrams_free(ngrams);
  ds_ngrams_free(NULL);
  CHECK(!ds_bigram_drafter_create(NULL));
  CHECK(!ds_ngrams_open(NULL, VOCAB, NO_MODEL) && !ds_ngrams_open(scratch, 0, NO_MODEL));
  CHECK(!ds_ngrams_open(scratch, VOCAB, NULL) && strstr(ds_error_message(), "a path"));
  CHECK(!ds_ngrams_open("", VOCAB, NO_MODEL) && strstr(ds_error_message(), "cannot be opened"));
  for (size_t size = 1; size < 200; ++size) {
    write_ngrams(3, size);
    CHECK(!ds_ngrams_open(scratch, VOCAB, NO_MODEL));
  }
  for (uint32_t width = 0; width < 1000000000; width = 2 * width + 1000) {
    write_ngrams(width, SIZE_MAX);
    CHECK(!ds_ngrams_open(scratch, VOCAB, NO_MODEL));
  }
  for (int32_t after = 0; after < 3; ++after) {
    write_ngrams(3, SIZE_MAX);
    spared = after;
    ngrams = ds_ngrams_open(scratch, VOCAB, NO_MODEL);
    spared = INT32_MAX;
    CHECK(!ngrams && strstr(ds_error_message(), "no memory"));
  }
}

/* Whichever allocation fails, writing says so. */
static void exercise_writing_without_memory(void) {
  int32_t failures = 0;
  for (int32_t after = 0;; ++after) {
    spared = after;
    int32_t status = write_texts(5, 20), reached = spared;
    spared = INT32_MAX;
    if (status == DS_OK && reached >= 0) break;
    CHECK(status != DS_OK && strstr(ds_error_message(), "no memory"));
    ++failures;
  }
  CHECK(failures >= 5);
}

/* Whichever allocation fails, create or begin says so, and a later begin works. */
static void exercise_memory(ds_drafter *create(void), int32_t wanted) {
  int32_t failures = 0;
  for (int32_t after = 0;; ++after) {
    spared = after;
    ds_drafter *drafter = create();
    int32_t status = drafter ? drafter->begin(drafter, 500) : DS_ERROR_MEMORY, reached = spared;
    spared = INT32_MAX;
    if (status < 0) {
      CHECK(status == DS_ERROR_MEMORY && strstr(ds_error_message(), "no memory"));
      ++failures;
    }
    if (drafter) generate(drafter);
    ds_drafter_close(drafter);
    if (status >= 0 && reached >= 0) break;
  }
  CHECK(failures >= wanted);
}

static ds_drafter *create_suffix(void) {
  static const int32_t text[3] = {1, 2, DS_END_OF_REFERENCE};
  return ds_suffix_drafter_create(text, 3);
}

static ds_drafter *create_recycling(void) { return ds_recycling_drafter_create(VOCAB); }

static ds_drafter *create_lookahead(void) { return ds_lookahead_drafter_create(VOCAB); }

static ds_drafter *create_history(void) { return ds_history_drafter_create(HISTORY_BYTES); }

static ds_datastore *opened;

static ds_drafter *create_rest(void) { return ds_datastore_drafter_create(opened); }

int main(int n_words, char **words) {
  CHECK(n_words == 2);
  scratch = words[1];
  exercise_suffix_drafter();
  exercise_recycling();
  exercise_lookahead();
  exercise_history();
  exercise_hybrid();
  exercise_ngrams();
  exercise_datastore();
  exercise_writing_without_memory();
  exercise_memory(create_suffix, 6);
  exercise_memory(create_recycling, 1);
  exercise_memory(create_lookahead, 1);
  exercise_memory(create_history, 12);
  CHECK((opened = ds_datastore_open(scratch, VOCAB, NO_TOKENIZER)));
  exercise_memory(create_rest, 1);
  ds_datastore_free(opened);
  puts("clean");
  return 0;
}
