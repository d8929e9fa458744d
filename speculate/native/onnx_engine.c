/* An engine on ONNX Runtime. Past and present of each cache tensor are the same memory, which turns each update
 * of the cache into a write of the new slots alone. */
#include "error.h"
#include "kernels.h"
#include "leaders.h"
#include "onnx.h"
#include "operators.h"
#include "pages.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ds_onnx {
  _Atomic int32_t n_users; /* its engines, and whoever created it */
  void *library;
  const OrtApi *api;
  OrtEnv *env;
  OrtMemoryInfo *memory;
  ds_pool *pool;
};

/* The inputs of a graph that are not its cache, in the order in which we keep them. NUM_LOGITS only graphs of
 * ours have; others give logits for every row. */
enum { INPUT_IDS, POSITION_IDS, WRITE_INDEX, ATTENTION_MASK, NUM_LOGITS, N_PLAIN };
static const char *const PLAIN[N_PLAIN] = {"input_ids", "position_ids", "write_index", "attention_mask",
                                           "num_logits"};
enum { MAX_NAME = 48, SLOT_STEP = 64, LOGITS_STEP = 32, CACHE_LINE = 64, MAX_SLOTS = 1 << 28 };

typedef struct {
  ds_engine base;
  ds_onnx *onnx;
  ds_operators *operators;
  OrtSession *session;
  bool picks_logits;
  int32_t n_layers;

  /* inputs: the plain ones, then key and value of each layer; outputs: the logits, then, unless the cache is lent to
   * the operators, the same */
  size_t n_inputs, n_outputs;
  char (*names)[MAX_NAME];
  const char **input_names, **output_names;
  OrtValue **inputs, **outputs;

  int32_t n_reserved; /* of the cache's slots, which come in whole steps */
  ds_cache cache;     /* as kernels.h or the graph's own operators have it */
  /* The cache that its values are: its own, or that of an engine whose guest it is. Only compared: where one was freed
   * and another of the same size lies at its place, the values fit that too. */
  const char *bound;
  int32_t bound_slots; /* of that, and of a row of the mask */

  int32_t max_rows, max_logits;
  int64_t *ids, *positions, write_index, num_logits;
  uint8_t *mask;
  float *logits, *peaks;
} onnx_engine;

#define TRY(status)                                                                                          \
  do {                                                                                                       \
    int32_t failed = (status);                                                                               \
    if (failed != DS_OK) return failed;                                                                      \
  } while (0)
#define TRY_ORT(call) TRY(ds_take_status(api, call))

/* ---- The library ----------------------------------------------------------------------------------------- */

static int32_t open_library(ds_onnx *onnx, const char *path) {
  onnx->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!onnx->library) return ds_fail(DS_ERROR_ENGINE, "%s", dlerror());
  const OrtApiBase *(*get_base)(void);
  *(void **)&get_base = dlsym(onnx->library, "OrtGetApiBase");
  onnx->api = get_base ? get_base()->GetApi(ORT_API_VERSION) : NULL;
  if (!onnx->api) return ds_fail(DS_ERROR_ENGINE, "%s is not an ONNX Runtime of 1.17 or later", path);
  const OrtApi *api = onnx->api;
  /* Its errors come back as ours; it need not print them as well. */
  TRY_ORT(api->CreateEnv(ORT_LOG_FATAL, "draftsmith", &onnx->env));
  TRY_ORT(api->CreateCpuMemoryInfo(ORT_ARENA_ALLOCATOR, ORT_MEMORY_DEFAULT, &onnx->memory));
  return DS_OK;
}

ds_onnx *ds_onnx_create(const char *library, int32_t n_threads) {
  ds_onnx *onnx = calloc(1, sizeof *onnx);
  if (!onnx || !library) {
    ds_fail(onnx ? DS_ERROR_ARGUMENT : DS_ERROR_MEMORY, "no %s for ONNX Runtime", onnx ? "path" : "memory");
    free(onnx);
    return NULL;
  }
  onnx->n_users = 1;
  onnx->pool = ds_pool_create(n_threads);
  if (onnx->pool && open_library(onnx, library) == DS_OK) return onnx;
  ds_onnx_free(onnx);
  return NULL;
}

