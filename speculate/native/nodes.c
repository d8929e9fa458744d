/* The operators of domain "draftsmith", for graphs that `export` writes: what each reads, and how the kernels compute it.
 *
 * Activations are float32 [B, S, width]. Weights are constants in the packed formats of kernels.h, as bytes.
 * Inputs in brackets may be missing.
 *
 *   Embed      ids int64 [B, S], table -> y
 *                n, k, multiplier; and format, of a packed weight. Any other table is float32 or bfloat16 [n, k].
 *   Linear     x, [[linear]], [, residual] [, [screen]] -> y
 *                [[linear]]: weight, [scale, starts, bias, norm weight, norm bias], with the attributes n, k,
 *                format, activation (enum ds_activation); and norm (enum ds_norm), epsilon
 *              Rows are normalized first if there is a norm, and quantized if the weight is int8.
 *              Behind the residual, [screen]: weight, scale, error of a ds_screen (ds_operators_want_leaders).
 *              straight, or missing: that the graph is an Embed of its input_ids, so many Layers, each of what the
 *              one before gives, with one ListSlots for all, and this, of the last num_logits rows, which gives its
 *              logits. The order of such a graph needs no runtime (ds_operators_run).
 *   Layer      x and what Attend takes from its second input on, all ten; [[qkv]], [[o]], [[up]], [[down]]
 *                -> y, present_key, present_value
 *                the attributes of Attend and, with "qkv_" and so on before their names, of the linears
 *              h = x + o(attend(qkv(x))), y = h + down(up(h)). One node for it all: each costs microseconds, the more
 *              so since the weights that pass through the caches take its own data with them.
 *   Norm       x, weight [, bias] -> y
 *                norm, epsilon
 *   Spread     x, ids int64 [width] -> y
 *                n: y has so many columns, x those of ids; minus infinity elsewhere
 *   ListSlots  attention_mask bool [B, 1, S, S_max] -> slots int32 [B, S, S_max], counts int32 [B, S]
 *                window: of the slots that a row sees, only its last `window`; 0 for all
 *   Attend     qkv, position_ids, write_index, slots, counts, past_key, past_value [, cos, sin, q_norm, k_norm]
 *                -> y, present_key, present_value
 *                num_heads, scale, epsilon (of the norms); cache_type, or missing: of a cache that is lent, which is
 *                one for all nodes (enum ds_cache_type). The graph's own caches are float32.
 *              Keys lie in panels (kernels.h).
 *              Overwrites qkv, which nobody else may read. Writes the cache in place where past and present are
 *              the same memory, or where one is lent (ds_operators_lend): that two tensors a layer go into a run and
 *              come out of it costs a call of one row of a small model 3 to 5 %.
 *
 * Nodes of a decoder layer have the attribute "sublayer": 2 * layer for those of its attention, one more for those
 * of its MLP; a Layer, which is both, has the first. While a sublayer is skipped (ds_operators_skip), its nodes
 * give what the residual stream would have without it: their residual, or zeros where they have none. A skipped
 * attention neither reads nor writes the cache.
 *
 * A node keeps what it reads between runs, and a session's nodes share memory: its runs must follow one another.
 */
#include "nodes.h"
#include "dispatch.h"
#include "error.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DIMS = 4, MAX_SUBLAYERS = 1 << 16 };
enum { STEP_INPUTS = 6, FIRST_STEP = 11 /* input of a Layer */ };
enum { FORGET_BYTES = 2 << 20 }; /* as many of a file were read when the process lets go of its pages */

/* ---- What a node is given -------------------------------------------------------------------------------- */

