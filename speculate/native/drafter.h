/* What the decode loop needs of a drafter that is not a model: it proposes tokens from text alone, a chain of them
 * or a tree.
 *
 * Drafts     are chosen, not sampled: a function of the calls since `begin`, so that equal seeds give equal
 *            tokens; of one that learns from earlier generations, since it was made. The loop verifies
 *            them as such, losslessly, whatever they are.
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
  /* Another generation, of at most n_tokens, prompt included. Its tokens follow none of those before; what was
   * learnt from them may stay. All memory is taken here. */
  int32_t (*begin)(ds_drafter *drafter, int32_t n_tokens);
  /* These tokens follow the ones appended before and stand. */
  int32_t (*append)(ds_drafter *drafter, const int32_t *tokens, int32_t n_tokens);
  /* The level above read tokens [n_rows], and these are its logits after each, [n_rows, vocab]: the last that was
   * decided, then what was drafted behind it, whether it stands or not. parents [n_rows - 1], as draft_tree
   * gives them: tokens[1 + i] follows tokens[1 + parents[i]]. peaks: those of the logits (draftsmith.h), or NULL.
   * NULL: does not care. */
  int32_t (*observe)(ds_drafter *drafter, const int32_t *tokens, const int32_t *parents, int32_t n_rows,
                     const float *logits, const float *peaks, int32_t vocab);
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

/* Lookahead decoding (arXiv 2402.02057): as a tree, a window of guesses, half of its nodes, and the n-grams behind the
 * last token that were found in it before, or in the text. As a chain, the latest of these alone: nothing new is
 * found. 0.7 MB. NULL on failure. */
DS_API ds_drafter *ds_lookahead_drafter_create(int32_t vocab);

/* SuffixDecoding (arXiv 2411.04975): the most frequent way to go on, in this generation's text or in the outputs
 * of earlier ones, where it ends as the text does. What follows the first addition after `begin`, and the last
 * token of that, is output; `begin` keeps the output before it. Earlier outputs take max_bytes at most,
 * taken here; where they fill up, the oldest go. The text of the generation takes 136 bytes a token.
 * NULL on failure. */
DS_API ds_drafter *ds_history_drafter_create(int64_t max_bytes);

typedef struct ds_history_size {
  int64_t n_outputs, n_tokens; /* kept; ends included */
  int64_t n_bytes;             /* taken for them, whether in use or not */
} ds_history_size;

/* Of a drafter made by ds_history_drafter_create. */
DS_API int32_t ds_history_kept(const ds_drafter *drafter, ds_history_size *size);

/* Of a drafter made by ds_recycling_drafter_create: the tokens that may follow, likeliest first, into
 * candidates [DS_RECYCLING_WIDTH]; how many, the rest are -1. */
DS_API int32_t ds_recycling_candidates(const ds_drafter *drafter, int32_t token, int32_t *candidates);

/* drafters [1 .. DS_MAX_LEVELS] as one, borrowed. As a chain: of their proposals the one of which most is expected
 * to stand, of equals the first's. As a tree: the likeliest nodes of all that they propose. What is expected of a
 * token follows from how its drafter fared in this generation with tokens of which it was about as sure. NULL on
 * failure. */
DS_API ds_drafter *ds_hybrid_drafter_create(ds_drafter *const *drafters, int32_t n_drafters);

#ifdef __cplusplus
}
#endif
#endif