/* The library stays open: threads of its own may still be on their way out. */
void ds_onnx_free(ds_onnx *onnx) {
  if (!onnx || --onnx->n_users) return;
  if (onnx->memory) onnx->api->ReleaseMemoryInfo(onnx->memory);
  if (onnx->env) onnx->api->ReleaseEnv(onnx->env);
  ds_pool_free(onnx->pool);
  free(onnx);
}

const char *ds_onnx_isa(const ds_onnx *onnx) { return onnx ? ds_pool_isa(onnx->pool) : ""; }

/* ---- The graph ------------------------------------------------------------------------------------------- */

enum { MAX_DIMS = 4 };

typedef struct {
  OrtElementType type;
  size_t n_dims;
  int64_t dims[MAX_DIMS];
} signature;

static int32_t read_signature(const OrtApi *api, OrtTypeInfo *info, signature *found) {
  const OrtTensorInfo *tensor = NULL;
  TRY_ORT(api->CastTypeInfoToTensorInfo(info, &tensor));
  if (!tensor) return ds_fail(DS_ERROR_ENGINE, "not a tensor");
  TRY_ORT(api->GetTensorElementType(tensor, &found->type));
  TRY_ORT(api->GetDimensionsCount(tensor, &found->n_dims));
  if (found->n_dims > MAX_DIMS) return ds_fail(DS_ERROR_ENGINE, "more than %d dimensions", MAX_DIMS);
  TRY_ORT(api->GetDimensions(tensor, found->dims, found->n_dims));
  return DS_OK;
}

/* Name and signature of input or output `i`; the name is copied to `name`. */
static int32_t read_end(const onnx_engine *engine, bool is_input, size_t i, char *name, signature *found) {
  const OrtApi *api = engine->onnx->api;
  OrtAllocator *allocator;
  OrtTypeInfo *info = NULL;
  char *text = NULL;
  TRY_ORT(api->GetAllocatorWithDefaultOptions(&allocator));
  TRY_ORT((is_input ? api->SessionGetInputName : api->SessionGetOutputName)(engine->session, i, allocator,
                                                                            &text));
  snprintf(name, MAX_NAME, "%s", text);
  TRY_ORT(api->AllocatorFree(allocator, text));
  TRY_ORT(
      (is_input ? api->SessionGetInputTypeInfo : api->SessionGetOutputTypeInfo)(engine->session, i, &info));
  int32_t status = read_signature(api, info, found);
  api->ReleaseTypeInfo(info);
  return status;
}

static bool is_plain(const char *name) {
  for (int i = 0; i < N_PLAIN; ++i)
    if (!strcmp(name, PLAIN[i])) return true;
  return false;
}

/* All cache tensors must be alike: raw memory is going to be bound to them. */
static int32_t check_cache(onnx_engine *engine, const char *name, const signature *found) {
  if (found->type != ORT_FLOAT || found->n_dims != 4 || found->dims[1] < 1 || found->dims[3] < 1)
    return ds_fail(DS_ERROR_ENGINE, "%s is not a float32 cache [B, heads, slots, channels]", name);
  if (!engine->cache.n_kv_heads) {
    engine->cache.n_kv_heads = (int32_t)found->dims[1];
    engine->cache.head_dim = (int32_t)found->dims[3];
  }
  if (found->dims[1] != engine->cache.n_kv_heads || found->dims[3] != engine->cache.head_dim)
    return ds_fail(DS_ERROR_ENGINE, "%s has %d heads of %d, another cache %d of %d", name,
                   (int)found->dims[1], (int)found->dims[3], (int)engine->cache.n_kv_heads,
                   (int)engine->cache.head_dim);
  return DS_OK;
}

