/* How long a draft should be, while it is being drafted.
 *
 * Tokens are worth time: a level that needs V milliseconds a token of late, all its calls and its drafters'
 * included, saves V with every draft it accepts. (Who asks each draft to pay at the present rate is led to
 * the best rate: Dinkelbach's method for a ratio.) So with h tokens drafted, all of which are accepted with
 * probability S_h, the drafter goes on if for some number n of further ones
 *
 *     V * (S_h a + S_h a^2 + .. + S_h a^n)  >  n d + c(h + n + 1) - c(h + 1)
 *
 * where a is how often the drafter's next token is accepted if all before it were, d its own milliseconds a
 * token (0 for one that is no engine), and c(r) the cost of the call above with r rows. Looking n ahead steps
 * over a table that rises in stairs. A draft that may be cut keeps the h with the most V (S_1 + .. + S_h) -
 * c(h + 1). So does a tree, whose nodes come with the likeliest first; there S_i is the chance of node i's path.
 *
 * A model that drafts a tree reads several nodes in a call. For S_h then stands the chance that the text goes through
 * one of these, for a how often what was drafted behind an accepted node held the next token, and for d the call.
 *
 * S_h is a product of learnt frequencies, one for each bucket of confidence, of what was verified so far in
 * this generation. Every round that drafts nothing brings the next exploration nearer: one draft whether it
 * pays or not, so that a drafter that did badly on one passage is not out for the rest.
 *
 * Non-anticipating: a decision uses tokens that are kept, laws given those, and verdicts of the past. No token
 * of a sampled proposal is ever dropped, so each still follows its law given that it was proposed. No clock
 * enters either: equal seeds give equal tokens.
 */
#ifndef DRAFTSMITH_SCHEDULE_H
#define DRAFTSMITH_SCHEDULE_H

#include "tree.h"

#include <stdbool.h>
#include <stdint.h>

/* The time of a level by its cost table. */
typedef struct {
  const double *costs; /* [n_costs], or NULL: free, as what is no engine is */
  int32_t n_costs;
  double spent, gained; /* milliseconds and tokens of late */
} ds_pace;

void ds_pace_reset(ds_pace *pace);
void ds_pace_add(ds_pace *pace, double milliseconds, int32_t n_tokens);
double ds_pace_of_call(const ds_pace *pace, int32_t n_rows);

enum { DS_GRADES = 5, DS_BUCKETS = 2 * DS_GRADES /* of links of chains, and of nodes of trees */ };

/* What is known of a level's drafts. */
typedef struct {
  double tried[DS_BUCKETS], accepted[DS_BUCKETS]; /* tokens all before which were accepted */
  double places, met; /* where drafts followed what was accepted, and how many of these had the token */
  int32_t idle;       /* rounds since it last proposed */
} ds_trust;

void ds_trust_reset(ds_trust *trust);

/* The bucket of a draft by what is cheap to know: for an engine the lead of the first logit over the second,
 * for other drafters the number of tokens that a chain rests on, or the chance that they give a node. peaks: of the
 * logits (draftsmith.h), or NULL. */
uint8_t ds_bucket_of_law(const float *logits, const float *peaks, int32_t vocab);
uint8_t ds_bucket_of_match(int32_t length);
uint8_t ds_bucket_of_chance(double chance);

/* The chance that a link is right that rests on so many tokens, before anything is learnt; and the least number
 * that has such a chance. */
double ds_chance_of_match(int32_t length);
int32_t ds_match_of_chance(double chance);

/* How often a token in this bucket is accepted, where all before it are. */
double ds_trust_in(const ds_trust *trust, uint8_t bucket);

/* Of a proposal with these buckets, the nodes path[0 .. n_accepted) were accepted. */
void ds_trust_learn(ds_trust *trust, const uint8_t *buckets, const ds_tree *tree, const int32_t *path,
                    int32_t n_accepted);

/* One round in which the level proposed n_draft tokens. */
void ds_trust_note(ds_trust *trust, int32_t n_draft);

/* Whether a drafter that does not pay is due to be tried. */
bool ds_explores(const ds_trust *trust);

/* Whether to go on drafting, at most `room` more behind those with the given buckets [n_draft]. */
bool ds_pays_to_go_on(const ds_pace *above, const ds_pace *own, const ds_trust *trust, const uint8_t *buckets,
                      int32_t n_draft, int32_t room);

/* A model that drafts a tree asks before each call whether that pays. The call takes call_ms and reads nodes of which
 * one is right with probability `reach`, behind n_nodes that are there; up to `room` more may follow, one behind the
 * other, each for such a call. */
bool ds_pays_to_read(const ds_pace *above, const ds_trust *trust, double call_ms, double reach,
                     int32_t n_nodes, int32_t room);

/* The milliseconds that one more row of that call may cost whose node is right with probability `reach`. */
double ds_worth_of_reading(const ds_pace *above, const ds_trust *trust, double reach);

/* How many of the first nodes of a draft that may be cut are worth their rows in the call above. */
int32_t ds_length_that_pays(const ds_pace *above, const ds_trust *trust, const uint8_t *buckets,
                            const ds_tree *tree);

#endif
