/* The kernels as operators of ONNX Runtime, domain "draftsmith", for graphs that `export` writes.
 *
 * Activations are [B, S, width], in float32 or as quantized rows (uint8 [B, S, ds_int8_stride(k)]). Weights
 * are constants in the packed formats of kernels.h, as bytes. Inputs in brackets may be missing.
 *
 *   Embed        ids int64 [B, S], weight                              -> x
 *                  n, k, format; multiplier
 *   Norm         x, weight [, bias]                                    -> y
 *   NormQuantize x, weight [, bias]                                    -> rows
 *                  norm (enum ds_norm), epsilon
 *   Quantize     x                                                     -> rows
 *   LinearFloat  x, weight [, bias, residual]                          -> y
 *   LinearInt8   rows, weight, scale [, bias, residual, starts]        -> y
 *                  n, k, format, activation (enum ds_activation)
 *   ListSlots    attention_mask bool [B, 1, S, S_max]                  -> slots int32 [B, S, S_max], counts [B, S]
 *                  window: of the slots that a row sees, only its last `window`; 0 for all
 *   Attend       qkv, position_ids, write_index, slots, counts, past_key, past_value [, cos, sin, q_norm, k_norm]
 *                                                                      -> y, present_key, present_value
 *                  num_heads, scale, epsilon (of the norms)
 *                Overwrites qkv, which nobody else may read. Writes the cache in place where past and present are
 *                the same memory.
 */
#include "operators.h"
#include "dispatch.h"
#include "error.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_INPUTS = 11, MAX_OUTPUTS = 3, MAX_DIMS = 4 };

typedef struct kernel kernel;

/* What distinguishes one operator from another. Inputs from `n_required` on may be missing. */
typedef struct {
  const char *name;
  int32_t n_inputs, n_required, n_outputs;
  OrtElementType inputs[MAX_INPUTS], outputs[MAX_OUTPUTS];
  OrtStatus *(*read_attributes)(kernel *, const OrtKernelInfo *);
  OrtStatus *(*compute)(kernel *, OrtKernelContext *);
} operator_kind;

/* ONNX Runtime's table comes first: it hands its address to the functions in it. */
typedef struct {
  OrtCustomOp table;
  const operator_kind *kind;
  ds_operators *owner;
} operator;

/* A node of a graph. */
struct kernel {
  const OrtApi *api;
  const operator_kind *kind;
  ds_operators *owner;
  ds_linear linear;
  kernel *before, *next; /* the linears before and after this one in the graph */
  ds_heads heads;
  int64_t norm, window;
  float epsilon, multiplier;
};

enum { N_KINDS = 8 };

struct ds_operators {
  const OrtApi *api;
  ds_pool *pool;
  OrtCustomOpDomain *domain;
  kernel *last_linear; /* of those created so far; nodes are created in the order in which they run */
  operator operators[N_KINDS];
};

/* ---- What a node is given -------------------------------------------------------------------------------- */

#define TRY(call)                                                                                            \
  do {                                                                                                       \
    OrtStatus *failed = (call);                                                                              \
    if (failed) return failed;                                                                               \
  } while (0)

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

static OrtStatus *read_linear(kernel *node, const OrtKernelInfo *info) {
  const struct {
    const char *name;
    int32_t *to;
  } wanted[] = {{"n", &node->linear.n}, {"k", &node->linear.k}, {"format", &node->linear.format}};
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; ++i) {
    int64_t value;
    TRY(node->api->KernelInfoGetAttribute_int64(info, wanted[i].name, &value));
    *wanted[i].to = (int32_t)value;
  }
  return NULL;
}

static OrtStatus *read_product(kernel *node, const OrtKernelInfo *info) {
  int64_t activation;
  TRY(read_linear(node, info));
  TRY(node->api->KernelInfoGetAttribute_int64(info, "activation", &activation));
  node->linear.activation = (int32_t)activation;
  node->before = node->owner->last_linear;
  if (node->before) node->before->next = node;
  node->owner->last_linear = node;
  return NULL;
}