static int32_t read_inputs(onnx_engine *engine) {
  const OrtApi *api = engine->onnx->api;
  size_t n, n_cache = 0;
  TRY_ORT(api->SessionGetInputCount(engine->session, &n));
  for (size_t i = 0; i < n; ++i) {
    char name[MAX_NAME];
    signature found;
    TRY(read_end(engine, true, i, name, &found));
    if (!strcmp(name, PLAIN[NUM_LOGITS])) engine->picks_logits = true;
    if (is_plain(name)) continue;
    TRY(check_cache(engine, name, &found));
    ++n_cache;
  }
  size_t n_plain = engine->picks_logits ? N_PLAIN : N_PLAIN - 1;
  if (n_cache < 2 || n_cache % 2 || n != n_plain + n_cache)
    return ds_fail(DS_ERROR_ENGINE, "its %d inputs are not those of a decoder with a cache", (int)n);
  engine->n_layers = (int32_t)(n_cache / 2);
  return DS_OK;
}

static int32_t read_outputs(onnx_engine *engine) {
  const OrtApi *api = engine->onnx->api;
  size_t n;
  TRY_ORT(api->SessionGetOutputCount(engine->session, &n));
  for (size_t i = 0; i < n; ++i) {
    char name[MAX_NAME];
    signature found;
    TRY(read_end(engine, false, i, name, &found));
    if (strcmp(name, "logits")) {
      TRY(check_cache(engine, name, &found));
    } else if (found.type != ORT_FLOAT || found.n_dims != 3 || found.dims[2] < 1 ||
               found.dims[2] > INT32_MAX) {
      return ds_fail(DS_ERROR_ENGINE, "logits are not float32 [B, S, vocabulary]");
    } else {
      engine->base.vocab = (int32_t)found.dims[2];
    }
  }
  if (!engine->base.vocab || n != 1 + 2 * (size_t)engine->n_layers)
    return ds_fail(DS_ERROR_ENGINE, "its %d outputs are not logits and the cache of %d layers", (int)n,
                   (int)engine->n_layers);
  return DS_OK;
}

/* Whether its operators take the cache from us, so that ONNX Runtime need not give it back. */
static bool lends_cache(const onnx_engine *engine) {
  return ds_operators_attend(engine->operators) &&
         ds_operators_count(engine->operators) == 2 * engine->n_layers;
}

/* The names by which inputs and outputs are handed over. A graph that has others is refused by the first run. */
static int32_t list_names(onnx_engine *engine) {
  size_t n_plain = engine->picks_logits ? N_PLAIN : N_PLAIN - 1, n_cache = 2 * (size_t)engine->n_layers;
  engine->n_inputs = n_plain + n_cache;
  engine->n_outputs = lends_cache(engine) ? 1 : 1 + n_cache;
  engine->names = calloc(2 * n_cache, sizeof *engine->names);
  engine->input_names = calloc(engine->n_inputs, sizeof *engine->input_names);
  engine->output_names = calloc(engine->n_outputs, sizeof *engine->output_names);
  engine->inputs = calloc(engine->n_inputs, sizeof(OrtValue *));
  engine->outputs = calloc(engine->n_outputs, sizeof(OrtValue *));
  if (!engine->names || !engine->input_names || !engine->output_names || !engine->inputs || !engine->outputs)
    return ds_fail(DS_ERROR_MEMORY, "no memory for an engine of %d layers", (int)engine->n_layers);
  memcpy(engine->input_names, PLAIN, n_plain * sizeof *PLAIN);
  engine->output_names[0] = "logits";
  for (size_t i = 0; i < n_cache; ++i) {
    const char *part = i % 2 ? "value" : "key";
    snprintf(engine->names[2 * i], MAX_NAME, "past_key_values.%d.%s", (int)(i / 2), part);
    snprintf(engine->names[2 * i + 1], MAX_NAME, "present.%d.%s", (int)(i / 2), part);
    engine->input_names[n_plain + i] = engine->names[2 * i];
    if (engine->n_outputs > 1) engine->output_names[1 + i] = engine->names[2 * i + 1];
  }
  return DS_OK;
}

