/* Nodes of a session's graph: what operators.c makes when ONNX Runtime asks for them, and nodes.c computes. */
#ifndef DRAFTSMITH_NODES_H
#define DRAFTSMITH_NODES_H

#include "operators.h"
#include "pages.h"

typedef struct kernel kernel;

/* What distinguishes one operator from another: the types of its inputs and outputs, a letter each; lower case for
 * what may be missing. */
typedef struct {
  const char *name, *inputs, *outputs;
  OrtStatus *(*read_attributes)(kernel *, const OrtKernelInfo *);
  OrtStatus *(*compute)(kernel *, OrtKernelContext *);
} operator_kind;

/* ONNX Runtime's table comes first: it hands its address to the functions in it. */
typedef struct {
  OrtCustomOp table;
  const operator_kind *kind;
  ds_operators *owner;
} operator;

/* A linear of a graph, with the norm before it if there is one. They are linked in the order in which they run. */
typedef struct step {
  ds_linear linear;
  ds_screen screen; /* or without errors: there is none */
  const float *norm_weight, *norm_bias;
  int32_t sublayer; /* or NO_SUBLAYER */
  struct step *before, *next;
} step;

enum { NO_SUBLAYER = -1 };
enum { QKV, O, UP, DOWN, N_STEPS };

/* A node of a graph. */
struct kernel {
  const OrtApi *api;
  const operator_kind *kind;
  ds_operators *owner;
  step steps[N_STEPS]; /* a Linear has one */
  ds_heads heads;
  int32_t sublayer; /* the first of its own, or NO_SUBLAYER */
  int64_t norm, window, width;
  float epsilon, multiplier;
  int64_t known_head_dim; /* rotary tables and norms of heads, which are constants, were found for; or 0 */
  const void *table;      /* of an Embed, of `table_type` */
  OrtElementType table_type;
  kernel *next; /* of its kind */
};

enum { EMBED, LINEAR_NODE, NORM, SPREAD, LIST_SLOTS, ATTEND, LAYER, N_KINDS };

/* Memory of a session that grows to what its largest call needs. */
typedef struct {
  void *data;
  size_t size;
} buffer;

enum {
  ROWS /* normalized or quantized, on their way into a linear */,
  PROJECTED,
  ATTENDED,
  MIDDLE,
  WIDE,
  STREAM,
  SLOTS,
  SCREENING,
  N_BUFFERS
};

struct ds_operators {
  const OrtApi *api;
  ds_pool *pool;
  OrtCustomOpDomain *domain;
  step *last_step; /* of those created so far; nodes are created in the order in which they run */
  int32_t n_sublayers;
  kernel *first[N_KINDS], *last[N_KINDS]; /* nodes by kind, in that order */
  int32_t n_nodes, n_straight; /* what its last Linear says of the graph: layers of a straight one, or 0 */
  bool knows_all;              /* whether a run of ONNX Runtime has found every constant */
  bool attends;                /* some node is attention */
  int32_t cache_type;          /* what all of those want */
  bool wants_leaders;          /* whether only the largest outputs of linears with a screen are wanted */
  const uint8_t *skips;        /* [n_sublayers], or NULL: none */
  const ds_cache *lent;        /* or NULL */
  char *held;                  /* a copy of all packed weights in huge pages, or NULL */
  size_t n_held;
  ds_span refined; /* the file's pages of a linear whose screen is held, of which most calls read a few */
  int64_t n_read;  /* bytes of weights that calls read there since the process let go of them */
  buffer buffers[N_BUFFERS];
  operator operators[N_KINDS];
};

#define TRY(call)                                                                                            \
  do {                                                                                                       \
    OrtStatus *failed = (call);                                                                              \
    if (failed) return failed;                                                                               \
  } while (0)

extern const operator_kind ds_node_kinds[N_KINDS];

/* Whether the nodes are those of a straight graph, and the last of them says that they follow each other so. */
bool ds_nodes_are_straight(const ds_operators *operators);

/* Copy the weights of linears to huge pages, where there are any, instead of those that mirror the file. */
void ds_hold_weights(ds_operators *operators);

/* What they compute then, over the cache that is lent; all constants are known. */
OrtStatus *ds_run_straight(ds_operators *operators, const ds_operators_call *call, float *logits,
                           float *peaks);

#endif
