/* SWIFT (Xia et al., arXiv 2410.06916): a drafter that is its target without some sublayers, which are searched while
 * it decodes, without training. */
#ifndef DRAFTSMITH_SWIFT_H
#define DRAFTSMITH_SWIFT_H

#include "draftsmith.h"
#include "engine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* As ds_onnx_skip, for a share of the sublayers, above 0 and below 1 (the paper's is 0.45), of all layers but the
 * first and the last. Which they are follows from what was decoded since it was made, whoever asked for it: after every
 * 32 tokens of a generation, those since the last time (50 at most) are read once more, without another set of
 * sublayers. The set whose likeliest tokens match most of them is used from then on. The search ends at a match of
 * 0.93, after 300 sets without a better one, or after 1000. */
DS_API ds_engine *ds_swift_create(ds_engine *host, int32_t n_sublayers, double share);

/* Search anew from the first set, evenly spaced. */
DS_API int32_t ds_swift_forget(ds_engine *engine);

typedef struct ds_swift_state {
  int32_t n_sublayers, n_tried; /* sets */
  int32_t is_over;
  double match, tried_match;    /* of the set in use and of the one tried last; 0 before any was */
  const uint8_t *skips, *tried; /* [n_sublayers] of each, until the engine is called or closed */
} ds_swift_state;

/* Of an engine by ds_swift_create. */
DS_API int32_t ds_swift_look(const ds_engine *engine, ds_swift_state *state);

#ifdef __cplusplus
}
#endif
#endif