static int32_t create_session(onnx_engine *engine, OrtSessionOptions *options, const char *graph,
                              int32_t n_ort_threads) {
  const OrtApi *api = engine->onnx->api;
  TRY_ORT(api->SetIntraOpNumThreads(options, n_ort_threads));
  TRY_ORT(api->SetInterOpNumThreads(options, 1));
  /* Engines take turns: threads that go on spinning after a call would take the cores from the next. */
  TRY_ORT(api->AddSessionConfigEntry(options, "session.force_spinning_stop", "1"));
  /* Without VNNI the usual int8 kernels add pairs of products in 16 bits, which saturates; these do not. */
  TRY_ORT(api->AddSessionConfigEntry(options, "session.x64quantprecision", "1"));
  /* Weight-only linears in float: by default their activations are rounded to int8 as well. */
  TRY_ORT(api->AddSessionConfigEntry(options, "session.qdq_matmulnbits_accuracy_level", "1"));
  engine->operators = ds_operators_add(api, options, engine->onnx->pool);
  if (!engine->operators) return DS_ERROR_ENGINE;
  TRY_ORT(api->CreateSession(engine->onnx->env, graph, options, &engine->session));
  return DS_OK;
}

static int32_t open_graph(onnx_engine *engine, const char *graph, int32_t n_ort_threads) {
  const OrtApi *api = engine->onnx->api;
  OrtSessionOptions *options;
  TRY_ORT(api->CreateSessionOptions(&options));
  int32_t status = create_session(engine, options, graph, n_ort_threads);
  api->ReleaseSessionOptions(options);
  TRY(status);
  ds_forget_freed(); /* by the session, and by whoever read a tokenizer before: 10 MB, and the weights are to come */
  TRY(read_inputs(engine));
  TRY(read_outputs(engine));
  if (lends_cache(engine)) engine->cache.type = ds_operators_cache_type(engine->operators);
  return list_names(engine);
}

/* ---- Buffers --------------------------------------------------------------------------------------------- */

static int32_t set_value(onnx_engine *engine, OrtValue **value, void *data, OrtElementType type,
                         size_t element, const int64_t *dims, size_t n_dims) {
  const OrtApi *api = engine->onnx->api;
  size_t n_bytes = element;
  for (size_t i = 0; i < n_dims; ++i) n_bytes *= (size_t)dims[i];
  if (*value) api->ReleaseValue(*value);
  *value = NULL;
  TRY_ORT(
      api->CreateTensorWithDataAsOrtValue(engine->onnx->memory, data, n_bytes, dims, n_dims, type, value));
  return DS_OK;
}

