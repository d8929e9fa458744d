/* The decode loop: levels that draft for one another, the target last.
 *
 * Proposals are exact samples. What a level proposes follows its own law, whatever it was drafted from, since
 * it verified that losslessly. So the level above may verify it with that law. This holds as long as the end of
 * a proposal depends on nothing but the tokens kept in it, the laws given those, and the past. A level may
 * stop after an end-of-text token, at a length fixed beforehand, where a round ended, or where more does not
 * pay. It may not look at a token and then drop it: to propose only the accepted drafts without the level's
 * own token after them, or to leave out a token for its low probability, selects among samples, and the
 * verdict on them is no longer lossless. Drafts that are not sampled may be cut as one likes: those of a
 * drafter without an engine, greedy ones, and all under DS_RULE_EXACT, which takes any draft whatever.
 *
 * A level that is asked for n tokens gives n, in as many rounds as that takes, unless they do not pay: the
 * call above that verifies them is the dear one. Its own drafter is asked for at most one token less than is
 * missing, so no round overshoots.
 *
 * One array holds the sequence. Tokens 0 .. committed are decided; levels write their proposals right behind
 * them, over one another's. So nesting is cheap: an accepted draft is already where it belongs, and a verdict
 * is one token written at the place of the first rejected one.
 *
 * Uniforms are counter-based, each level with a stream of its own. Under DS_RULE_EXACT they are keyed by
 * position alone: then an output token is a function of the seed and the tokens before it, whatever was
 * drafted; and a drafter that draws with its verifier's uniform guesses its token far more often than with
 * one of its own (arXiv 2408.07978).
 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "decoder.h"
#include "error.h"
#include "laws.h"

#include <stddef.h>
#include <string.h>
#include <time.h>

enum { BY_POSITION = 0 /* the stream of DS_RULE_EXACT, shared by all levels; level i has stream i + 1 */ };

static double now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* ---- Reading ------------------------------------------------------------------------------------------- */

static int32_t forward(ds_decoder *d, level *l, int32_t n_rows, int32_t n_logits, const float **logits) {
  const int32_t *ids = d->ids + l->kept;
  if (l->engine->vocab < d->vocab) {
    /* An id of the target's padding may be unknown to a drafter with less of it; any other will do there. */
    for (int32_t i = 0; i < n_rows; ++i)
      d->shown[i] = ids[i] < l->engine->vocab ? ids[i] : l->engine->vocab - 1;
    ids = d->shown;
  }
  if (logits) *logits = NULL;
  int32_t status = l->engine->forward(l->engine, n_rows, ids, l->kept, NULL, NULL, n_logits, logits);
  if (status < 0) return status;
  if (logits && !*logits) return ds_fail(DS_ERROR_ENGINE, "an engine gave no logits");
  l->kept += n_rows;
  l->stats.calls += 1;
  l->stats.rows += n_rows;
  return DS_OK;
}

/* Bring the cache up to token `end`; the logits after each of the last n_logits tokens, or NULL for those to stay
 * on the device. */
static int32_t read_to(ds_decoder *d, level *l, int32_t end, int32_t n_logits, const float **logits) {
  double began = now_ms();
  int first = l->kept == 0;
  int32_t status = DS_OK;
  while (status == DS_OK && end - l->kept >= DS_PREFILL_ROWS + n_logits)
    status = forward(d, l, DS_PREFILL_ROWS, 1, logits);
  if (status == DS_OK) status = forward(d, l, end - l->kept, n_logits, logits);
  *(first ? &l->stats.prefill_ms : &l->stats.forward_ms) += now_ms() - began;
  return status;
}

/* ---- Verdicts ------------------------------------------------------------------------------------------ */

/* Engines of one tokenizer may differ in how far they pad the vocabulary. Padding ids of a drafter are cut
 * off, ids that only the verifier has get no mass from the drafter. Both leave the verifier's law as it is. */
static int32_t shared_vocab(const ds_decoder *d, const level *l) {
  return l->engine->vocab < d->vocab ? l->engine->vocab : d->vocab;
}

