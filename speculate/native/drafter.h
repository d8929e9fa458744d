/* What the decode loop needs of a drafter that is not a model: it proposes tokens from text alone, a chain of them
 * or a tree.
 *
 * Drafts     are chosen, not sampled: a function of the calls since `begin`, so that equal seeds give equal
 *            tokens. The loop verifies them as such, losslessly, whatever they are.
 * Errors     A callback returns a count or DS_OK, or a negative ds_status and says why with ds_set_error.
 * Threads    One call at a time. A drafter serves one decoder at a time.
 */
#ifndef DRAFTSMITH_DRAFTER_H
#define DRAFTSMITH_DRAFTER_H

#include "draftsmith.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ds_drafter ds_drafter;
struct ds_drafter {
  /* Forget all tokens; those of the generation to come will be at most n_tokens, prompt included. All memory
   * is taken here. */
  int32_t (*begin)(ds_drafter *drafter, int32_t n_tokens);
  /* These tokens follow the ones appended before and stand. */
  int32_t (*append)(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens);
  /* The level above read tokens [n_rows], and these are its logits after each, [n_rows, vocab]; drafts
   * are among them, whether they stand or not, and of a tree one need not follow the one before. NULL: does
   * not care. */
  int32_t (*observe)(ds_drafter *drafter, const int32_t *tokens, int32_t n_rows, const float *logits,
                     int32_t vocab);
  /* Propose up to max_draft tokens to follow the appended ones and tail [n_tail], which may yet be rejected.
   * Returns how many. support[i]: on how many tokens of text draft[i] rests; the more, the surer. */
  int32_t (*draft)(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_draft,
                   int32_t *draft, int32_t *support);
  void (*close)(ds_drafter *drafter);
  /* Propose a tree of up to max_nodes tokens, none behind max_depth others, to follow the same text. Returns
   * how many. parents[i] < i is the node that node i follows, or -1: the text. chances[i], in (0, 1]: how
   * likely node i is right, given that its parent is. The loop may take the first few only, so the likeliest
   * come first. NULL: proposes chains only. */
  int32_t (*draft_tree)(ds_drafter *drafter, const int32_t *tail, int32_t n_tail, int32_t max_nodes,
                        int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances);
};

DS_API void ds_drafter_close(ds_drafter *drafter); /* nothing for NULL */

/* Ends each reference. No vocabulary has it, and no draft goes past it. */
enum { DS_END_OF_REFERENCE = 0x7fffffff };

/* Prompt lookup over the generation's own text, by ds_suffix with matches of 2 to 32 tokens; and over
 * references [n_references] before it: documents, earlier answers, whatever the output may quote (LLMA,
 * arXiv 2304.04487). Copied. Each `begin` indexes them again, about a microsecond a token. NULL on
 * failure. */
DS_API ds_drafter *ds_suffix_drafter_create(const int32_t *references, int32_t n_references);

enum { DS_RECYCLING_WIDTH = 8 };

/* Token Recycling (arXiv 2408.08696): after each of `vocab` tokens the likeliest that the level above
 * last saw follow it, rejected drafts included. A chain follows the first of them from token to token; a tree
 * takes each by how often the token of its rank was right of late. 32 bytes a token. NULL on failure. */
DS_API ds_drafter *ds_recycling_drafter_create(int32_t vocab);

/* Of a drafter made by ds_recycling_drafter_create: the tokens that may follow, likeliest first, into
 * candidates [DS_RECYCLING_WIDTH]; how many, the rest are -1. */
DS_API int32_t ds_recycling_candidates(const ds_drafter *drafter, int32_t token, int32_t *candidates);

enum { DS_MAX_MERGED = 8 };

/* Several drafters as one, each borrowed: as a tree, the likeliest nodes of all that they propose; as a chain,
 * whichever proposal promises the most. NULL on failure. */
DS_API ds_drafter *ds_merged_drafter_create(ds_drafter *const *members, int32_t n_members);

#ifdef __cplusplus
}
#endif
#endif
