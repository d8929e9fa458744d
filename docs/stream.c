/* Streams what a bundle says after a prompt: token ids in, token ids out, one a line as they are decided.
 *
 *   stream LIBONNXRUNTIME BUNDLE MAX_SEQ_LEN MAX_NEW_TOKENS EOS TOKEN...
 *
 * MAX_SEQ_LEN and EOS stand in the bundle's manifest.json, at engines.target; EOS -1 decodes on behind any end
 * of text. The ladder is suffix -> drafters/int8 -> target, and decoding is greedy: the tokens are the target's
 * own, whatever drafts. The copy drafts in the target's cache, as a bundle whose manifest says "shares_cache"
 * wants it. docs/c-api.md says how to compile this and what it calls.
 */
#include "loop.h"
#include "onnx.h"

#include <stdio.h>
#include <stdlib.h>

enum { N_THREADS = 2, N_SUFFIX_DRAFT = 4, N_INT8_DRAFT = 3 };

static int complain(const char *subject, const char *words) {
  fprintf(stderr, "stream: %s: %s\n", subject, words);
  return EXIT_FAILURE;
}

/* As many numbers as there are words; NULL if one of them is none. */
static int32_t *read_numbers(char **words, int n_words) {
  int32_t *numbers = malloc((size_t)n_words * sizeof *numbers);
  if (!numbers) complain("the prompt", "no memory");
  for (int i = 0; numbers && i < n_words; ++i) {
    char *end;
    long long number = strtoll(words[i], &end, 10);
    numbers[i] = (int32_t)number;
    if (end != words[i] && !*end && numbers[i] == number) continue;
    complain(words[i], "wanted an integer of 32 bits");
    free(numbers);
    return NULL;
  }
  return numbers;
}

static ds_engine *open_engine(ds_onnx *onnx, const char *bundle, const char *name, int32_t max_seq_len) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s/cpu.onnx", bundle, name);
  ds_engine *engine = ds_onnx_open(onnx, path, max_seq_len, 1);
  if (!engine) complain(path, ds_error_message());
  return engine;
}

/* prompt [n_prompt]; eos: where to stop, or negative. */
static int decode(ds_engine *drafter, ds_engine *target, const int32_t *prompt, int32_t n_prompt,
                  int32_t max_new_tokens, int32_t eos) {
  const ds_level ladder[] = {{.engine = NULL, .n_draft = N_SUFFIX_DRAFT},
                             {.engine = drafter, .n_draft = N_INT8_DRAFT},
                             {.engine = target}};
  const ds_sampling greedy = {.temperature = 0, .top_p = 1};
  ds_decoder *decoder = ds_decoder_create(ladder, 3);
  int32_t tokens[N_INT8_DRAFT + 1]; /* the drafter's proposal and a token of the target's */
  int32_t n = decoder ? ds_decoder_begin(decoder, &greedy, prompt, n_prompt, max_new_tokens, &eos, eos >= 0)
                      : DS_ERROR_ARGUMENT;
  if (n == DS_OK) {
    while ((n = ds_decoder_step(decoder, tokens, N_INT8_DRAFT + 1)) > 0) {
      for (int32_t i = 0; i < n; ++i) printf("%d\n", (int)tokens[i]);
      fflush(stdout);
    }
  }
  int code = n < 0 ? complain("decoding", ds_error_message()) : EXIT_SUCCESS;
  ds_decoder_free(decoder);
  return code;
}

int main(int n_words, char **words) {
  if (n_words < 7) return complain("usage", "LIBONNXRUNTIME BUNDLE MAX_SEQ_LEN MAX_NEW_TOKENS EOS TOKEN...");
  int32_t *numbers = read_numbers(words + 3, n_words - 3);
  if (!numbers) return EXIT_FAILURE;

  int code = EXIT_FAILURE;
  ds_engine *copy = NULL, *target = NULL, *drafter = NULL;
  ds_onnx *onnx = ds_onnx_create(words[1], N_THREADS);
  if (!onnx) complain(words[1], ds_error_message());
  if (onnx) copy = open_engine(onnx, words[2], "drafters/int8", numbers[0]);
  if (copy) target = open_engine(onnx, words[2], "target", numbers[0]);
  if (target && !(drafter = ds_onnx_share(target, copy))) complain("drafters/int8", ds_error_message());
  if (drafter) code = decode(drafter, target, numbers + 3, n_words - 6, numbers[1], numbers[2]);

  if (drafter) drafter->close(drafter);
  if (target) target->close(target);
  if (copy) copy->close(copy);
  ds_onnx_free(onnx);
  free(numbers);
  return code;
}