/* Other nodes than linears have no neighbours. */
static void unlink_linear(kernel *node) {
  if (node->before) node->before->next = node->next;
  if (node->next) node->next->before = node->before;
  if (node->owner->last_linear == node) node->owner->last_linear = node->before;
}

/* The weight is known from a node's first run on. */
static const ds_linear *linear_after(const kernel *node) {
  return node->next && node->next->linear.weight ? &node->next->linear : NULL;
}

/* Weight, scale, bias and starts, at these inputs; a negative one is none. Constants stay where they are, so
 * what has been checked once is not checked again. */
static OrtStatus *read_weights(kernel *node, OrtKernelContext *context, int scale, int bias, int starts) {
  ds_linear found = node->linear;
  ds_part_sizes sizes = {0};
  TRY(read_part(node, context, 1, &found.weight, &sizes.weight));
  if (scale >= 0) TRY(read_part(node, context, (size_t)scale, &found.scale, &sizes.scale));
  if (bias >= 0) TRY(read_part(node, context, (size_t)bias, &found.bias, &sizes.bias));
  if (starts >= 0) TRY(read_part(node, context, (size_t)starts, &found.starts, &sizes.starts));
  if (memcmp(&found, &node->linear, sizeof found)) TRY(report(node, ds_check_parts(&found, &sizes)));
  node->linear = found;
  return NULL;
}

static OrtStatus *compute_linear_float(kernel *node, OrtKernelContext *context) {
  tensor x;
  const float *residual;
  float *y;
  TRY(read_weights(node, context, -1, 2, -1));
  TRY(read_rows(node, context, node->linear.k, &x));
  TRY(read_data(node, context, 3, count_rows(&x) * (int64_t)node->linear.n, &residual));
  TRY(make_rows(node, context, &x, node->linear.n, &y));
  return report(node, ds_linear_float(node->owner->pool, &node->linear, count_rows(&x), x.data, residual, y,
                                      linear_after(node)));
}

static OrtStatus *compute_linear_int8(kernel *node, OrtKernelContext *context) {
  tensor rows;
  const float *residual;
  float *y;
  TRY(read_weights(node, context, 2, 3, 5));
  TRY(read_rows(node, context, ds_int8_stride(node->linear.k), &rows));
  TRY(read_data(node, context, 4, count_rows(&rows) * (int64_t)node->linear.n, &residual));
  TRY(make_rows(node, context, &rows, node->linear.n, &y));
  return report(node, ds_linear_int8(node->owner->pool, &node->linear, count_rows(&rows), rows.data, residual,
                                     y, linear_after(node)));
}

static OrtStatus *read_embed(kernel *node, const OrtKernelInfo *info) {
  TRY(read_linear(node, info));
  return node->api->KernelInfoGetAttribute_float(info, "multiplier", &node->multiplier);
}

static OrtStatus *compute_embed(kernel *node, OrtKernelContext *context) {
  tensor ids;
  float *x;
  TRY(read_tensor(node, context, 0, 2, &ids));
  TRY(read_weights(node, context, -1, -1, -1));
  TRY(make_rows(node, context, &ids, node->linear.k, &x));
  return report(node, ds_embed(&node->linear, count_rows(&ids), ids.data, node->multiplier, x));
}

/* ---- Rows ------------------------------------------------------------------------------------------------ */

static OrtStatus *read_norm(kernel *node, const OrtKernelInfo *info) {
  TRY(node->api->KernelInfoGetAttribute_int64(info, "norm", &node->norm));
  return node->api->KernelInfoGetAttribute_float(info, "epsilon", &node->epsilon);
}