static OrtStatus *refuse(const kernel *node, const char *what) {
  char message[160];
  snprintf(message, sizeof message, "draftsmith %s: %s", node->kind->name, what);
  return node->api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

static OrtStatus *report(const kernel *node, int32_t status) {
  return status == DS_OK ? NULL : node->api->CreateStatus(ORT_FAIL, ds_error_message());
}

typedef struct {
  void *data; /* NULL: missing */
  size_t n_dims;
  int64_t dims[MAX_DIMS];
} tensor;

/* Input `index` and how many elements it has: NULL and 0 if it is missing. */
static OrtStatus *read_part(const kernel *node, OrtKernelContext *context, size_t index, void *data,
                            int64_t *count) {
  const OrtApi *api = node->api;
  const OrtValue *value = NULL;
  OrtTensorInfo *info = NULL;
  size_t n = 0;
  *(void **)data = NULL;
  *count = 0;
  TRY(api->KernelContext_GetInput(context, index, &value));
  if (!value) return NULL;
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus *status = api->GetTensorShapeElementCount(info, &n);
  api->ReleaseTensorTypeAndShapeInfo(info);
  *count = (int64_t)n;
  return status ? status : api->GetTensorMutableData((OrtValue *)value, data);
}

/* The same of an input that must have `wanted` elements unless it is missing. */
static OrtStatus *read_data(const kernel *node, OrtKernelContext *context, size_t index, int64_t wanted,
                            void *data) {
  int64_t count;
  TRY(read_part(node, context, index, data, &count));
  return count == wanted || !*(void **)data ? NULL : refuse(node, "an input has the wrong size");
}

static OrtStatus *read_tensor(const kernel *node, OrtKernelContext *context, size_t index, size_t n_dims,
                              tensor *found) {
  const OrtApi *api = node->api;
  const OrtValue *value = NULL;
  OrtTensorInfo *info = NULL;
  TRY(api->KernelContext_GetInput(context, index, &value));
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus *status = api->GetDimensionsCount(info, &found->n_dims);
  if (!status && found->n_dims != n_dims)
    status = refuse(node, "an input has the wrong number of dimensions");
  if (!status) status = api->GetDimensions(info, found->dims, n_dims);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status ? status : api->GetTensorMutableData((OrtValue *)value, &found->data);
}

static OrtStatus *make_output(const kernel *node, OrtKernelContext *context, size_t index, size_t n_dims,
                              const int64_t *dims, void *data) {
  OrtValue *value = NULL;
  TRY(node->api->KernelContext_GetOutput(context, index, dims, n_dims, &value));
  return node->api->GetTensorMutableData(value, data);
}

/* Activations: input 0, of `width` a row. */
static OrtStatus *read_rows(const kernel *node, OrtKernelContext *context, int64_t width, tensor *x) {
  TRY(read_tensor(node, context, 0, 3, x));
  return x->dims[2] == width ? NULL : refuse(node, "rows have the wrong width for the weights");
}

static int32_t count_rows(const tensor *x) { return (int32_t)(x->dims[0] * x->dims[1]); }

static OrtStatus *make_rows(const kernel *node, OrtKernelContext *context, const tensor *x, int64_t width,
                            void *data) {
  int64_t dims[3] = {x->dims[0], x->dims[1], width};
  return make_output(node, context, 0, 3, dims, data);
}

/* ---- Linear layers --------------------------------------------------------------------------------------- */

static OrtStatus *read_int(kernel *node, const OrtKernelInfo *info, const char *prefix, const char *name,
                           int32_t *value) {
  char full[32];
  int64_t found;
  snprintf(full, sizeof full, "%s%s", prefix, name);
  TRY(node->api->KernelInfoGetAttribute_int64(info, full, &found));
  *value = found == (int32_t)found ? (int32_t)found : INT32_MIN; /* which no attribute may be */
  return NULL;
}

static OrtStatus *read_norm(kernel *node, const OrtKernelInfo *info) {
  TRY(node->api->KernelInfoGetAttribute_int64(info, "norm", &node->norm));
  return node->api->KernelInfoGetAttribute_float(info, "epsilon", &node->epsilon);
}

/* An attribute that graphs made before there was one do not have. */
static void read_newer(kernel *node, const OrtKernelInfo *info, const char *name, int32_t missing,
                       int32_t *value) {
  OrtStatus *status = read_int(node, info, "", name, value);
  if (!status) return;
  node->api->ReleaseStatus(status);
  *value = missing;
}

static OrtStatus *read_sublayer(kernel *node, const OrtKernelInfo *info, int32_t n_own) {
  read_newer(node, info, "sublayer", NO_SUBLAYER, &node->sublayer);
  if (node->sublayer == NO_SUBLAYER) return NULL;
  if (node->sublayer < 0 || node->sublayer > MAX_SUBLAYERS - n_own)
    return refuse(node, "the number of its sublayer is not one");
  if (node->owner->n_sublayers < node->sublayer + n_own) node->owner->n_sublayers = node->sublayer + n_own;
  return NULL;
}

static bool skips(const ds_operators *owner, int32_t sublayer) {
  return owner->skips && sublayer != NO_SUBLAYER && owner->skips[sublayer];
}

static OrtStatus *read_step(kernel *node, const OrtKernelInfo *info, const char *prefix, int32_t sublayer,
                            step *s) {
  s->sublayer = sublayer;
  TRY(read_int(node, info, prefix, "n", &s->linear.n));
  TRY(read_int(node, info, prefix, "k", &s->linear.k));
  TRY(read_int(node, info, prefix, "format", &s->linear.format));
  TRY(read_int(node, info, prefix, "activation", &s->linear.activation));
  s->before = node->owner->last_step;
  if (s->before) s->before->next = s;
  node->owner->last_step = s;
  return NULL;
}

/* Weight, scale, starts and bias, from input `first` on, are what the attributes say. */
static OrtStatus *find_weights(kernel *node, OrtKernelContext *context, size_t first, bool is_table,
                               ds_linear *linear) {
  ds_linear found = *linear;
  ds_part_sizes sizes = {0};
  TRY(read_part(node, context, first, &found.weight, &sizes.weight));
  if (!is_table) {
    TRY(read_part(node, context, first + 1, &found.scale, &sizes.scale));
    TRY(read_part(node, context, first + 2, &found.starts, &sizes.starts));
    TRY(read_part(node, context, first + 3, &found.bias, &sizes.bias));
  }
  TRY(report(node, ds_check_parts(&found, &sizes)));
  *linear = found;
  return NULL;
}

/* Constants keep their place as long as the session lives, so the first run finds and checks them for all. */
static OrtStatus *find_constants(kernel *node, OrtKernelContext *context, size_t first, step *s) {
  if (s->linear.weight) return NULL;
  TRY(read_data(node, context, first + 4, s->linear.k, &s->norm_weight));
  TRY(read_data(node, context, first + 5, s->linear.k, &s->norm_bias));
  return find_weights(node, context, first, false, &s->linear);
}

/* What no bound can be made of would leave outputs unseen that are the largest. */
static bool may_bound(const ds_screen *screen) {
  for (int32_t i = 0; i < screen->copy.n; ++i)
    if (!(screen->error[i] >= 0 && screen->copy.scale[i] > 0 && screen->copy.scale[i] < 0x1p40f))
      return false;
  return true;
}

/* If it has one. */
static OrtStatus *find_screen(kernel *node, OrtKernelContext *context, size_t first, step *s) {
  ds_screen found = {{.n = s->linear.n, .k = s->linear.k, .format = DS_INT8}, NULL};
  ds_part_sizes sizes = {0};
  TRY(read_part(node, context, first, &found.copy.weight, &sizes.weight));
  if (!found.copy.weight) return NULL;
  TRY(read_part(node, context, first + 1, &found.copy.scale, &sizes.scale));
  TRY(read_data(node, context, first + 2, sizes.scale, &found.error));
  TRY(report(node, ds_check_parts(&found.copy, &sizes)));
  if (found.error && !may_bound(&found))
    return refuse(node, "no bound can be made of the errors and scales of its screen");
  s->screen = found;
  return NULL;
}

static OrtStatus *reserve(kernel *node, int32_t which, size_t size, void *data) {
  buffer *b = &node->owner->buffers[which];
  if (size > b->size) {
    free(b->data);
    b->size = 0;
    b->data = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!b->data) return refuse(node, "no memory for the rows");
    b->size = size;
  }
  *(void **)data = b->data;
  return NULL;
}