static int32_t decide_greedily(const ds_decoder *d, const level *l, const float *logits, const int32_t *draft,
                               int32_t count, int32_t *n_accepted, int32_t *next) {
  for (int32_t i = 0;; ++i) {
    *next = ds_argmax(logits + (size_t)i * (size_t)l->engine->vocab, shared_vocab(d, l));
    if (*next < 0) return *next;
    *n_accepted = i;
    if (i == count || *next != draft[i]) return DS_OK;
  }
}

static int32_t write_laws(ds_decoder *d, const level *l, const float *logits, int32_t n_rows, double *laws) {
  const ds_sampling *s = &d->sampling;
  int32_t known = shared_vocab(d, l), status = DS_OK;
  for (int32_t r = 0; r < n_rows && status == DS_OK; ++r) {
    double *law = laws + (size_t)r * (size_t)d->vocab;
    status = ds_write_laws(logits + (size_t)r * (size_t)l->engine->vocab, 1, known, s->temperature, s->top_k,
                           s->top_p, d->scratch, law);
    memset(law + known, 0, (size_t)(d->vocab - known) * sizeof *law);
  }
  return status;
}

/* Where in which stream the next n uniforms stand. */
static uint64_t take_uniforms(const ds_decoder *d, level *l, int32_t position, int32_t n, uint64_t *counter) {
  if (d->sampling.rule == DS_RULE_EXACT) {
    *counter = (uint64_t)position;
    return BY_POSITION;
  }
  *counter = l->drawn;
  l->drawn += (uint64_t)n;
  return l->stream;
}

static int32_t check_verdict(const ds_decoder *d, int32_t count, int32_t n_accepted, int32_t next) {
  if (n_accepted >= 0 && n_accepted <= count && next >= 0 && next < d->vocab) return DS_OK;
  return ds_fail(DS_ERROR_ARGUMENT, "verify accepts %d of %d and goes on with token %d", n_accepted, count,
                 next);
}

static int32_t decide_on_device(ds_decoder *d, level *l, int32_t length, int32_t count, int32_t row,
                                int32_t *n_accepted, int32_t *next) {
  const ds_sampling *s = &d->sampling;
  ds_decision decision = {.temperature = s->temperature,
                          .top_p = s->top_p,
                          .top_k = s->top_k,
                          .rule = s->rule,
                          .seed = s->seed,
                          .n_draft = count,
                          .draft = d->ids + length,
                          .drafter = l->inner && !ds_is_greedy(d) ? l->inner->engine : NULL,
                          .row = row};
  if (!ds_is_greedy(d)) decision.stream = take_uniforms(d, l, length, count + 2, &decision.counter);
  int32_t status = l->engine->decide(l->engine, &decision, n_accepted, next);
  return status < 0 ? status : check_verdict(d, count, *n_accepted, *next);
}

/* Accept a prefix of the `count` tokens drafted behind the first `length` and choose the one after it. `row`
 * is the place of the first in the proposal that l is building: afterwards the laws from there on are those
 * of the accepted tokens and of the next one. */
static int32_t decide(ds_decoder *d, level *l, const float *logits, int32_t length, int32_t count,
                      int32_t row, int32_t *n_accepted, int32_t *next) {
  const int32_t *draft = d->ids + length;
  if (d->on_device) return decide_on_device(d, l, length, count, row, n_accepted, next);
  if (ds_is_greedy(d)) return decide_greedily(d, l, logits, draft, count, n_accepted, next);
  double *laws = l->laws + (size_t)row * (size_t)d->vocab;
  int32_t status = write_laws(d, l, logits, count + 1, laws);
  if (status != DS_OK) return status;
  uint64_t counter, stream = take_uniforms(d, l, length, count + 2, &counter);
  ds_uniforms(d->sampling.seed, stream, counter, count + 2, d->uniforms);
  status = d->sampling.verify(d->sampling.rule, count, d->vocab, laws, l->inner ? l->inner->laws : NULL,
                              draft, d->uniforms, n_accepted, next);
  return status < 0 ? status : check_verdict(d, count, *n_accepted, *next);
}

