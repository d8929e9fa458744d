/* Draftsmith's native core: laws, acceptance rules and training-free drafting. This page is the interface.
 *
 * Data       Matrices are row-major and dense. Token ids are int32 in [0, vocab). A law is a row of `vocab`
 *            probabilities: finite, not negative, summing to one.
 * Ownership  Every pointer is borrowed for the call. Only a ds_suffix is owned, by whoever created it.
 * Threads    Functions share no state. A ds_suffix may be read (draft) by many threads or changed (append) by
 *            one. ds_error_message belongs to the calling thread.
 * Errors     A negative return value is a ds_status; outputs are then unspecified, handles unchanged.
 * Numbers    All arithmetic is in double, each sum in one fixed order, and no result depends on libm: equal
 *            inputs give equal bits on every machine.
 */
#ifndef DRAFTSMITH_H
#define DRAFTSMITH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DS_API __attribute__((visibility("default")))

enum ds_status {
  DS_OK = 0,
  DS_ERROR_ARGUMENT = -1, /* an input that the function's contract excludes */
  DS_ERROR_MEMORY = -2,   /* an allocation failed, or a handle reached its limit of tokens */
  DS_ERROR_ENGINE = -3,   /* an engine, or ONNX Runtime, failed */
};

DS_API const char *ds_version(void);

/* This thread's last failure in one line of English, valid until its next one. */
DS_API const char *ds_error_message(void);

/* Say what failed, from a function that this library calls: ds_error_message of this thread. Copied. */
DS_API void ds_set_error(const char *words);

/* ---- Laws ---------------------------------------------------------------------------------------------- */

/* Of a row of logits, the largest of each so many, its peaks: float [ceil(vocab / DS_PEAK_WIDTH)]; NaN is left out. Who
 * looks for the largest few of a row passes over most of it by them, and whoever computes a row has them at hand. */
enum { DS_PEAK_WIDTH = 48 };

/* The index of the first largest of `vocab` floats; an error if one is NaN. */
DS_API int32_t ds_argmax(const float *row, int32_t vocab);

/* Turn logits [n_rows, vocab] into laws [n_rows, vocab], in Hugging Face's order and with its rules for ties:
 *   temperature  divides the logits; 0 gives all mass to the first largest logit and ignores what follows
 *   top_k        keeps the k largest logits and all that equal the k-th; 0 turns it off
 *   top_p        drops the least likely tokens while what is dropped has mass <= 1 - top_p (so the token that
 *                crosses is kept); of equals at the cut the lower ids are dropped; 1 turns it off
 * A logit of -inf has no mass. NaN, +inf and a row of nothing but -inf are errors. */
DS_API int32_t ds_laws_from_logits(const float *logits, int32_t n_rows, int32_t vocab, double temperature,
                                   int32_t top_k, double top_p, double *laws);

/* Check that rows are laws whose sums are within `tolerance` of one, and divide each by its sum, in place. */
DS_API int32_t ds_normalize_laws(int32_t n_rows, int32_t vocab, double tolerance, double *laws);

/* out[i] = uniform number `counter + i` (mod 2^64) of the stream, in [0, 1): a multiple of 2^-53.
 * Philox4x64-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") with the key (seed,
 * stream); number c is word c % 4 of block c / 4. Each can be had alone, in any order, by any thread. */
DS_API void ds_uniforms(uint64_t seed, uint64_t stream, uint64_t counter, int32_t n, double *out);

/* ---- Verification -------------------------------------------------------------------------------------- */

