/* Two models that decode one law together (CoS, arXiv 2502.01662): a weighted ensemble of their laws, or what
 * the first says and the second does not.
 *
 * Law        The output follows the joint law r exactly, whoever proposes. r is the target's own only where
 *            the second model weighs nothing: this is another text than the target's, not a faster one.
 * Rounds     One model proposes a few tokens from its own law; the other reads them all in one call, which
 *            gives r at each, and they are verified against r. Where all stand, the token that the reader would
 *            say next is no sample of r, but a proposal of its own: it goes on from it, and the first one reads.
 * The rest   Ownership, threads and errors are those of loop.h.
 */
#ifndef DRAFTSMITH_JOINT_H
#define DRAFTSMITH_JOINT_H

#include "loop.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DS_JOINT_MODELS = 2, DS_JOINT_MAX_DRAFT = 32 };

/* With p and q the laws of the first and the second model under the settings' temperature, top-k and top-p:
 *   ensemble     r = (1 - weight) p + weight q                          weight in [0, 1]
 *   contrastive  r ~ exp((a - weight b) / temperature) on the tokens that p holds and whose probability at
 *                temperature 1 is at least `cutoff` times the likeliest's, with logits a and b (cutoff 0:
 *                section 3.1 of the paper; above: arXiv 2309.09117)      weight >= 0, cutoff in [0, 1]
 * At temperature 0 all mass is on the first likeliest token of r as it is at temperature 1 without top-k and
 * top-p. */
enum ds_joint_kind { DS_JOINT_ENSEMBLE = 0, DS_JOINT_CONTRASTIVE = 1 };

typedef struct ds_joint_settings {
  int32_t kind; /* enum ds_joint_kind */
  double weight, cutoff;
  double temperature; /* these four as in ds_sampling */
  int32_t top_k;
  double top_p;
  uint64_t seed;
  int32_t rule;               /* DS_RULE_TOKEN or DS_RULE_BLOCK */
  ds_verify_function *verify; /* a verdict of the caller's own, or NULL: ds_verify_tree */
  /* Tokens that each model proposes in its turn, 0 .. DS_JOINT_MAX_DRAFT. 0 of the first: what it would say
   * after a proposal that stands is given up, and the second proposes again. 0 of both: every token is a call
   * of each model, the ensemble as it is commonly run. */
  int32_t n_draft[DS_JOINT_MODELS];
} ds_joint_settings;

/* What one model did since begin. */
typedef struct ds_joint_stats {
  int64_t calls, rows; /* the prompt's included */
  int64_t proposed, accepted;
} ds_joint_stats;

/* r of one row of logits of each model, [vocab]. */
DS_API int32_t ds_joint_law(const ds_joint_settings *settings, int32_t vocab, const float *first,
                            const float *second, double *law);

typedef struct ds_joint ds_joint;

/* Engines of one vocabulary, borrowed. NULL on failure. */
DS_API ds_joint *ds_joint_create(ds_engine *first, ds_engine *second);
DS_API void ds_joint_free(ds_joint *joint);

/* As ds_decoder_begin. */
DS_API int32_t ds_joint_begin(ds_joint *joint, const ds_joint_settings *settings, const int32_t *prompt,
                              int32_t n_prompt, int32_t max_new_tokens, const int32_t *eos, int32_t n_eos);

/* One round: 1 .. DS_JOINT_MAX_DRAFT + 1 tokens, 0 once the generation is finished. */
DS_API int32_t ds_joint_step(ds_joint *joint, int32_t *tokens, int32_t room);

/* Of the first (0) or the second (1) model. */
DS_API int32_t ds_joint_count(const ds_joint *joint, int32_t model, ds_joint_stats *stats);

#ifdef __cplusplus
}
#endif
#endif