static OrtStatus *reserve_rows(kernel *node, int32_t which, int64_t n_rows, int64_t width, float **rows) {
  return reserve(node, which, (size_t)(n_rows * width) * sizeof **rows, rows);
}

/* The rows that the linear reads: of `x`, normalized, quantized. */
static OrtStatus *prepare_rows(kernel *node, const step *s, int32_t n_rows, const float *x,
                               const void **rows) {
  ds_pool *pool = node->owner->pool;
  bool quantizes = s->linear.format >= DS_INT8;
  int32_t k = s->linear.k;
  void *out = NULL;
  *rows = x;
  if (!quantizes && !s->norm_weight) return NULL;
  int64_t stride = quantizes ? ds_int8_stride(k) : k * (int64_t)sizeof *x;
  TRY(reserve(node, ROWS, (size_t)(n_rows * stride), &out));
  *rows = out;
  if (!s->norm_weight) return report(node, ds_quantize_rows(pool, n_rows, k, x, 0, out));
  return report(node, ds_norm_rows(pool, (int32_t)node->norm, n_rows, k, x, s->norm_weight, s->norm_bias,
                                   node->epsilon, quantizes ? NULL : out, 0, quantizes ? out : NULL));
}

static bool screens(const ds_operators *owner, const step *s) {
  return owner->wants_leaders && s->screen.error;
}

static const ds_linear *find_next(const ds_operators *owner, const step *s) {
  const step *next = s->next;
  while (next && skips(owner, next->sublayer)) next = next->next;
  if (!next || !next->linear.weight) return NULL;
  return screens(owner, next) ? &next->screen.copy : &next->linear;
}

/* Calls read a few outputs' weights each, mostly others than the last did: in time the process would have all. */
static void forget_refined(ds_operators *owner, int64_t n_read) {
  owner->n_read += n_read;
  if (owner->n_read < FORGET_BYTES) return;
  ds_forget_pages(owner->refined);
  owner->n_read = 0;
}

static OrtStatus *run_screened(kernel *node, const step *s, int32_t n_rows, const float *x, float *y,
                               float *peaks) {
  ds_operators *owner = node->owner;
  int64_t n_bytes = ds_screen_bytes(&s->linear, n_rows);
  void *memory = NULL;
  if (n_bytes < 0) return report(node, (int32_t)n_bytes);
  TRY(reserve(node, SCREENING, (size_t)n_bytes, &memory));
  int32_t n_refined = ds_linear_screened(owner->pool, &s->linear, &s->screen, n_rows, x, memory, y, peaks);
  if (n_refined < 0) return report(node, n_refined);
  forget_refined(owner, n_refined * ds_weight_bytes(&s->linear) * DS_PEAK_WIDTH / s->linear.n);
  return NULL;
}

/* y = the linear of x, plus the residual, and its peaks, if not NULL. */
static OrtStatus *run_step(kernel *node, const step *s, int32_t n_rows, const float *x, const float *residual,
                           float *y, float *peaks) {
  const void *rows = NULL;
  TRY(prepare_rows(node, s, n_rows, x, &rows));
  if (!residual && screens(node->owner, s)) return run_screened(node, s, n_rows, rows, y, peaks);
  const ds_linear *next = find_next(node->owner, s);
  return report(node,
                s->linear.format >= DS_INT8
                    ? ds_linear_int8(node->owner->pool, &s->linear, n_rows, rows, residual, y, peaks, next)
                    : ds_linear_float(node->owner->pool, &s->linear, n_rows, rows, residual, y, peaks, next));
}

