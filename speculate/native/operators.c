/* The kernels as operators of ONNX Runtime, domain "draftsmith", for graphs that `export` writes.
 *
 * Activations are float32 [B, S, width]. Weights are constants in the packed formats of kernels.h, as bytes.
 * Inputs in brackets may be missing.
 *
 *   Embed      ids int64 [B, S], weight -> y
 *                n, k, format; multiplier
 *   Linear     x, weight [, scale, starts, bias, residual, norm weight, norm bias] -> y
 *                n, k, format, activation (enum ds_activation); norm (enum ds_norm), epsilon
 *              Rows are normalized first if there is a norm, and quantized if the weight is int8. One node for all
 *              of it, since each costs microseconds: the weights that pass through the caches take its own data
 *              with them.
 *   Norm       x, weight [, bias] -> y
 *                norm, epsilon
 *   ListSlots  attention_mask bool [B, 1, S, S_max] -> slots int32 [B, S, S_max], counts int32 [B, S]
 *                window: of the slots that a row sees, only its last `window`; 0 for all
 *   Attend     qkv, position_ids, write_index, slots, counts, past_key, past_value [, cos, sin, q_norm, k_norm]
 *                -> y, present_key, present_value
 *                num_heads, scale, epsilon (of the norms)
 *              Overwrites qkv, which nobody else may read. Writes the cache in place where past and present are
 *              the same memory.
 *
 * A node keeps what it reads between runs, and a session's nodes share memory: its runs must follow one another.
 */
#include "operators.h"
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
  const float *norm_weight, *norm_bias;
  ds_heads heads;
  int64_t norm, window;
  float epsilon, multiplier;
};

enum { N_KINDS = 5 };

/* Memory of a session that grows to what its largest call needs. */
typedef struct {
  void *data;
  size_t size;
} buffer;