static OrtStatus *normalize(kernel *node, OrtKernelContext *context, bool quantize) {
  tensor x, weight;
  const float *bias;
  void *out;
  TRY(read_tensor(node, context, 1, 1, &weight));
  TRY(read_rows(node, context, weight.dims[0], &x));
  TRY(read_data(node, context, 2, weight.dims[0], &bias));
  int32_t k = (int32_t)weight.dims[0];
  TRY(make_rows(node, context, &x, quantize ? ds_int8_stride(k) : k, &out));
  return report(node,
                ds_norm_rows(node->owner->pool, (int32_t)node->norm, count_rows(&x), k, x.data, weight.data,
                             bias, node->epsilon, quantize ? NULL : out, 0, quantize ? out : NULL));
}

static OrtStatus *compute_norm(kernel *node, OrtKernelContext *context) {
  return normalize(node, context, false);
}
static OrtStatus *compute_norm_quantize(kernel *node, OrtKernelContext *context) {
  return normalize(node, context, true);
}

static OrtStatus *compute_quantize(kernel *node, OrtKernelContext *context) {
  tensor x;
  void *rows;
  TRY(read_tensor(node, context, 0, 3, &x));
  int32_t k = (int32_t)x.dims[2];
  TRY(make_rows(node, context, &x, ds_int8_stride(k), &rows));
  return report(node, ds_quantize_rows(node->owner->pool, count_rows(&x), k, x.data, 0, rows));
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

static OrtStatus *read_attend(kernel *node, const OrtKernelInfo *info) {
  int64_t n_heads;
  TRY(node->api->KernelInfoGetAttribute_int64(info, "num_heads", &n_heads));
  TRY(node->api->KernelInfoGetAttribute_float(info, "scale", &node->heads.scale));
  TRY(node->api->KernelInfoGetAttribute_float(info, "epsilon", &node->heads.norm_eps));
  node->heads.n_heads = (int32_t)n_heads;
  return NULL;
}

static OrtStatus *read_rotary(kernel *node, OrtKernelContext *context) {
  ds_heads *heads = &node->heads;
  int64_t size;
  TRY(read_part(node, context, 7, &heads->cos, &size));
  if (!heads->cos) return NULL;
  tensor cos;
  TRY(read_tensor(node, context, 7, 2, &cos));
  heads->n_positions = cos.dims[0];
  heads->n_rotary = (int32_t)(2 * cos.dims[1]);
  return read_data(node, context, 8, size, &heads->sin);
}

static OrtStatus *compute_attend(kernel *node, OrtKernelContext *context) {
  ds_heads *heads = &node->heads;
  tensor qkv, positions, slots, past_keys, past_values;
  const int64_t *write_index;
  const int32_t *counts;
  float *y, *keys, *values;
  TRY(read_tensor(node, context, 0, 3, &qkv));
  TRY(read_tensor(node, context, 1, 2, &positions));
  int64_t n_sequences = qkv.dims[0], n_rows = qkv.dims[1];
  TRY(read_data(node, context, 2, n_sequences, &write_index));
  TRY(read_tensor(node, context, 3, 3, &slots));
  TRY(read_data(node, context, 4, n_sequences * n_rows, &counts));
  TRY(read_tensor(node, context, 5, 4, &past_keys));
  TRY(read_tensor(node, context, 6, 4, &past_values));
  TRY(read_rotary(node, context));
  int64_t size = past_keys.dims[3];
  TRY(read_data(node, context, 9, size, &heads->q_norm));
  TRY(read_data(node, context, 10, size, &heads->k_norm));
  heads->n_kv_heads = (int32_t)past_keys.dims[1];
  heads->max_slots = (int32_t)past_keys.dims[2];
  heads->head_dim = (int32_t)size;
  if (memcmp(past_keys.dims, past_values.dims, sizeof past_keys.dims))
    return refuse(node, "keys and values are not alike");
  if (past_keys.dims[0] != n_sequences || positions.dims[0] != n_sequences || positions.dims[1] != n_rows ||
      slots.dims[0] != n_sequences || slots.dims[1] != n_rows || slots.dims[2] != heads->max_slots ||
      qkv.dims[2] != (heads->n_heads + 2 * heads->n_kv_heads) * size)
    return refuse(node, "the inputs do not fit each other");
  TRY(make_rows(node, context, &qkv, heads->n_heads * size, &y));
  TRY(make_output(node, context, 1, 4, past_keys.dims, &keys));
  TRY(make_output(node, context, 2, 4, past_keys.dims, &values));

  int64_t cache_size = heads->n_kv_heads * heads->max_slots * size;
  size_t n_bytes = (size_t)(n_sequences * cache_size) * sizeof(float);
  if (keys != past_keys.data) memcpy(keys, past_keys.data, n_bytes);
  if (values != past_values.data) memcpy(values, past_values.data, n_bytes);
  for (int64_t b = 0; b < n_sequences; ++b) {
    float *x = (float *)qkv.data + b * n_rows * qkv.dims[2];
    float *own_keys = keys + b * cache_size, *own_values = values + b * cache_size;
    if (write_index[b] < 0 || write_index[b] > heads->max_slots)
      return refuse(node, "write_index is not a slot of the cache");
    int32_t status = ds_write_heads(node->owner->pool, heads, (int32_t)n_rows, x,
                                    (const int64_t *)positions.data + b * n_rows, (int32_t)write_index[b],
                                    own_keys, own_values);
    if (status == DS_OK)
      status = ds_attend(node->owner->pool, heads, (int32_t)n_rows, x,
                         (const int32_t *)slots.data + b * n_rows * heads->max_slots, counts + b * n_rows,
                         own_keys, own_values, y + b * n_rows * heads->n_heads * size);
    TRY(report(node, status));
  }
  return NULL;
}

/* ---- What ONNX Runtime asks ------------------------------------------------------------------------------ */

static const operator_kind KINDS[N_KINDS] = {
    {"Embed", 2, 2, 1, {ORT_INT64, ORT_UINT8}, {ORT_FLOAT}, read_embed, compute_embed},
    {"Norm", 3, 2, 1, {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT}, {ORT_FLOAT}, read_norm, compute_norm},
    {"NormQuantize",
     3,
     2,
     1,
     {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT},
     {ORT_UINT8},
     read_norm,
     compute_norm_quantize},
    {"Quantize", 1, 1, 1, {ORT_FLOAT}, {ORT_UINT8}, NULL, compute_quantize},
    {"LinearFloat",
     4,
     2,
     1,
     {ORT_FLOAT, ORT_UINT8, ORT_FLOAT, ORT_FLOAT},
     {ORT_FLOAT},
     read_product,
     compute_linear_float},
    {"LinearInt8",
     6,
     3,
     1,
     {ORT_UINT8, ORT_UINT8, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_INT64},
     {ORT_FLOAT},
     read_product,
     compute_linear_int8},
    {"ListSlots", 1, 1, 2, {ORT_BOOL}, {ORT_INT32, ORT_INT32}, read_window, compute_list_slots},
    {"Attend",
     11,
     7,
     3,
     {ORT_FLOAT, ORT_INT64, ORT_INT64, ORT_INT32, ORT_INT32, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT,
      ORT_FLOAT, ORT_FLOAT},
     {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT},
     read_attend,
     compute_attend},
};

static const operator_kind *kind_of(const OrtCustomOp *op) { return ((const operator *)op)->kind; }

static const char *get_name(const OrtCustomOp *op) { return kind_of(op)->name; }
static const char *get_provider(const OrtCustomOp *op) {
  (void)op;
  return NULL; /* the CPU */
}
static size_t get_n_inputs(const OrtCustomOp *op) { return (size_t)kind_of(op)->n_inputs; }
static size_t get_n_outputs(const OrtCustomOp *op) { return (size_t)kind_of(op)->n_outputs; }
static OrtElementType get_input(const OrtCustomOp *op, size_t i) { return kind_of(op)->inputs[i]; }
static OrtElementType get_output(const OrtCustomOp *op, size_t i) { return kind_of(op)->outputs[i]; }
static OrtCharacteristic get_input_need(const OrtCustomOp *op, size_t i) {
  return (int32_t)i < kind_of(op)->n_required ? ORT_REQUIRED : ORT_OPTIONAL;
}
static OrtCharacteristic get_output_need(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_REQUIRED;
}
static int get_memory(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_MEMORY_DEFAULT;
}
static int get_one(const OrtCustomOp *op) {
  (void)op;
  return 1;
}

static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                                void **created) {
  const operator *self = (const operator *)op;
  kernel *node = calloc(1, sizeof *node);
  if (!node) return api->CreateStatus(ORT_FAIL, "no memory for a node");
  *node = (kernel){.api = api, .kind = self->kind, .owner = self->owner};
  OrtStatus *status = self->kind->read_attributes ? self->kind->read_attributes(node, info) : NULL;
  if (status)
    free(node);
  else
    *created = node;
  return status;
}