/* What a skipped node gives: `from`, or zeros. */
static OrtStatus *pass_on(const float *from, int64_t count, float *y) {
  size_t n_bytes = (size_t)count * sizeof *y;
  if (from)
    memcpy(y, from, n_bytes);
  else
    memset(y, 0, n_bytes);
  return NULL;
}

static OrtStatus *read_linear(kernel *node, const OrtKernelInfo *info) {
  TRY(read_sublayer(node, info, 1));
  TRY(read_norm(node, info));
  read_newer(node, info, "straight", 0, &node->owner->n_straight);
  return read_step(node, info, "", node->sublayer, &node->steps[0]);
}

static OrtStatus *compute_linear(kernel *node, OrtKernelContext *context) {
  step *s = &node->steps[0];
  tensor x;
  const float *residual;
  float *y;
  if (!s->linear.weight) TRY(find_screen(node, context, 2 + STEP_INPUTS, s));
  TRY(find_constants(node, context, 1, s));
  TRY(read_rows(node, context, s->linear.k, &x));
  TRY(read_data(node, context, 1 + STEP_INPUTS, count_rows(&x) * (int64_t)s->linear.n, &residual));
  TRY(make_rows(node, context, &x, s->linear.n, &y));
  if (skips(node->owner, s->sublayer)) return pass_on(residual, count_rows(&x) * (int64_t)s->linear.n, y);
  return run_step(node, s, count_rows(&x), x.data, residual, y, NULL);
}

static OrtStatus *read_embed(kernel *node, const OrtKernelInfo *info) {
  ds_linear *shape = &node->steps[0].linear;
  TRY(read_int(node, info, "", "n", &shape->n));
  TRY(read_int(node, info, "", "k", &shape->k));
  read_newer(node, info, "format", DS_FLOAT32, &shape->format);
  return node->api->KernelInfoGetAttribute_float(info, "multiplier", &node->multiplier);
}

static OrtStatus *find_table(kernel *node, OrtKernelContext *context) {
  const OrtApi *api = node->api;
  ds_linear *shape = &node->steps[0].linear;
  const OrtValue *value = NULL;
  OrtTensorInfo *info = NULL;
  if (node->table) return NULL;
  TRY(api->KernelContext_GetInput(context, 1, &value));
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus *status = api->GetTensorElementType(info, &node->table_type);
  api->ReleaseTensorTypeAndShapeInfo(info);
  TRY(status);
  if (node->table_type == ORT_UINT8) {
    TRY(find_weights(node, context, 1, true, shape));
    node->table = shape->weight;
    return NULL;
  }
  if (node->table_type != ORT_FLOAT && node->table_type != ORT_BFLOAT16)
    return refuse(node, "its table is neither packed nor of float32 or bfloat16");
  return read_data(node, context, 1, (int64_t)shape->n * shape->k, &node->table);
}

/* Rows of a table [n, k]. */
static OrtStatus *look_up(const kernel *node, int32_t n_rows, const int64_t *ids, float *x) {
  const ds_linear *shape = &node->steps[0].linear;
  int64_t k = shape->k;
  for (int32_t r = 0; r < n_rows; ++r, x += k) {
    if (ids[r] < 0 || ids[r] >= shape->n) return refuse(node, "a token is not one of its table");
    const float *wide = (const float *)node->table + ids[r] * k;
    const uint16_t *narrow = (const uint16_t *)node->table + ids[r] * k;
    for (int64_t i = 0; i < k; ++i) {
      float value;
      uint32_t bits = (uint32_t)narrow[i] << 16;
      if (node->table_type == ORT_FLOAT)
        value = wide[i];
      else
        memcpy(&value, &bits, sizeof value);
      x[i] = node->multiplier * value;
    }
  }
  return NULL;
}

static OrtStatus *run_embed(const kernel *node, int32_t n_rows, const int64_t *ids, float *x) {
  if (node->table_type != ORT_UINT8) return look_up(node, n_rows, ids, x);
  return report(node, ds_embed(&node->steps[0].linear, n_rows, ids, node->multiplier, x));
}

static OrtStatus *compute_embed(kernel *node, OrtKernelContext *context) {
  tensor ids;
  float *x;
  TRY(find_table(node, context));
  TRY(read_tensor(node, context, 0, 2, &ids));
  TRY(make_rows(node, context, &ids, node->steps[0].linear.k, &x));
  return run_embed(node, count_rows(&ids), ids.data, x);
}

static OrtStatus *read_norm_node(kernel *node, const OrtKernelInfo *info) {
  TRY(read_sublayer(node, info, 1));
  return read_norm(node, info);
}