struct ds_operators {
  const OrtApi *api;
  ds_pool *pool;
  OrtCustomOpDomain *domain;
  kernel *last_linear; /* of those created so far; nodes are created in the order in which they run */
  buffer rows;         /* normalized or quantized, on their way into a linear */
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

static OrtStatus *read_data(const kernel *node, OrtKernelContext *context, size_t index, void *data) {
  const OrtValue *value = NULL;
  TRY(node->api->KernelContext_GetInput(context, index, &value));
  *(void **)data = NULL;
  return value ? node->api->GetTensorMutableData((OrtValue *)value, data) : NULL;
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

static OrtStatus *read_norm(kernel *node, const OrtKernelInfo *info) {
  TRY(node->api->KernelInfoGetAttribute_int64(info, "norm", &node->norm));
  return node->api->KernelInfoGetAttribute_float(info, "epsilon", &node->epsilon);
}

static OrtStatus *read_product(kernel *node, const OrtKernelInfo *info) {
  int64_t activation;
  TRY(read_linear(node, info));
  TRY(read_norm(node, info));
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

/* Constants keep their place as long as the session lives, so the first run finds them for all. */
static OrtStatus *find_constants(kernel *node, OrtKernelContext *context) {
  if (node->linear.weight) return NULL;
  TRY(read_data(node, context, 2, &node->linear.scale));
  TRY(read_data(node, context, 3, &node->linear.starts));
  TRY(read_data(node, context, 4, &node->linear.bias));
  TRY(read_data(node, context, 6, &node->norm_weight));
  TRY(read_data(node, context, 7, &node->norm_bias));
  return read_data(node, context, 1, &node->linear.weight);
}

static const ds_linear *linear_after(const kernel *node) {
  return node->next && node->next->linear.weight ? &node->next->linear : NULL;
}

static OrtStatus *reserve_rows(kernel *node, size_t size) {
  buffer *rows = &node->owner->rows;
  if (size <= rows->size) return NULL;
  free(rows->data);
  rows->size = 0;
  rows->data = aligned_alloc(64, (size + 63) / 64 * 64);
  if (!rows->data) return refuse(node, "no memory for the rows");
  rows->size = size;
  return NULL;
}

/* The rows that the linear reads: of `x`, normalized, quantized. */
static OrtStatus *prepare_rows(kernel *node, const float *x, int32_t n_rows, const void **rows) {
  const ds_linear *linear = &node->linear;
  bool quantizes = linear->format >= DS_INT8;
  int32_t k = linear->k;
  *rows = x;
  if (!quantizes && !node->norm_weight) return NULL;
  TRY(reserve_rows(node, (size_t)n_rows * (quantizes ? (size_t)ds_int8_stride(k) : (size_t)k * sizeof *x)));
  void *out = node->owner->rows.data;
  *rows = out;
  if (!node->norm_weight) return report(node, ds_quantize_rows(node->owner->pool, n_rows, k, x, 0, out));
  return report(node, ds_norm_rows(node->owner->pool, (int32_t)node->norm, n_rows, k, x, node->norm_weight,
                                   node->norm_bias, node->epsilon, quantizes ? NULL : out, 0,
                                   quantizes ? out : NULL));
}

static OrtStatus *compute_linear(kernel *node, OrtKernelContext *context) {
  const ds_linear *linear = &node->linear, *next = linear_after(node);
  tensor x;
  const float *residual;
  const void *rows;
  float *y;
  TRY(find_constants(node, context));
  TRY(read_rows(node, context, linear->k, &x));
  TRY(read_data(node, context, 5, &residual));
  TRY(make_rows(node, context, &x, linear->n, &y));
  int32_t n_rows = count_rows(&x);
  TRY(prepare_rows(node, x.data, n_rows, &rows));
  return report(node, linear->format >= DS_INT8
                          ? ds_linear_int8(node->owner->pool, linear, n_rows, rows, residual, y, next)
                          : ds_linear_float(node->owner->pool, linear, n_rows, rows, residual, y, next));
}

static OrtStatus *read_embed(kernel *node, const OrtKernelInfo *info) {
  TRY(read_linear(node, info));
  return node->api->KernelInfoGetAttribute_float(info, "multiplier", &node->multiplier);
}

static OrtStatus *compute_embed(kernel *node, OrtKernelContext *context) {
  tensor ids;
  float *x;
  TRY(read_tensor(node, context, 0, 2, &ids));
  TRY(read_data(node, context, 1, &node->linear.weight));
  TRY(make_rows(node, context, &ids, node->linear.k, &x));
  return report(node, ds_embed(&node->linear, count_rows(&ids), ids.data, node->multiplier, x));
}

static OrtStatus *compute_norm(kernel *node, OrtKernelContext *context) {
  tensor x, weight;
  const float *bias;
  float *y;
  TRY(read_tensor(node, context, 1, 1, &weight));
  TRY(read_rows(node, context, weight.dims[0], &x));
  TRY(read_data(node, context, 2, &bias));
  TRY(make_rows(node, context, &x, weight.dims[0], &y));
  return report(node,
                ds_norm_rows(node->owner->pool, (int32_t)node->norm, count_rows(&x), (int32_t)weight.dims[0],
                             x.data, weight.data, bias, node->epsilon, y, 0, NULL));
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
  TRY(read_data(node, context, 7, &heads->cos));
  if (!heads->cos) return NULL;
  tensor cos;
  TRY(read_tensor(node, context, 7, 2, &cos));
  heads->n_positions = cos.dims[0];
  heads->n_rotary = (int32_t)(2 * cos.dims[1]);
  return read_data(node, context, 8, &heads->sin);
}

static OrtStatus *compute_attend(kernel *node, OrtKernelContext *context) {
  ds_heads *heads = &node->heads;
  tensor qkv, positions, slots, past_keys, past_values;
  const int64_t *write_index;
  const int32_t *counts;
  float *y, *keys, *values;
  TRY(read_tensor(node, context, 0, 3, &qkv));
  TRY(read_tensor(node, context, 1, 2, &positions));
  TRY(read_data(node, context, 2, &write_index));
  TRY(read_tensor(node, context, 3, 3, &slots));
  TRY(read_data(node, context, 4, &counts));
  TRY(read_tensor(node, context, 5, 4, &past_keys));
  TRY(read_tensor(node, context, 6, 4, &past_values));
  TRY(read_rotary(node, context));
  TRY(read_data(node, context, 9, &heads->q_norm));
  TRY(read_data(node, context, 10, &heads->k_norm));
  int64_t n_sequences = qkv.dims[0], n_rows = qkv.dims[1], size = past_keys.dims[3];
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
    {"Linear",
     8,
     2,
     1,
     {ORT_FLOAT, ORT_UINT8, ORT_FLOAT, ORT_INT64, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT, ORT_FLOAT},
     {ORT_FLOAT},
     read_product,
     compute_linear},
    {"Norm", 3, 2, 1, {ORT_FLOAT, ORT_FLOAT, ORT_FLOAT}, {ORT_FLOAT}, read_norm, compute_norm},
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
  free(operators->rows.data);
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