static OrtStatus *compute_kernel(void *node, OrtKernelContext *context) {
  return ((kernel *)node)->kind->compute(node, context);
}

static void destroy_kernel(void *node) {
  unlink_linear(node);
  free(node);
}

static void fill_operator(operator *op, const operator_kind *kind, ds_operators *owner) {
  *op = (operator){
      .table = {.version = ORT_API_VERSION,
                .GetName = get_name,
                .GetExecutionProviderType = get_provider,
                .GetInputType = get_input,
                .GetInputTypeCount = get_n_inputs,
                .GetOutputType = get_output,
                .GetOutputTypeCount = get_n_outputs,
                .KernelDestroy = destroy_kernel,
                .GetInputCharacteristic = get_input_need,
                .GetOutputCharacteristic = get_output_need,
                .GetInputMemoryType = get_memory,
                .GetVariadicInputMinArity = get_one,
                .GetVariadicInputHomogeneity = get_one,
                .GetVariadicOutputMinArity = get_one,
                .GetVariadicOutputHomogeneity = get_one,
                .CreateKernelV2 = create_kernel,
                .KernelComputeV2 = compute_kernel,
                .GetStartVersion = get_one,
                .GetEndVersion = get_one},
      .kind = kind,
      .owner = owner,
  };
}

static OrtStatus *add_all(ds_operators *operators, OrtSessionOptions *options) {
  const OrtApi *api = operators->api;
  TRY(api->CreateCustomOpDomain("draftsmith", &operators->domain));
  for (int32_t i = 0; i < N_KINDS; ++i) {
    fill_operator(&operators->operators[i], &KINDS[i], operators);
    TRY(api->CustomOpDomain_Add(operators->domain, &operators->operators[i].table));
  }
  return api->AddCustomOpDomain(options, operators->domain);
}