static OrtStatus *compute_norm(kernel *node, OrtKernelContext *context) {
  tensor x, weight;
  const float *bias;
  float *y;
  TRY(read_tensor(node, context, 1, 1, &weight));
  TRY(read_rows(node, context, weight.dims[0], &x));
  TRY(read_data(node, context, 2, weight.dims[0], &bias));
  TRY(make_rows(node, context, &x, weight.dims[0], &y));
  if (skips(node->owner, node->sublayer)) return pass_on(NULL, count_rows(&x) * weight.dims[0], y);
  return report(node,
                ds_norm_rows(node->owner->pool, (int32_t)node->norm, count_rows(&x), (int32_t)weight.dims[0],
                             x.data, weight.data, bias, node->epsilon, y, 0, NULL));
}

static OrtStatus *read_spread(kernel *node, const OrtKernelInfo *info) {
  TRY(node->api->KernelInfoGetAttribute_int64(info, "n", &node->width));
  return node->width >= 1 && node->width <= INT32_MAX ? NULL : refuse(node, "its width is not one");
}

static OrtStatus *compute_spread(kernel *node, OrtKernelContext *context) {
  tensor x, ids;
  float *y;
  TRY(read_tensor(node, context, 1, 1, &ids));
  TRY(read_rows(node, context, ids.dims[0], &x));
  TRY(make_rows(node, context, &x, node->width, &y));
  const int64_t *to = ids.data, n_ids = ids.dims[0];
  bool within = true;
  for (int64_t i = 0; i < n_ids; ++i) within &= (uint64_t)to[i] < (uint64_t)node->width;
  if (!within) return refuse(node, "an id is not below its width");
  for (int64_t r = 0; r < count_rows(&x); ++r, y += node->width) {
    const float *row = (const float *)x.data + r * n_ids;
    for (int64_t i = 0; i < node->width; ++i) y[i] = -INFINITY;
    for (int64_t i = 0; i < n_ids; ++i) y[to[i]] = row[i];
  }
  return NULL;
}

/* ---- Attention ------------------------------------------------------------------------------------------- */

static OrtStatus *read_window(kernel *node, const OrtKernelInfo *info) {
  return node->api->KernelInfoGetAttribute_int64(info, "window", &node->window);
}

static OrtStatus *compute_list_slots(kernel *node, OrtKernelContext *context) {
  tensor mask;
  int32_t *slots, *counts;
  TRY(read_tensor(node, context, 0, 4, &mask));
  if (mask.dims[1] != 1) return refuse(node, "the mask is not the same for all heads");
  int64_t dims[3] = {mask.dims[0], mask.dims[2], mask.dims[3]};
  TRY(make_output(node, context, 0, 3, dims, &slots));
  TRY(make_output(node, context, 1, 2, dims, &counts));
  return report(node, ds_list_slots((int32_t)(dims[0] * dims[1]), (int32_t)dims[2], mask.data,
                                    (int32_t)node->window, slots, counts));
}

static OrtStatus *read_heads(kernel *node, const OrtKernelInfo *info) {
  int64_t n_heads;
  TRY(node->api->KernelInfoGetAttribute_int64(info, "num_heads", &n_heads));
  TRY(node->api->KernelInfoGetAttribute_float(info, "scale", &node->heads.scale));
  TRY(node->api->KernelInfoGetAttribute_float(info, "epsilon", &node->heads.norm_eps));
  node->heads.n_heads = (int32_t)n_heads;
  int32_t cache_type;
  read_newer(node, info, "cache_type", DS_CACHE_FLOAT32, &cache_type);
  if (cache_type != DS_CACHE_FLOAT32 && cache_type != DS_CACHE_BFLOAT16)
    return refuse(
        node, "its cache_type is neither 0 nor 1 (float32, bfloat16): the graph is damaged, or of a newer "
              "version of draftsmith");
  if (node->owner->attends && node->owner->cache_type != cache_type)
    return refuse(node, "its cache_type is not that of the nodes before it: export the graph again");
  node->owner->cache_type = cache_type;
  node->owner->attends = true;
  return NULL;
}

static OrtStatus *read_attend(kernel *node, const OrtKernelInfo *info) {
  TRY(read_sublayer(node, info, 1));
  return read_heads(node, info);
}

/* Rotary tables and norms of heads: inputs 7 to 10. */
static OrtStatus *find_head_constants(kernel *node, OrtKernelContext *context, int64_t head_dim) {
  ds_heads *heads = &node->heads;
  int64_t size;
  if (node->known_head_dim == head_dim) return NULL;
  TRY(read_part(node, context, 7, &heads->cos, &size));
  if (heads->cos) {
    tensor cos;
    TRY(read_tensor(node, context, 7, 2, &cos));
    heads->n_positions = cos.dims[0];
    heads->n_rotary = (int32_t)(2 * cos.dims[1]);
    TRY(read_data(node, context, 8, size, &heads->sin));
  }
  TRY(read_data(node, context, 9, head_dim, &heads->q_norm));
  TRY(read_data(node, context, 10, head_dim, &heads->k_norm));
  node->known_head_dim = head_dim;
  return NULL;
}

