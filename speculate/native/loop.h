/* Draftsmith's decode loop: a target and the levels that draft for it, from a prompt to tokens.
 *
 * Lossless   Greedy tokens are those of the target alone; sampled ones follow its law exactly, and under
 *            DS_RULE_EXACT are, token for token, those of sampling without drafts. Whatever drafts.
 * Repeatable Tokens depend on the engines, with what these learnt, the settings and the cost tables; never on a clock.
 * Ownership  Levels and settings are copied, engines and drafters borrowed until ds_decoder_free; nobody here
 *            closes them. All memory is taken by create and begin; step allocates nothing of its own.
 * Threads    A decoder is used by one thread at a time, and so are its engines and
 *            its drafter.
 * Errors     As in draftsmith.h. After one, begin again.
 */
#ifndef DRAFTSMITH_LOOP_H
#define DRAFTSMITH_LOOP_H

#include "drafter.h"
#include "draftsmith.h"
#include "engine.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DS_MAX_LEVELS = 8, DS_MAX_DRAFT = 64, DS_PREFILL_ROWS = 128 /* of a call that reads a prompt */ };
enum { DS_TREE_ROWS = 2 * DS_MAX_DRAFT /* that a model reads at most for a tree of its own */ };

/* How a level's proposals branch. Trees of a model:
 *   DS_TREE     the likeliest n_draft prefixes under the law that tokens are sampled from, at temperature 0 under
 *               the softmax. They are chosen, not sampled; under DS_RULE_EXACT the walk over them is that of SpecExec
 *               (arXiv 2406.02532) over a cache of the target's tokens.
 *   DS_GRAPH    the same, but what follows two tokens is read once for a tree (GSD, arXiv 2407.16207).
 *   DS_SEQUOIA  the shape that is worth most, by how often children of each rank were accepted, filled with draws
 *               without replacement; at temperature 0 with the likeliest (Sequoia, arXiv 2402.12374).
 * A model that drafts trees comes first. A drafter without an engine has trees of its own, or chains all the same:
 * DS_TREE asks for them. */
enum ds_branching { DS_CHAIN = 0, DS_TREE = 1, DS_GRAPH = 2, DS_SEQUOIA = 3 };

/* One level of a ladder. Each drafts for the next and verifies the one before; the last is the target, whose
 * vocabulary rules: a drafter may know fewer ids (it never drafts the rest) or more (those are masked). The host
 * of a guest (engine.h) is the engine of a level above it. */
typedef struct ds_level {
  ds_engine *engine; /* NULL: `drafter`, which needs no drafter of its own and so comes first */
  int32_t n_draft;   /* the longest proposal to the level above, 1 .. DS_MAX_DRAFT; 0 for the target */
  int32_t n_costs;   /* at least the n_draft of the level below + 1, or its own of a tree; 0 without costs */
  const double *costs; /* [r]: milliseconds of an engine's call with r + 1 rows, positive; or NULL */
  ds_drafter
      *drafter; /* of a level without an engine; NULL there: prompt lookup over the generation's text */
  int32_t tree; /* enum ds_branching, of n_draft nodes at most */
} ds_level;

/* Drafts are n_draft long where costs are NULL: those of the drafter (where that is an engine: others
 * have none) or of the level above it. Else a draft ends as soon as one more row does not pay (schedule.h). */

/* As ds_verify_tree, whose arguments these are: a chain is a tree too, on which DS_RULE_TOKEN is DS_RULE_RRS
 * and DS_RULE_BLOCK is DS_RULE_TRAVERSAL. Of a proposal that was sampled, q has n_nodes rows: nothing
 * was drawn behind the last node. With n_nodes 0 and no q, draw a token of p: so the drafts of DS_SEQUOIA are
 * drawn too, of their drafter's law. */
typedef int32_t ds_verify_function(int32_t rule, int32_t n_nodes, int32_t vocab, const double *p,
                                   const double *q, const int32_t *tokens, const int32_t *parents,
                                   const double *uniforms, int32_t *accepted, int32_t *n_accepted,
                                   int32_t *next_token);

typedef struct ds_sampling {
  double temperature; /* 0: greedy, the rest is checked but not used */
  int32_t top_k;      /* 0: off */
  double top_p;       /* 1: off */
  uint64_t seed;
  int32_t rule;               /* DS_RULE_TOKEN, DS_RULE_BLOCK or DS_RULE_EXACT */
  ds_verify_function *verify; /* a verdict of the caller's own, or NULL: ds_verify_tree */
} ds_sampling;

/* What one level did since begin. Times are wall milliseconds. */
typedef struct ds_level_stats {
  int64_t calls, rows; /* of its engine, prefill chunks included, and the tokens that they read */
  int64_t rounds;      /* verdicts that it gave; the target's first is the prefill's */
  int64_t discarded;   /* tokens that it decided behind an end-of-text token */
  int64_t asked;       /* rounds of the level above in which it could draft */
  int64_t drafted, accepted;
  int64_t drafted_at[DS_MAX_DRAFT], accepted_at[DS_MAX_DRAFT]; /* [i]: rounds with drafts behind i others */
  double busy_ms;                                              /* drafting, the levels below included */
  double prefill_ms;                                           /* the first call and the chunks before it */
  double forward_ms;                                           /* all later calls */
  double decide_ms;                                            /* laws, verdicts and choice */
  int64_t adapt_calls, adapt_rows;                             /* in which its engine read on its own */
  double adapt_ms;                                             /* learning from what stands, between rounds */
} ds_level_stats;

typedef struct ds_decoder ds_decoder;

/* levels [n_levels], 1 .. DS_MAX_LEVELS, innermost first. NULL on failure. */
DS_API ds_decoder *ds_decoder_create(const ds_level *levels, int32_t n_levels);
DS_API void ds_decoder_free(ds_decoder *decoder);

/* Start a generation: at most max_new_tokens behind prompt [n_prompt >= 1], up to one of eos [n_eos]
 * inclusive. Prompt and new tokens together must fit into the cache of every engine. */
DS_API int32_t ds_decoder_begin(ds_decoder *decoder, const ds_sampling *sampling, const int32_t *prompt,
                                int32_t n_prompt, int32_t max_new_tokens, const int32_t *eos, int32_t n_eos);

/* One round of the target. Writes the new tokens and returns how many, 0 once the generation is finished.
 * `room` of `tokens` must be at least the target drafter's n_draft + 1. The first round reads the prompt and
 * gives one token. */
DS_API int32_t ds_decoder_step(ds_decoder *decoder, int32_t *tokens, int32_t room);

/* The counters of a level, which stand between steps until the next begin. */
DS_API int32_t ds_decoder_stats(const ds_decoder *decoder, int32_t level, ds_level_stats *stats);

/* Cache slots of a level that hold the tokens that stand; without an engine, the tokens it was told. */
DS_API int32_t ds_decoder_kept(const ds_decoder *decoder, int32_t level);

#ifdef __cplusplus
}
#endif
#endif