enum ds_rule {
  DS_RULE_TOKEN = 0, /* each token on its own: Leviathan et al., arXiv 2211.17192, algorithm 1 */
  DS_RULE_BLOCK = 1, /* the draft as a whole: Sun et al., arXiv 2403.10444, algorithm 2; never accepts less */
  DS_RULE_EXACT = 2, /* sample the target, accept while the draft says the same; any draft whatever */
  /* Of trees only, as DS_RULE_EXACT is also: */
  DS_RULE_RRS = 3,       /* siblings one by one, drawn without replacement: Sequoia, arXiv 2402.12374 */
  DS_RULE_TRAVERSAL = 4, /* the tree as a whole, from its leaves up: arXiv 2505.12398 */
  DS_RULE_SPECINFER = 5, /* siblings one by one, each an independent draw: arXiv 2305.09781 */
};

/* Verify a drafted chain, losslessly: draft[0..n_accepted), next_token are distributed as the target's own.
 *   p         [n_draft + 1, vocab] the target's laws; row i is that of the token that follows draft[0..i)
 *   q         [n_draft, vocab]     the laws that the draft was sampled from, or NULL for a draft that was not
 *                                  sampled (the same as one-hot rows); DS_RULE_EXACT ignores it
 *   uniforms  [n_draft + 2]        independent, in [0, 1); each has one use, whatever the rule:
 *     uniforms[i], i < n_draft     whether draft[i] is accepted (under DS_RULE_EXACT: the sample at node i)
 *     uniforms[n_draft]            the token after a draft that was accepted whole, from p's last row
 *     uniforms[n_draft + 1]        the token that replaces a rejected one, from the residual law
 * A token without mass under p is never accepted and never drawn. One with mass under p but none under q
 * cannot have been drafted; it is accepted. Where the residual is only rounding (< 1e-12), p stands in.
 * Tokens are drawn by inverse CDF in the order of their ids. The rows of p and q are trusted to be laws, as
 * ds_laws_from_logits and ds_normalize_laws leave them; others give an error or some token, never a crash. */
DS_API int32_t ds_verify_chain(int32_t rule, int32_t n_draft, int32_t vocab, const double *p, const double *q,
                               const int32_t *draft, const double *uniforms, int32_t *n_accepted,
                               int32_t *next_token);

/* The same at temperature 0, from logits [n_draft + 1, vocab]: accept while draft[i] is the first argmax. */
DS_API int32_t ds_verify_greedy(int32_t n_draft, int32_t vocab, const float *logits, const int32_t *draft,
                                int32_t *n_accepted, int32_t *next_token);

enum { DS_MAX_TREE = 1024 };

/* Verify a drafted tree, losslessly: the path accepted[0..n_accepted), then next_token. Drafted node i is
 * row i + 1 of p and q; the root, row 0, is the text so far.
 *   p         [n_nodes + 1, vocab]  the target's laws after each node
 *   q         [n_nodes + 1, vocab]  the laws that each node's children were drawn from (of a node without
 *                                   children not read), or NULL: the tree was chosen, not sampled
 *   tokens    [n_nodes]             of the drafted nodes; siblings in the order in which they were drawn
 *   parents   [n_nodes]             parents[i] < i, or -1 for the root
 *   uniforms  [n_nodes + 2]         independent, in [0, 1); each has one use:
 *     uniforms[i], i < n_nodes      whether node i is accepted (DS_RULE_EXACT: the sample at row i)
 *     uniforms[n_nodes]             the token after a node without children (DS_RULE_EXACT: after the last)
 *     uniforms[n_nodes + 1]         the token after a node whose children were all rejected
 *   accepted  [n_nodes]             room for the accepted nodes, from the root's child down
 * How siblings must have been drawn for the output to follow the target's law:
 *   DS_RULE_RRS, DS_RULE_TRAVERSAL: each from q without the tokens of those before it, normalized. Or each
 *     from q, independently: a token that comes again is passed over, which leaves draws without replacement.
 *   DS_RULE_SPECINFER: each from q, independently; a token that comes again is a trial of its own.
 *   DS_RULE_EXACT: in any way; of equal siblings the first is followed.
 * A child without mass in q, as every child where q is NULL, counts as chosen: given its elder siblings,
 * its token was certain. On a chain the rules are DS_RULE_TOKEN (rrs, specinfer) and DS_RULE_BLOCK
 * (traversal). Otherwise as ds_verify_chain. */