/* What attention reads beside the queries, keys and values of the new rows. */
typedef struct {
  int64_t batch, n_rows;                  /* of each sequence */
  const int64_t *positions, *write_index; /* [batch, n_rows], [batch] */
  const int32_t *slots, *counts;          /* [batch, n_rows, max_slots], [batch, n_rows] */
  bool is_listed;      /* whether these were listed here, so that nothing is wrong with them */
  char *keys, *values; /* where the new ones are written */
} context_of_rows;

static void set_cache(ds_heads *heads, int32_t type, int64_t n_kv_heads, int64_t n_slots, int64_t head_dim) {
  heads->cache_type = type;
  heads->n_kv_heads = (int32_t)n_kv_heads;
  heads->max_slots = (int32_t)n_slots;
  heads->head_dim = (int32_t)head_dim;
}

/* The caches of the graph: inputs 5 and 6, and outputs 1 and 2, which hold what those held before. */
static OrtStatus *pass_caches(kernel *node, OrtKernelContext *context, int64_t batch, context_of_rows *c) {
  tensor keys, values;
  TRY(read_tensor(node, context, 5, 4, &keys));
  TRY(read_tensor(node, context, 6, 4, &values));
  if (memcmp(keys.dims, values.dims, sizeof keys.dims)) return refuse(node, "keys and values are not alike");
  if (keys.dims[0] != batch) return refuse(node, "the inputs do not fit each other");
  size_t n_bytes = sizeof(float);
  for (int i = 0; i < 4; ++i) n_bytes *= (size_t)keys.dims[i];
  TRY(make_output(node, context, 1, 4, keys.dims, &c->keys));
  TRY(make_output(node, context, 2, 4, keys.dims, &c->values));
  if (c->keys != keys.data) memcpy(c->keys, keys.data, n_bytes);
  if (c->values != values.data) memcpy(c->values, values.data, n_bytes);
  set_cache(&node->heads, DS_CACHE_FLOAT32, keys.dims[1], keys.dims[2], keys.dims[3]);
  return NULL;
}

static void find_lent(kernel *node, const ds_cache *lent, context_of_rows *c) {
  int32_t layer = node->sublayer / 2;
  c->keys = ds_find_part(lent, 2 * layer);
  c->values = ds_find_part(lent, 2 * layer + 1);
  set_cache(&node->heads, lent->type, lent->n_kv_heads, lent->n_slots, lent->head_dim);
}

static OrtStatus *read_context(kernel *node, OrtKernelContext *context, const int64_t *dims,
                               context_of_rows *c) {
  const ds_cache *lent = node->owner->lent;
  tensor positions, slots;
  if (lent && (dims[0] != 1 || node->sublayer == NO_SUBLAYER))
    return refuse(node, "the cache that is lent is for one sequence and nodes that number their sublayers");
  if (lent)
    find_lent(node, lent, c);
  else
    TRY(pass_caches(node, context, dims[0], c));
  TRY(find_head_constants(node, context, node->heads.head_dim));
  TRY(read_tensor(node, context, 1, 2, &positions));
  TRY(read_data(node, context, 2, dims[0], &c->write_index));
  TRY(read_tensor(node, context, 3, 3, &slots));
  TRY(read_data(node, context, 4, dims[0] * dims[1], &c->counts));
  if (memcmp(positions.dims, dims, 2 * sizeof *dims) || memcmp(slots.dims, dims, 2 * sizeof *dims) ||
      slots.dims[2] != node->heads.max_slots)
    return refuse(node, "the inputs do not fit each other");
  c->batch = dims[0];
  c->n_rows = dims[1];
  c->positions = positions.data;
  c->slots = slots.data;
  c->is_listed = false;
  return NULL;
}

static int64_t count_attended(const ds_heads *heads) { return (int64_t)heads->n_heads * heads->head_dim; }
static int64_t count_projected(const ds_heads *heads) {
  return (heads->n_heads + 2 * (int64_t)heads->n_kv_heads) * heads->head_dim;
}

/* y [B, S, heads * D] from qkv [B, S, (heads + 2 kv heads) * D], which is overwritten. */
static OrtStatus *attend(kernel *node, const context_of_rows *c, float *qkv, float *y) {
  const ds_heads *heads = &node->heads;
  ds_pool *pool = node->owner->pool;
  int64_t n_rows = c->n_rows;
  int64_t n_bytes = (int64_t)heads->n_kv_heads * heads->max_slots * heads->head_dim;
  n_bytes *= ds_element_bytes(heads->cache_type);
  char *keys = c->keys, *values = c->values;
  for (int64_t b = 0; b < c->batch; ++b, keys += n_bytes, values += n_bytes) {
    float *x = qkv + b * n_rows * count_projected(heads);
    if (c->write_index[b] < 0 || c->write_index[b] > heads->max_slots)
      return refuse(node, "write_index is not a slot of the cache");
    int32_t status = ds_write_heads(pool, heads, (int32_t)n_rows, x, c->positions + b * n_rows,
                                    (int32_t)c->write_index[b], keys, values);
    if (status == DS_OK)
      status = (c->is_listed ? ds_attend_listed : ds_attend)(
          pool, heads, (int32_t)n_rows, x, c->slots + b * n_rows * heads->max_slots, c->counts + b * n_rows,
          keys, values, y + b * n_rows * count_attended(heads));
    TRY(report(node, status));
  }
  return NULL;
}