static int32_t resize_cache(onnx_engine *engine, int32_t n_slots) {
  free(engine->cache.data);
  engine->n_reserved = 0;
  engine->cache.n_slots = n_slots;
  size_t n_bytes = 2 * (size_t)engine->n_layers * ds_part_bytes(&engine->cache);
  n_bytes = (n_bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
  engine->cache.data = aligned_alloc(CACHE_LINE, n_bytes);
  if (!engine->cache.data) {
    engine->cache.n_slots = 0;
    return ds_fail(DS_ERROR_MEMORY, "no memory for a cache of %d tokens", (int)n_slots);
  }
  /* Zeros, not what memory held: stock operators weigh a hidden slot by 0, and 0 times NaN would be NaN. */
  memset(engine->cache.data, 0, n_bytes);
  return DS_OK;
}

/* Calls of `engine` read and write the cache of `home`, itself or one of the same shape. */
static int32_t bind_cache(onnx_engine *engine, const onnx_engine *home) {
  if (engine->bound == home->cache.data && engine->bound_slots == home->cache.n_slots) return DS_OK;
  free(engine->mask);
  engine->mask = NULL;
  engine->max_rows = 0;
  engine->bound = NULL;
  /* The graph's own caches are float32. Those that its operators do not look at may be empty. */
  int32_t n_slots = home->cache.type == DS_CACHE_FLOAT32 ? home->cache.n_slots : 0;
  int64_t dims[4] = {1, home->cache.n_kv_heads, n_slots, home->cache.head_dim};
  size_t n_parts = 2 * (size_t)home->n_layers;
  for (size_t i = 0; i < n_parts; ++i) {
    void *part = ds_find_part(&home->cache, (int32_t)i);
    TRY(set_value(engine, &engine->inputs[engine->n_inputs - n_parts + i], part, ORT_FLOAT, sizeof(float),
                  dims, 4));
    if (engine->n_outputs > 1)
      TRY(set_value(engine, &engine->outputs[1 + i], part, ORT_FLOAT, sizeof(float), dims, 4));
  }
  engine->bound = home->cache.data;
  engine->bound_slots = home->cache.n_slots;
  return DS_OK;
}

static int32_t reserve(ds_engine *base, int32_t n_slots) {
  onnx_engine *engine = (onnx_engine *)base;
  if (!engine) return ds_fail(DS_ERROR_ARGUMENT, "the engine is NULL");
  if (n_slots < 1 || n_slots > base->max_seq_len)
    return ds_fail(DS_ERROR_ARGUMENT, "a cache of at most %d tokens, %d are wanted", (int)base->max_seq_len,
                   (int)n_slots);
  int32_t rounded = (n_slots + SLOT_STEP - 1) / SLOT_STEP * SLOT_STEP;
  if (rounded != engine->cache.n_slots) TRY(resize_cache(engine, rounded));
  engine->n_reserved = n_slots;
  return DS_OK;
}

static int32_t make_room(onnx_engine *engine, int32_t n_rows, int32_t n_logits) {
  if (n_rows > engine->max_rows) {
    engine->max_rows = 0;
    free(engine->ids);
    free(engine->positions);
    free(engine->mask);
    engine->ids = malloc((size_t)n_rows * sizeof(int64_t));
    engine->positions = malloc((size_t)n_rows * sizeof(int64_t));
    engine->mask = malloc((size_t)n_rows * (size_t)engine->bound_slots);
    if (!engine->ids || !engine->positions || !engine->mask)
      return ds_fail(DS_ERROR_MEMORY, "no memory for a call of %d rows", (int)n_rows);
    engine->max_rows = n_rows;
  }
  if (n_logits > engine->max_logits) {
    /* As many as calls mostly have, at once: rows that are never written take no memory, one array after another that
     * grows by a row leaves holes. */
    n_logits = (n_logits + LOGITS_STEP - 1) / LOGITS_STEP * LOGITS_STEP;
    engine->max_logits = 0;
    free(engine->logits);
    free(engine->peaks);
    engine->logits = malloc((size_t)n_logits * (size_t)engine->base.vocab * sizeof(float));
    engine->peaks = malloc((size_t)n_logits * (size_t)ds_count_peaks(engine->base.vocab) * sizeof(float));
    if (!engine->logits || !engine->peaks)
      return ds_fail(DS_ERROR_MEMORY, "no memory for logits of %d rows", (int)n_logits);
    engine->max_logits = n_logits;
  }
  return DS_OK;
}

/* ---- A call ---------------------------------------------------------------------------------------------- */

/* Checked here since stock operators count negative ids and positions from the end of their table. */
static int32_t check_call(const onnx_engine *engine, const onnx_engine *home, int32_t n_rows,
                          const int32_t *token_ids, int32_t start, const int64_t *positions, int32_t n_logits,
                          const float **logits) {
  if (!token_ids || !logits) return ds_fail(DS_ERROR_ARGUMENT, "the tokens or the logits are NULL");
  if (n_rows < 1 || start < 0 || n_logits < 1 || n_logits > n_rows)
    return ds_fail(DS_ERROR_ARGUMENT, "a call with %d rows from slot %d, logits of %d", (int)n_rows,
                   (int)start, (int)n_logits);
  if (n_rows > home->n_reserved || start > home->n_reserved - n_rows)
    return ds_fail(DS_ERROR_ARGUMENT, "%d rows from slot %d on; the cache was reserved for %d", (int)n_rows,
                   (int)start, (int)home->n_reserved);
  const ds_engine *base = &engine->base;
  for (int32_t r = 0; r < n_rows; ++r) {
    if (token_ids[r] < 0 || token_ids[r] >= base->vocab)
      return ds_fail(DS_ERROR_ARGUMENT, "token %d in row %d of a vocabulary of %d", (int)token_ids[r], (int)r,
                     (int)base->vocab);
    if (positions && (positions[r] < 0 || positions[r] >= base->max_seq_len))
      return ds_fail(DS_ERROR_ARGUMENT, "position %lld in row %d of sequences of at most %d",
                     (long long)positions[r], (int)r, (int)base->max_seq_len);
  }
  return DS_OK;
}

static void fill_inputs(onnx_engine *engine, int32_t n_rows, const int32_t *token_ids, int32_t start,
                        const int64_t *positions, const uint8_t *mask) {
  int32_t end = start + n_rows;
  for (int32_t r = 0; r < n_rows; ++r) {
    uint8_t *sees = engine->mask + (int64_t)r * engine->bound_slots;
    engine->ids[r] = token_ids[r];
    engine->positions[r] = positions ? positions[r] : start + r;
    if (mask) {
      for (int32_t s = 0; s < end; ++s) sees[s] = mask[(int64_t)r * end + s] != 0;
      memset(sees + end, 0, (size_t)(engine->bound_slots - end));
    } else {
      memset(sees, 1, (size_t)(start + r + 1));
      memset(sees + start + r + 1, 0, (size_t)(engine->bound_slots - (start + r + 1)));
    }
  }
}

static int32_t run_session(onnx_engine *engine, int32_t n_rows, int32_t n_out) {
  const OrtApi *api = engine->onnx->api;
  OrtValue **in = engine->inputs;
  int64_t one[] = {1}, rows[] = {1, n_rows}, seen[] = {1, 1, n_rows, engine->bound_slots};
  int64_t out[] = {1, n_out, engine->base.vocab};
  TRY(set_value(engine, &in[INPUT_IDS], engine->ids, ORT_INT64, 8, rows, 2));
  TRY(set_value(engine, &in[POSITION_IDS], engine->positions, ORT_INT64, 8, rows, 2));
  TRY(set_value(engine, &in[WRITE_INDEX], &engine->write_index, ORT_INT64, 8, one, 1));
  TRY(set_value(engine, &in[ATTENTION_MASK], engine->mask, ORT_BOOL, 1, seen, 4));
  if (engine->picks_logits)
    TRY(set_value(engine, &in[NUM_LOGITS], &engine->num_logits, ORT_INT64, 8, one, 1));
  TRY(set_value(engine, &engine->outputs[0], engine->logits, ORT_FLOAT, sizeof(float), out, 3));
  TRY_ORT(api->Run(engine->session, NULL, engine->input_names, (const OrtValue *const *)in, engine->n_inputs,
                   engine->output_names, engine->n_outputs, engine->outputs));
  ds_operators_ran(engine->operators);
  return DS_OK;
}

/* In the cache of `home`. */
static int32_t forward_in(onnx_engine *engine, const onnx_engine *home, int32_t wants_leaders, int32_t n_rows,
                          const int32_t *token_ids, int32_t start, const int64_t *positions,
                          const uint8_t *mask, int32_t n_logits, const float **logits) {
  engine->base.peaks = NULL;
  TRY(check_call(engine, home, n_rows, token_ids, start, positions, n_logits, logits));
  int32_t n_out = engine->picks_logits ? n_logits : n_rows, status;
  TRY(bind_cache(engine, home));
  TRY(make_room(engine, n_rows, n_out));
  fill_inputs(engine, n_rows, token_ids, start, positions, mask);
  engine->write_index = start;
  engine->num_logits = n_logits;
  if (lends_cache(engine)) ds_operators_lend(engine->operators, &home->cache);
  ds_operators_want_leaders(engine->operators, wants_leaders);
  ds_operators_call call = {n_rows, n_out, engine->ids, engine->positions, start, engine->mask};
  bool has_run = ds_operators_run(engine->operators, &call, engine->logits, engine->peaks, &status);
  if (!has_run) status = run_session(engine, n_rows, n_out);
  int64_t first = n_out - n_logits;
  *logits = engine->logits + first * engine->base.vocab;
  if (has_run && status == DS_OK)
    engine->base.peaks = engine->peaks + first * ds_count_peaks(engine->base.vocab);
  return status;
}

static int32_t forward(ds_engine *base, int32_t n_rows, const int32_t *token_ids, int32_t start,
                       const int64_t *positions, const uint8_t *mask, int32_t n_logits,
                       const float **logits) {
  onnx_engine *engine = (onnx_engine *)base;
  if (!engine) return ds_fail(DS_ERROR_ARGUMENT, "the engine is NULL");
  return forward_in(engine, engine, base->wants_leaders, n_rows, token_ids, start, positions, mask, n_logits,
                    logits);
}

static int32_t keep(ds_engine *base, int32_t start, const int32_t *slots, int32_t n_slots) {
  onnx_engine *engine = (onnx_engine *)base;
  if (!engine) return ds_fail(DS_ERROR_ARGUMENT, "the engine is NULL");
  ds_heads heads = {.cache_type = engine->cache.type,
                    .n_heads = engine->cache.n_kv_heads,
                    .n_kv_heads = engine->cache.n_kv_heads,
                    .head_dim = engine->cache.head_dim,
                    .max_slots = engine->cache.n_slots};
  bool ours = ds_operators_attend(engine->operators); /* stock operators keep keys as they keep values */
  int32_t status = DS_OK;
  for (int32_t part = 0; part < 2 * engine->n_layers && status == DS_OK; ++part) {
    void *cache = ds_find_part(&engine->cache, part);
    bool panels = ours && part % 2 == 0;
    status = ds_keep_path(&heads, n_slots, slots, start, panels ? cache : NULL, panels ? NULL : cache);
  }
  return status;
}

static void release_values(onnx_engine *engine, OrtValue **values, size_t n) {
  for (size_t i = 0; values && i < n; ++i)
    if (values[i]) engine->onnx->api->ReleaseValue(values[i]);
  free(values);
}

static void close_engine(ds_engine *base) {
  onnx_engine *engine = (onnx_engine *)base;
  if (!engine) return;
  release_values(engine, engine->inputs, engine->n_inputs);
  release_values(engine, engine->outputs, engine->n_outputs);
  if (engine->session) engine->onnx->api->ReleaseSession(engine->session);
  ds_operators_free(engine->operators);
  free(engine->names);
  free(engine->input_names);
  free(engine->output_names);
  free(engine->cache.data);
  free(engine->ids);
  free(engine->positions);
  free(engine->mask);
  free(engine->logits);
  free(engine->peaks);
  ds_onnx_free(engine->onnx);
  free(engine);
}

ds_engine *ds_onnx_open(ds_onnx *onnx, const char *graph, int32_t max_seq_len, int32_t n_ort_threads) {
  if (!onnx || !graph || max_seq_len < 1 || max_seq_len > MAX_SLOTS || n_ort_threads < 1) {
    ds_fail(DS_ERROR_ARGUMENT, "no runtime, no graph, sequences of %d tokens or %d threads", (int)max_seq_len,
            (int)n_ort_threads);
    return NULL;
  }
  onnx_engine *engine = calloc(1, sizeof *engine);
  if (!engine) {
    ds_fail(DS_ERROR_MEMORY, "no memory for an engine");
    return NULL;
  }
  engine->onnx = onnx;
  ++onnx->n_users;
  engine->base = (ds_engine){.max_seq_len = max_seq_len,
                             .reserve = reserve,
                             .forward = forward,
                             .close = close_engine,
                             .keep = keep};
  if (open_graph(engine, graph, n_ort_threads) == DS_OK) return &engine->base;
  close_engine(&engine->base);
  return NULL;
}

/* ---- In the cache of another ----------------------------------------------------------------------------- */

typedef struct {
  ds_engine base;
  /* Whose weights it has: its own engine's, or its host's, some of whose sublayers it then skips. */
  onnx_engine *runner;
  uint8_t skips[]; /* by sublayer */
} guest_engine;

static onnx_engine *host_of(const ds_engine *base) { return (onnx_engine *)base->host; }

static int32_t reserve_of_guest(ds_engine *base, int32_t n_slots) { return reserve(base->host, n_slots); }

static int32_t forward_of_guest(ds_engine *base, int32_t n_rows, const int32_t *token_ids, int32_t start,
                                const int64_t *positions, const uint8_t *mask, int32_t n_logits,
                                const float **logits) {
  guest_engine *guest = (guest_engine *)base;
  ds_operators *operators = guest->runner->operators;
  ds_operators_skip(operators, guest->runner == host_of(base) ? guest->skips : NULL);
  int32_t status = forward_in(guest->runner, host_of(base), base->wants_leaders, n_rows, token_ids, start,
                              positions, mask, n_logits, logits);
  ds_operators_skip(operators, NULL);
  base->peaks = guest->runner->base.peaks;
  return status;
}

static int32_t keep_of_guest(ds_engine *base, int32_t start, const int32_t *slots, int32_t n_slots) {
  return keep(base->host, start, slots, n_slots);
}

static void close_guest(ds_engine *base) { free(base); }

static guest_engine *create_guest(ds_engine *host, ds_engine *runner, int32_t n_sublayers) {
  guest_engine *guest = calloc(1, sizeof *guest + (size_t)n_sublayers);
  if (!guest) {
    ds_fail(DS_ERROR_MEMORY, "no memory for an engine");
    return NULL;
  }
  int32_t most = host->max_seq_len < runner->max_seq_len ? host->max_seq_len : runner->max_seq_len;
  guest->runner = (onnx_engine *)runner;
  guest->base = (ds_engine){.vocab = runner->vocab,
                            .max_seq_len = most,
                            .reserve = reserve_of_guest,
                            .forward = forward_of_guest,
                            .close = close_guest,
                            .keep = keep_of_guest,
                            .host = host};
  return guest;
}

ds_engine *ds_onnx_skip(ds_engine *host, const uint8_t *skips, int32_t n_sublayers) {
  if (!host || host->forward != forward || !skips) {
    ds_fail(DS_ERROR_ARGUMENT, "no engine of ONNX Runtime, or nothing said of what to skip");
    return NULL;
  }
  int32_t n_own = ds_operators_count(((onnx_engine *)host)->operators), n_skipped = 0;
  if (n_own < 1 || n_own != n_sublayers) {
    ds_fail(DS_ERROR_ARGUMENT,
            n_own < 1 ? "its graph is not of operators of ours that can be skipped (%d of %d sublayers): "
                        "export it again, and run its graph for the CPU"
                      : "its graph has %d sublayers, not %d",
            (int)n_own, (int)n_sublayers);
    return NULL;
  }
  for (int32_t i = 0; i < n_own; ++i) n_skipped += skips[i] != 0;
  if (n_skipped == n_own) {
    ds_fail(DS_ERROR_ARGUMENT, "all %d sublayers are skipped: nothing is left to draft with", (int)n_own);
    return NULL;
  }
  guest_engine *guest = create_guest(host, host, n_own);
  if (!guest) return NULL;
  memcpy(guest->skips, skips, (size_t)n_own);
  return &guest->base;
}

ds_engine *ds_onnx_share(ds_engine *host, ds_engine *engine) {
  if (!host || host->forward != forward || !engine || engine->forward != forward || host == engine) {
    ds_fail(DS_ERROR_ARGUMENT, "two engines of ONNX Runtime are wanted, each with a cache of its own");
    return NULL;
  }
  const onnx_engine *theirs = (onnx_engine *)host, *own = (onnx_engine *)engine;
  if (theirs->n_layers != own->n_layers || theirs->cache.n_kv_heads != own->cache.n_kv_heads ||
      theirs->cache.head_dim != own->cache.head_dim) {
    ds_fail(DS_ERROR_ARGUMENT, "a cache of %d layers, %d heads, %d channels for an engine of %d, %d, %d",
            (int)theirs->n_layers, (int)theirs->cache.n_kv_heads, (int)theirs->cache.head_dim,
            (int)own->n_layers, (int)own->cache.n_kv_heads, (int)own->cache.head_dim);
    return NULL;
  }
  if (ds_operators_attend(theirs->operators) != ds_operators_attend(own->operators)) {
    ds_fail(DS_ERROR_ARGUMENT,
            "one of the engines runs on stock operators, which keep keys in another order");
    return NULL;
  }
  if (theirs->cache.type != DS_CACHE_FLOAT32 && !lends_cache(own)) {
    ds_fail(DS_ERROR_ARGUMENT, "the drafter's graph does not number its layers, so it cannot read a cache in "
                               "bfloat16: export it again, or let it keep a cache of its own (cache: own)");
    return NULL;
  }
  guest_engine *guest = create_guest(host, engine, 0);
  return guest ? &guest->base : NULL;
}