int32_t ds_take_status(const OrtApi *api, OrtStatus *status) {
  if (!status) return DS_OK;
  ds_fail(DS_ERROR_ENGINE, "ONNX Runtime: %s", api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  return DS_ERROR_ENGINE;
}

ds_operators *ds_operators_add(const OrtApi *api, OrtSessionOptions *options, ds_pool *pool) {
  ds_operators *operators = calloc(1, sizeof *operators);
  if (!operators) {
    ds_fail(DS_ERROR_MEMORY, "no memory for operators");
    return NULL;
  }
  operators->api = api;
  operators->pool = pool;
  if (ds_take_status(api, add_all(operators, options)) == DS_OK) return operators;
  ds_operators_free(operators);
  return NULL;
}

void ds_operators_free(ds_operators *operators) {
  if (!operators) return;
  if (operators->domain) operators->api->ReleaseCustomOpDomain(operators->domain);
  free(operators);
}

/* For programs with a session of their own: ONNX Runtime's `register_custom_ops_library` calls this. They
 * share one pool of one thread; both live as long as the process. */
DS_API OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  static ds_pool *pool;
  const OrtApi *api = base->GetApi(ORT_API_VERSION);
  if (!pool) pool = ds_pool_create(1);
  if (!pool || !ds_operators_add(api, options, pool)) return api->CreateStatus(ORT_FAIL, ds_error_message());
  return NULL;
}