static OrtStatus *compute_attend(kernel *node, OrtKernelContext *context) {
  tensor qkv;
  context_of_rows around;
  float *y;
  TRY(read_tensor(node, context, 0, 3, &qkv));
  TRY(read_context(node, context, qkv.dims, &around));
  if (qkv.dims[2] != count_projected(&node->heads))
    return refuse(node, "rows have the wrong width for the heads");
  TRY(make_rows(node, context, &qkv, count_attended(&node->heads), &y));
  if (skips(node->owner, node->sublayer))
    return pass_on(NULL, count_rows(&qkv) * count_attended(&node->heads), y);
  return attend(node, &around, qkv.data, y);
}

/* ---- A decoder layer ------------------------------------------------------------------------------------- */

static OrtStatus *read_layer(kernel *node, const OrtKernelInfo *info) {
  static const char *const prefixes[N_STEPS] = {"qkv_", "o_", "up_", "down_"};
  TRY(read_sublayer(node, info, 2));
  TRY(read_heads(node, info));
  TRY(read_norm(node, info));
  for (int i = 0; i < N_STEPS; ++i) {
    int32_t own = node->sublayer == NO_SUBLAYER ? NO_SUBLAYER : node->sublayer + (i >= UP);
    TRY(read_step(node, info, prefixes[i], own, &node->steps[i]));
  }
  return NULL;
}

/* y = the layer of x, which may be x itself. */
static OrtStatus *run_layer(kernel *node, int32_t n_rows, float *x, const context_of_rows *around, float *y) {
  const step *s = node->steps;
  int32_t width = s[QKV].linear.k;
  float *qkv = NULL, *attended = NULL, *middle = x, *wide = NULL;
  if (!skips(node->owner, s[O].sublayer)) {
    TRY(reserve_rows(node, PROJECTED, n_rows, s[QKV].linear.n, &qkv));
    TRY(reserve_rows(node, ATTENDED, n_rows, s[O].linear.k, &attended));
    TRY(reserve_rows(node, MIDDLE, n_rows, width, &middle));
    TRY(run_step(node, &s[QKV], n_rows, x, NULL, qkv, NULL));
    TRY(attend(node, around, qkv, attended));
    TRY(run_step(node, &s[O], n_rows, attended, x, middle, NULL));
  }
  if (skips(node->owner, s[DOWN].sublayer))
    return middle == y ? NULL : pass_on(middle, (int64_t)n_rows * width, y);
  TRY(reserve_rows(node, WIDE, n_rows, s[UP].linear.n, &wide));
  TRY(run_step(node, &s[UP], n_rows, middle, NULL, wide, NULL));
  return run_step(node, &s[DOWN], n_rows, wide, middle, y, NULL);
}

static OrtStatus *compute_layer(kernel *node, OrtKernelContext *context) {
  step *s = node->steps;
  tensor x;
  context_of_rows around;
  float *y = NULL;
  for (size_t i = 0; i < N_STEPS; ++i)
    TRY(find_constants(node, context, FIRST_STEP + i * STEP_INPUTS, &s[i]));
  int32_t width = s[QKV].linear.k, inner = s[UP].linear.n;
  TRY(read_rows(node, context, width, &x));
  TRY(read_context(node, context, x.dims, &around));
  if (s[QKV].linear.n != count_projected(&node->heads) || s[O].linear.k != count_attended(&node->heads) ||
      s[O].linear.n != width || s[UP].linear.k != width || s[DOWN].linear.k != inner ||
      s[DOWN].linear.n != width)
    return refuse(node, "its linears do not fit each other");
  TRY(make_rows(node, context, &x, width, &y));
  return run_layer(node, count_rows(&x), x.data, &around, y);
}

/* ---- A straight graph ------------------------------------------------------------------------------------ */

bool ds_nodes_are_straight(const ds_operators *o) {
  int32_t n_layers = 0, width = 0;
  for (const kernel *layer = o->first[LAYER]; layer; layer = layer->next, ++n_layers) {
    if (layer->sublayer != 2 * n_layers || (width && layer->steps[QKV].linear.k != width)) return false;
    width = layer->steps[QKV].linear.k;
  }
  const kernel *embed = o->first[EMBED], *head = o->last[LINEAR_NODE], *list = o->first[LIST_SLOTS];
  return n_layers && n_layers == o->n_straight && o->n_nodes == n_layers + 3 && embed && list && head &&
         embed->steps[0].linear.k == width && head->steps[0].linear.k == width;
}