static int is_eos(const ds_decoder *d, int32_t token) {
  for (int32_t e = 0; e < d->n_eos; ++e)
    if (token == d->eos[e]) return 1;
  return 0;
}

/* How many of the `count` tokens from `start` remain if nothing may follow an end-of-text token. */
static int32_t cut_at_eos(const ds_decoder *d, int32_t start, int32_t count) {
  for (int32_t i = 0; i < count; ++i)
    if (is_eos(d, d->ids[start + i])) return i + 1;
  return count;
}

/* ---- Rounds -------------------------------------------------------------------------------------------- */

/* Of what was proposed, only the first `length` tokens of the sequence stand. */
static void roll_back(level *l, int32_t length) {
  for (; l && l->engine; l = l->inner)
    if (l->kept > length) l->kept = length;
}

/* Whether l's drafts end where they stop to pay. */
static int is_scheduled(const level *l) {
  return l->above && l->above->pace.costs && (!l->engine || l->pace.costs);
}

static void record_verdict(level *drafter, int32_t drafted, int32_t accepted) {
  ds_level_stats *s = &drafter->stats;
  s->asked += 1;
  s->drafted += drafted;
  s->accepted += accepted;
  for (int32_t i = 0; i < drafted; ++i) {
    s->drafted_at[i] += 1;
    s->accepted_at[i] += i < accepted;
  }
  if (is_scheduled(drafter)) ds_trust_learn(&drafter->trust, drafter->buckets, drafted, accepted);
}

static int32_t propose(ds_decoder *d, level *l, int32_t length, int32_t count);

/* One round: draft, verify, write 1 .. room tokens behind the first `length`; returns how many. */
static int32_t advance(ds_decoder *d, level *l, int32_t length, int32_t room, int32_t row) {
  int32_t drafted = 0, accepted = 0, next = 0;
  double clock = l->inner ? l->inner->clock : 0;
  if (l->inner && room > 1) {
    drafted = propose(d, l->inner, length, l->inner->n_draft < room ? l->inner->n_draft : room - 1);
    if (drafted < 0) return drafted;
  }
  const float *logits = NULL;
  int32_t status = read_to(d, l, length + drafted, drafted + 1, d->on_device ? NULL : &logits);
  if (status != DS_OK) return status;

  double began = now_ms();
  if (l->inner && l->inner->drafter && l->inner->drafter->observe) {
    status = l->inner->drafter->observe(l->inner->drafter, d->ids + length - 1, drafted + 1, logits,
                                        l->engine->vocab);
    if (status < 0) return status;
    double spent = now_ms() - began;
    l->inner->stats.busy_ms += spent;
    began += spent;
  }
  status = decide(d, l, logits, length, drafted, row, &accepted, &next);
  if (status != DS_OK) return status;
  if (is_scheduled(l))
    for (int32_t i = 0; i <= accepted; ++i)
      l->buckets[row + i] =
          ds_bucket_of_law(logits + (size_t)i * (size_t)l->engine->vocab, shared_vocab(d, l));
  d->ids[length + accepted] = next;
  roll_back(l, length + accepted);
  int32_t emitted = cut_at_eos(d, length, accepted + 1);
  l->stats.rounds += 1;
  l->stats.discarded += accepted + 1 - emitted;
  if (l->inner && room > 1) record_verdict(l->inner, drafted, accepted);
  double spent = ds_pace_of_call(&l->pace, drafted + 1) + (l->inner ? l->inner->clock - clock : 0);
  l->clock += spent;
  ds_pace_add(&l->pace, spent, emitted);
  l->stats.decide_ms += now_ms() - began;
  return emitted;
}

/* Tell a drafter what stands. Tokens that the levels above only propose are not learnt from. */
static int32_t tell(ds_decoder *d, level *l) {
  int32_t status = l->drafter->append(l->drafter, d->ids + l->kept, d->committed - l->kept);
  if (status >= 0) l->kept = d->committed;
  return status;
}

