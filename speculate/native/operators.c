/* The kernels as custom operators of ONNX Runtime: what it asks about them, and the nodes that it makes. */
#include "error.h"
#include "nodes.h"
#include "pages.h"

#include <stdlib.h>
#include <string.h>

static const operator_kind *kind_of(const OrtCustomOp *op) { return ((const operator *)op)->kind; }

static OrtElementType type_of(char letter) {
  if (letter == '?') return ORT_ANY;
  switch (letter | 0x20) {
  case 'f': return ORT_FLOAT;
  case 'u': return ORT_UINT8;
  case 'i': return ORT_INT32;
  case 'l': return ORT_INT64;
  default: return ORT_BOOL;
  }
}

static const char *get_name(const OrtCustomOp *op) { return kind_of(op)->name; }
static const char *get_provider(const OrtCustomOp *op) {
  (void)op;
  return NULL; /* the CPU */
}
static size_t get_n_inputs(const OrtCustomOp *op) { return strlen(kind_of(op)->inputs); }
static size_t get_n_outputs(const OrtCustomOp *op) { return strlen(kind_of(op)->outputs); }
static OrtElementType get_input(const OrtCustomOp *op, size_t i) { return type_of(kind_of(op)->inputs[i]); }
static OrtElementType get_output(const OrtCustomOp *op, size_t i) { return type_of(kind_of(op)->outputs[i]); }
static OrtCharacteristic get_input_need(const OrtCustomOp *op, size_t i) {
  char letter = kind_of(op)->inputs[i];
  return letter >= 'a' && letter <= 'z' ? ORT_OPTIONAL : ORT_REQUIRED;
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

static void unlink_step(ds_operators *owner, step *s) {
  if (s->before) s->before->next = s->next;
  if (s->next) s->next->before = s->before;
  if (owner->last_step == s) owner->last_step = s->before;
}

static void unlink_node(const kernel *node) {
  ds_operators *o = node->owner;
  int64_t kind = node->kind - ds_node_kinds;
  kernel **at = &o->first[kind], *before = NULL;
  for (; *at && *at != node; at = &(*at)->next) before = *at;
  if (!*at) return; /* it was refused, and never added */
  *at = node->next;
  if (o->last[kind] == node) o->last[kind] = before;
  --o->n_nodes;
  o->knows_all = false;
}

static void destroy_kernel(void *created) {
  kernel *node = created;
  for (int i = 0; i < N_STEPS; ++i) unlink_step(node->owner, &node->steps[i]);
  unlink_node(node);
  free(node);
}

static kernel *add_node(kernel *node) {
  ds_operators *o = node->owner;
  int64_t kind = node->kind - ds_node_kinds;
  if (o->last[kind])
    o->last[kind]->next = node;
  else
    o->first[kind] = node;
  o->last[kind] = node;
  ++o->n_nodes;
  return node;
}

static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                                void **created) {
  const operator *self = (const operator *)op;
  kernel *node = calloc(1, sizeof *node);
  if (!node) return api->CreateStatus(ORT_FAIL, "no memory for a node");
  *node = (kernel){.api = api, .kind = self->kind, .owner = self->owner};
  OrtStatus *status = self->kind->read_attributes ? self->kind->read_attributes(node, info) : NULL;
  if (status)
    destroy_kernel(node);
  else
    *created = add_node(node);
  return status;
}

static OrtStatus *compute_kernel(void *node, OrtKernelContext *context) {
  return ((kernel *)node)->kind->compute(node, context);
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
    fill_operator(&operators->operators[i], &ds_node_kinds[i], operators);
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

int32_t ds_operators_count(const ds_operators *operators) { return operators->n_sublayers; }

bool ds_operators_attend(const ds_operators *operators) { return operators->attends; }

int32_t ds_operators_cache_type(const ds_operators *operators) { return operators->cache_type; }

void ds_operators_lend(ds_operators *operators, const ds_cache *cache) { operators->lent = cache; }

void ds_operators_skip(ds_operators *operators, const uint8_t *skipped) { operators->skips = skipped; }

void ds_operators_want_leaders(ds_operators *operators, bool wants) { operators->wants_leaders = wants; }

bool ds_operators_run(ds_operators *o, const ds_operators_call *call, float *logits, float *peaks,
                      int32_t *status) {
  if (!o->knows_all || !o->lent) return false;
  *status = ds_take_status(o->api, ds_run_straight(o, call, logits, peaks));
  return true;
}

void ds_operators_ran(ds_operators *o) {
  if (o->knows_all || !o->lent || !ds_nodes_are_straight(o)) return;
  o->knows_all = true;
  ds_hold_weights(o);
}

void ds_operators_free(ds_operators *operators) {
  if (!operators) return;
  if (operators->domain) operators->api->ReleaseCustomOpDomain(operators->domain);
  for (int i = 0; i < N_BUFFERS; ++i) free(operators->buffers[i].data);
  ds_return_pages(operators->held, operators->n_held);
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