OrtStatus *ds_run_straight(ds_operators *o, const ds_operators_call *call, float *logits, float *peaks) {
  kernel *embed = o->first[EMBED], *list = o->first[LIST_SLOTS], *head = o->last[LINEAR_NODE];
  const step *last = &head->steps[0];
  int32_t n_rows = call->n_rows, n_slots = o->lent->n_slots, width = last->linear.k;
  float *x = NULL;
  int32_t *slots = NULL;
  TRY(reserve_rows(embed, STREAM, n_rows, width, &x));
  TRY(reserve(list, SLOTS, (size_t)n_rows * ((size_t)n_slots + 1) * sizeof *slots, &slots));
  int32_t *counts = slots + (int64_t)n_rows * n_slots;
  TRY(report(list, ds_list_slots(n_rows, n_slots, call->mask, (int32_t)list->window, slots, counts)));
  TRY(run_embed(embed, n_rows, call->ids, x));
  context_of_rows around = {.batch = 1,
                            .n_rows = n_rows,
                            .positions = call->positions,
                            .write_index = &call->write_index,
                            .slots = slots,
                            .counts = counts,
                            .is_listed = true};
  for (kernel *layer = o->first[LAYER]; layer; layer = layer->next) {
    find_lent(layer, o->lent, &around);
    TRY(run_layer(layer, n_rows, x, &around, x));
  }
  return run_step(head, last, call->n_logits, x + (int64_t)(n_rows - call->n_logits) * width, NULL, logits,
                  peaks);
}

/* ---- Weights in huge pages --------------------------------------------------------------------------------- */

typedef struct {
  char *to;
  const char *from;
  size_t n_bytes;
} copy_job;

enum { COPY_BYTES = 256 << 10, LINE = 64 };

static void copy_part(const void *argument, int32_t item, int32_t next, int32_t thread) {
  (void)next, (void)thread;
  const copy_job *job = argument;
  size_t at = (size_t)item * COPY_BYTES, left = job->n_bytes - at;
  memcpy(job->to + at, job->from + at, left < COPY_BYTES ? left : COPY_BYTES);
}

/* What is read whole in most calls: of a linear with a screen that is the screen. */
static ds_linear *find_held(step *s) { return s->screen.error ? &s->screen.copy : &s->linear; }

static size_t find_room(const ds_linear *linear) {
  return ((size_t)ds_weight_bytes(linear) + LINE - 1) / LINE * LINE;
}

/* A table of embeddings may be the weight of a linear too. */
static void follow_table(ds_operators *o, const void *from, const void *to) {
  for (kernel *embed = o->first[EMBED]; embed; embed = embed->next) {
    if (embed->table == from) embed->table = to;
    if (embed->steps[0].linear.weight == from) embed->steps[0].linear.weight = to;
  }
}

/* Part by part, so that the process never has much of it twice. */
static void copy_weights(ds_pool *pool, const ds_file_map *files, char *to, const char *from,
                         size_t n_bytes) {
  for (size_t at = 0, n; at < n_bytes; at += n) {
    n = n_bytes - at < FORGET_BYTES ? n_bytes - at : FORGET_BYTES;
    copy_job job = {to + at, from + at, n};
    ds_pool_run(pool, copy_part, &job, (int32_t)((n + COPY_BYTES - 1) / COPY_BYTES));
    ds_forget_pages(ds_find_file_pages(files, (ds_span){from + at, n}));
  }
}

/* A walk through the tables of small pages for every 4 KiB of weights makes calls of 1 to 8 rows take a tenth longer
 * on some virtual machines. */
void ds_hold_weights(ds_operators *o) {
  size_t room = 0;
  step *first = o->last_step;
  for (step *s = first; s; s = s->before) {
    room += find_room(find_held(s));
    first = s;
  }
  o->held = ds_take_pages(room);
  if (!o->held) return;
  o->n_held = room;
  char *to = o->held;
  ds_file_map files;
  ds_list_files(&files);
  for (step *s = first; s; s = s->next) {
    ds_linear *linear = find_held(s);
    const char *from = linear->weight;
    copy_weights(o->pool, &files, to, from, (size_t)ds_weight_bytes(linear));
    if (linear != &s->linear) { /* its screen is: a first call that wanted all outputs has read it */
      ds_span whole = {s->linear.weight, (size_t)ds_weight_bytes(&s->linear)};
      o->refined = ds_find_file_pages(&files, whole);
      ds_forget_pages(o->refined);
    }
    linear->weight = to;
    follow_table(o, from, to);
    to += find_room(linear);
  }
  free(files.parts);
}

/* ---- All of them ------------------------------------------------------------------------------------------ */

#define ROWS_AROUND "LLIIFFffff"
#define LINEAR "Uflfff"

const operator_kind ds_node_kinds[N_KINDS] = {
    [EMBED] = {"Embed", "L?", "F", read_embed, compute_embed},
    [LINEAR_NODE] = {"Linear", "F" LINEAR "fuff", "F", read_linear, compute_linear},
    [NORM] = {"Norm", "FFf", "F", read_norm_node, compute_norm},
    [SPREAD] = {"Spread", "FL", "F", read_spread, compute_spread},
    [LIST_SLOTS] = {"ListSlots", "B", "II", read_window, compute_list_slots},
    [ATTEND] = {"Attend", "F" ROWS_AROUND, "FFF", read_attend, compute_attend},
    [LAYER] = {"Layer", "F" ROWS_AROUND LINEAR LINEAR LINEAR LINEAR, "FFF", read_layer, compute_layer},
};