/* What needs no model. */
static int32_t propose_text(ds_decoder *d, level *l, int32_t length, int32_t count) {
  int32_t support[DS_MAX_DRAFT], status = tell(d, l);
  if (status < 0) return status;
  int32_t drafted =
      l->drafter->draft(l->drafter, d->ids + l->kept, length - l->kept, count, d->ids + length, support);
  if (drafted <= 0) return drafted;
  if (drafted > count)
    return ds_fail(DS_ERROR_ARGUMENT, "a drafter proposes %d tokens where %d were asked for", drafted, count);
  for (int32_t i = 0; i < drafted; ++i)
    if (d->ids[length + i] < 0 || d->ids[length + i] >= d->vocab)
      return ds_fail(DS_ERROR_ARGUMENT, "a drafter proposes token %d, outside the vocabulary of %d",
                     d->ids[length + i], d->vocab);
  drafted = cut_at_eos(d, length, drafted);
  if (!is_scheduled(l)) return drafted;
  for (int32_t i = 0; i < drafted; ++i) l->buckets[i] = ds_bucket_of_match(support[i]);
  drafted = ds_length_that_pays(&l->above->pace, &l->trust, l->buckets, drafted);
  ds_trust_note(&l->trust, drafted);
  return drafted;
}

static int32_t propose_tokens(ds_decoder *d, level *l, int32_t length, int32_t count) {
  int32_t have = 0, scheduled = is_scheduled(l);
  while (have < count && (!scheduled || ds_pays_to_go_on(&l->above->pace, &l->pace, &l->trust, l->buckets,
                                                         have, count - have))) {
    int32_t written = advance(d, l, length + have, count - have, have);
    if (written < 0) return written;
    have += written;
    if (is_eos(d, d->ids[length + have - 1])) break;
  }
  if (!scheduled) return have;
  if (ds_is_greedy(d) || d->sampling.rule == DS_RULE_EXACT)
    have = ds_length_that_pays(&l->above->pace, &l->trust, l->buckets, have);
  ds_trust_note(&l->trust, have);
  return have;
}

/* Draft at most `count` tokens to follow the first `length` ones, and write them there. */
static int32_t propose(ds_decoder *d, level *l, int32_t length, int32_t count) {
  double began = now_ms();
  int32_t drafted = l->engine ? propose_tokens(d, l, length, count) : propose_text(d, l, length, count);
  l->stats.busy_ms += now_ms() - began;
  return drafted;
}

/* The first round reads the prompt and drafts nothing, so the first token is not kept waiting for the drafters
 * to read it too. Later rounds draft no more than the room left, so nothing is decoded past max_new_tokens. */
int32_t ds_decoder_step(ds_decoder *d, int32_t *tokens, int32_t room) {
  if (!d || !tokens) return ds_fail(DS_ERROR_ARGUMENT, "step wants a decoder and room for tokens");
  if (!d->begun) return ds_fail(DS_ERROR_ARGUMENT, "no generation is under way: begin one");
  level *target = &d->levels[d->n_levels - 1];
  int32_t most = target->inner ? target->inner->n_draft + 1 : 1;
  if (room < most)
    return ds_fail(DS_ERROR_ARGUMENT, "room for %d tokens; a round gives up to %d", room, most);
  if (d->left == 0) return 0;

  int32_t count = advance(d, target, d->committed, d->first ? 1 : d->left, 0);
  if (count < 0) {
    d->begun = 0;
    return count;
  }
  memcpy(tokens, d->ids + d->committed, (size_t)count * sizeof *tokens);
  d->first = 0;
  d->committed += count;
  d->left = is_eos(d, tokens[count - 1]) ? 0 : d->left - count;
  if (d->left == 0 && d->levels[0].drafter) { /* it may want all of this generation for the next */
    int32_t status = tell(d, &d->levels[0]);
    if (status < 0) return status;
  }
  return count;
}