DS_API int32_t ds_verify_tree(int32_t rule, int32_t n_nodes, int32_t vocab, const double *p, const double *q,
                              const int32_t *tokens, const int32_t *parents, const double *uniforms,
                              int32_t *accepted, int32_t *n_accepted, int32_t *next_token);

/* Verify drafts [n_drafts >= 1] of one token, drawn independently from q [vocab], by K-SEQ (Sun et al.,
 * SpecTr, arXiv 2310.15141) with the smallest rho that is valid: *token follows p [vocab].
 * *accepted is the draft that it is, or -1. At least 1 - 1/e of the best acceptance that any rule can
 * have. uniforms [n_drafts + 1]: [i] decides drafts[i], the last draws the token that replaces them all. */
DS_API int32_t ds_verify_kseq(int32_t n_drafts, int32_t vocab, const double *p, const double *q,
                              const int32_t *drafts, const double *uniforms, int32_t *accepted,
                              int32_t *token);

/* ---- Drafting from the text itself --------------------------------------------------------------------- */

/* An index of the committed tokens that finds where the last few occurred before. It holds 136 bytes a token,
 * up to twice that just after it grew. Appending is amortized O(1), drafting O((n_tail + 1) * max_match). */
typedef struct ds_suffix ds_suffix;

enum { DS_SUFFIX_MAX_MATCH = 64, DS_SUFFIX_MAX_TOKENS = 1 << 28, DS_SUFFIX_MAX_NEXT = 64 };

DS_API ds_suffix *ds_suffix_create(void); /* NULL if memory ran out */
DS_API void ds_suffix_free(ds_suffix *suffix);
DS_API int32_t ds_suffix_append(ds_suffix *suffix, const int32_t *tokens, int32_t n_tokens);

/* Make room for n_tokens in all: appends up to there allocate nothing and cannot fail for memory. */
DS_API int32_t ds_suffix_reserve(ds_suffix *suffix, int32_t n_tokens);

/* Let S be the committed tokens followed by tail[0..n_tail), which is not committed. Take the largest L in
 * [min_match, max_match] for which the last L tokens of S also end at an earlier place in S (the two may
 * overlap), and of those places the most recent. The draft is what follows there; past the end of S it goes
 * on with what it has drafted itself, so periodic text continues. Writes max_draft tokens and returns that
 * number, or returns 0 if no L will do. *match_length is L, or 0.
 * 1 <= min_match <= max_match <= DS_SUFFIX_MAX_MATCH. */
DS_API int32_t ds_suffix_draft(const ds_suffix *suffix, const int32_t *tail, int32_t n_tail,
                               int32_t min_match, int32_t max_match, int32_t max_draft, int32_t *draft,
                               int32_t *match_length);

/* What followed context [1 <= n_context < DS_SUFFIX_MAX_MATCH] in the committed tokens, and how often: the
 * most frequent first, of equals the latest. Up to `room` of them, at most DS_SUFFIX_MAX_NEXT; returns how
 * many. O(n_context + kinds of token that follow). */
DS_API int32_t ds_suffix_next(const ds_suffix *suffix, const int32_t *context, int32_t n_context,
                              int32_t room, int32_t *tokens, int32_t *counts);

/* As ds_suffix_draft, a tree of up to max_nodes tokens (drafter.h), none behind max_depth others: all that followed the
 * matches of at least min_match tokens that end within the committed ones, by how often each did. Returns the number
 * of nodes. */
DS_API int32_t ds_suffix_draft_tree(const ds_suffix *suffix, const int32_t *tail, int32_t n_tail,
                                    int32_t min_match, int32_t max_match, int32_t max_nodes,
                                    int32_t max_depth, int32_t *tokens, int32_t *parents, double *chances);

#ifdef __cplusplus
}
#endif
#endif
