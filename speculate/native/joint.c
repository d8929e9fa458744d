/* Joint decoding: the law of two models, and the rounds in which they propose and read by turns.
 *
 * Tokens 0 .. committed are decided. Behind them lie `pending` proposals of one model, the author, each with the
 * law that it was drawn from. The other model reads them, and then both have said what they think of every one:
 * a verdict takes r for the target's law. What it draws after a draft that stands as a whole comes from
 * the row behind it, which holds the reader's own law: so it is a proposal like any other, and is verified in
 * the next round. The end of a proposal depends on the tokens kept in it alone, as in loop.c.
 */
#include "joint.h"
#include "arguments.h"
#include "laws.h"
#include "numbers.h"
#include "vector.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { FIRST, SECOND };
enum { VERDICTS = 1, PROPOSALS = 2 /* streams of random numbers */ };

typedef struct {
  ds_engine *engine;
  int32_t kept; /* cache slots that hold tokens of the sequence; the newest token is never among them */
  ds_joint_stats stats;
} member;

struct ds_joint {
  member members[DS_JOINT_MODELS];
  ds_joint_settings with;
  int32_t vocab, committed, pending, author, left, n_eos, begun;
  uint64_t drawn[PROPOSALS + 1];
  int32_t *ids, *eos;
  float *logits;           /* [DS_JOINT_MAX_DRAFT, vocab] of the author, from which each proposal was drawn */
  double *proposed, *laws; /* their laws; r of each and the row behind them [DS_JOINT_MAX_DRAFT + 1, vocab] */
  void *memory;            /* for one row's law */
};

/* ---- The law ------------------------------------------------------------------------------------------- */

/* Room for ds_write_laws, and for a law of the second model. */
static size_t memory_size(int32_t vocab) {
  return (size_t)vocab * sizeof(double) + ds_laws_scratch_size(vocab);
}

DS_WIDE static void mix(double weight, const double *second, int32_t n, double *first) {
  for (int32_t i = 0; i < n; ++i) first[i] = (1 - weight) * first[i] + weight * second[i];
}

/* In place of the law of the first model, which says where the joint one may have mass. */
static int32_t contrast(const ds_joint_settings *with, double temperature, const float *first,
                        const float *second, int32_t n, double *law) {
  float most = first[ds_argmax(first, n)];
  double best = -INFINITY, total = 0;
  for (int32_t i = 0; i < n; ++i) {
    if (ds_exp_nonpositive((double)first[i] - most) < with->cutoff) law[i] = 0;
    if (!(law[i] > 0)) continue;
    double score = first[i] - with->weight * second[i];
    if (!isfinite(score))
      return ds_fail(DS_ERROR_ARGUMENT, "token %d has the logits %g and %g, and so no contrast", i, first[i],
                     second[i]);
    best = score > best ? score : best;
  }
  for (int32_t i = 0; i < n; ++i)
    if (law[i] > 0)
      total += law[i] = ds_exp_nonpositive(((first[i] - with->weight * second[i]) - best) / temperature);
  for (int32_t i = 0; i < n; ++i) law[i] /= total;
  return DS_OK;
}

static void keep_likeliest(int32_t n, double *law) {
  int32_t best = 0;
  for (int32_t i = 1; i < n; ++i)
    if (law[i] > law[best]) best = i;
  memset(law, 0, (size_t)n * sizeof *law);
  law[best] = 1;
}

static int32_t write_joint_law(const ds_joint_settings *with, int32_t n, const float *first,
                               const float *second, void *memory, double *law) {
  int greedy = with->temperature == 0;
  double temperature = greedy ? 1 : with->temperature, top_p = greedy ? 1 : with->top_p;
  int32_t top_k = greedy ? 0 : with->top_k;
  double *other = memory;
  int32_t status = ds_write_laws(first, 1, n, temperature, top_k, top_p, other + n, law);
  if (status == DS_OK) status = ds_write_laws(second, 1, n, temperature, top_k, top_p, other + n, other);
  if (status != DS_OK) return status;
  if (with->kind == DS_JOINT_ENSEMBLE)
    mix(with->weight, other, n, law);
  else
    status = contrast(with, temperature, first, second, n, law);
  if (greedy && status == DS_OK) keep_likeliest(n, law);
  return status;
}

static int32_t check_settings(const ds_joint_settings *with) {
  if (!with) return ds_fail(DS_ERROR_ARGUMENT, "settings are missing");
  int ensemble = with->kind == DS_JOINT_ENSEMBLE;
  if (!ensemble && with->kind != DS_JOINT_CONTRASTIVE)
    return ds_fail(DS_ERROR_ARGUMENT, "kind %d is not one of ds_joint_kind", with->kind);
  if (!(with->weight >= 0 && with->weight <= (ensemble ? 1 : 1e6)))
    return ds_fail(DS_ERROR_ARGUMENT, "weight is %g; %s is wanted", with->weight,
                   ensemble ? "a share from 0 to 1" : "a factor from 0 to 1e6");
  if (!(with->cutoff >= 0 && with->cutoff <= 1))
    return ds_fail(DS_ERROR_ARGUMENT, "cutoff is %g, outside [0, 1]; 0 turns it off", with->cutoff);
  if (with->rule != DS_RULE_TOKEN && with->rule != DS_RULE_BLOCK)
    return ds_fail(DS_ERROR_ARGUMENT, "rule %d; a joint law is verified by token or by block", with->rule);
  for (int32_t m = 0; m < DS_JOINT_MODELS; ++m)
    if (with->n_draft[m] < 0 || with->n_draft[m] > DS_JOINT_MAX_DRAFT)
      return ds_fail(DS_ERROR_ARGUMENT, "model %d proposes %d tokens; 0 to %d are wanted", m,
                     with->n_draft[m], DS_JOINT_MAX_DRAFT);
  return ds_check_processors(with->temperature, with->top_k, with->top_p);
}

int32_t ds_joint_law(const ds_joint_settings *with, int32_t vocab, const float *first, const float *second,
                     double *law) {
  int32_t status = check_settings(with);
  if (status != DS_OK) return status;
  if (vocab < 1 || !first || !second || !law)
    return ds_fail(DS_ERROR_ARGUMENT, "a joint law wants two rows of %d logits and room for a law", vocab);
  void *memory = malloc(memory_size(vocab));
  if (!memory) return ds_fail(DS_ERROR_MEMORY, "no memory for laws of %d tokens", vocab);
  status = write_joint_law(with, vocab, first, second, memory, law);
  free(memory);
  return status;
}

/* ---- A decoder's life ---------------------------------------------------------------------------------- */

ds_joint *ds_joint_create(ds_engine *first, ds_engine *second) {
  ds_engine *engines[DS_JOINT_MODELS] = {first, second};
  for (int32_t m = 0; m < DS_JOINT_MODELS; ++m)
    if (!engines[m] || !engines[m]->reserve || !engines[m]->forward || engines[m]->vocab < 1) {
      ds_fail(DS_ERROR_ARGUMENT, "model %d has no functions or no vocabulary", m);
      return NULL;
    }
  int is_shared = first == second || first->host || second->host;
  if (is_shared || first->vocab != second->vocab) {
    ds_fail(DS_ERROR_ARGUMENT,
            is_shared ? "both models are one engine, or share a cache"
                      : "vocabularies of %d and %d tokens have no joint law",
            first->vocab, second->vocab);
    return NULL;
  }
  ds_joint *j = calloc(1, sizeof *j);
  if (!j) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a joint decoder");
    return NULL;
  }
  for (int32_t m = 0; m < DS_JOINT_MODELS; ++m) j->members[m].engine = engines[m];
  j->vocab = first->vocab;
  return j;
}

static void release(ds_joint *j) {
  free(j->ids);
  free(j->eos);
  free(j->logits);
  free(j->proposed);
  free(j->laws);
  free(j->memory);
  j->ids = j->eos = NULL;
  j->logits = NULL;
  j->proposed = j->laws = NULL;
  j->memory = NULL;
}

void ds_joint_free(ds_joint *j) {
  if (!j) return;
  release(j);
  free(j);
}

static int32_t allocate(ds_joint *j, int32_t slots, int32_t n_eos) {
  size_t row = (size_t)j->vocab, rows = DS_JOINT_MAX_DRAFT;
  j->ids = malloc((size_t)slots * sizeof *j->ids);
  j->eos = malloc((size_t)(n_eos + 1) * sizeof *j->eos);
  j->logits = malloc(rows * row * sizeof *j->logits);
  j->proposed = malloc(rows * row * sizeof *j->proposed);
  j->laws = malloc((rows + 1) * row * sizeof *j->laws);
  j->memory = malloc(memory_size(j->vocab));
  if (j->ids && j->eos && j->logits && j->proposed && j->laws && j->memory) return DS_OK;
  return ds_fail(DS_ERROR_MEMORY, "no memory to decode %d tokens", slots);
}

int32_t ds_joint_begin(ds_joint *j, const ds_joint_settings *settings, const int32_t *prompt,
                       int32_t n_prompt, int32_t max_new_tokens, const int32_t *eos, int32_t n_eos) {
  if (!j) return ds_fail(DS_ERROR_ARGUMENT, "begin wants a joint decoder");
  j->begun = 0;
  int32_t status = check_settings(settings);
  if (status != DS_OK) return status;
  if (n_prompt < 1 || max_new_tokens < 1 || n_eos < 0 || !prompt || (n_eos && !eos))
    return ds_fail(DS_ERROR_ARGUMENT, "%d prompt tokens and %d new ones; at least one of each is wanted",
                   n_prompt, max_new_tokens);
  status = ds_check_tokens("prompt", n_prompt, prompt, j->vocab);
  if (status == DS_OK) status = ds_check_tokens("eos", n_eos, eos, j->vocab);
  if (status != DS_OK) return status;
  for (int32_t m = 0; m < DS_JOINT_MODELS; ++m)
    if ((int64_t)n_prompt + max_new_tokens > j->members[m].engine->max_seq_len)
      return ds_fail(DS_ERROR_ARGUMENT,
                     "%d prompt tokens and %d new ones do not fit the %d slots of model %d", n_prompt,
                     max_new_tokens, j->members[m].engine->max_seq_len, m);
  release(j);
  status = allocate(j, n_prompt + max_new_tokens, n_eos);
  for (int32_t m = 0; m < DS_JOINT_MODELS && status == DS_OK; ++m) {
    member *model = &j->members[m];
    model->kept = 0;
    memset(&model->stats, 0, sizeof model->stats);
    status = model->engine->reserve(model->engine, n_prompt + max_new_tokens);
  }
  if (status < 0) return status;
  memcpy(j->ids, prompt, (size_t)n_prompt * sizeof *prompt);
  if (n_eos) memcpy(j->eos, eos, (size_t)n_eos * sizeof *eos);
  j->with = *settings;
  if (!j->with.verify) j->with.verify = ds_verify_tree;
  j->committed = n_prompt;
  j->left = max_new_tokens;
  j->n_eos = n_eos;
  j->pending = 0;
  memset(j->drawn, 0, sizeof j->drawn);
  j->begun = 1;
  return DS_OK;
}

/* ---- Rounds -------------------------------------------------------------------------------------------- */

static int32_t forward(const ds_joint *j, member *m, int32_t n_rows, int32_t n_logits, const float **logits) {
  *logits = NULL;
  int32_t status =
      m->engine->forward(m->engine, n_rows, j->ids + m->kept, m->kept, NULL, NULL, n_logits, logits);
  if (status < 0) return status;
  if (!*logits) return ds_fail(DS_ERROR_ENGINE, "an engine gave no logits");
  m->kept += n_rows;
  m->stats.calls += 1;
  m->stats.rows += n_rows;
  return DS_OK;
}

/* Bring the cache up to token `end`; the logits after each of the last n_logits tokens. */
static int32_t read_to(const ds_joint *j, member *m, int32_t end, int32_t n_logits, const float **logits) {
  int32_t status = DS_OK;
  while (status == DS_OK && end - m->kept >= DS_PREFILL_ROWS + n_logits)
    status = forward(j, m, DS_PREFILL_ROWS, 1, logits);
  return status == DS_OK ? forward(j, m, end - m->kept, n_logits, logits) : status;
}

static void draw_uniforms(ds_joint *j, int stream, int32_t n, double *uniforms) {
  ds_uniforms(j->with.seed, (uint64_t)stream, j->drawn[stream], n, uniforms);
  j->drawn[stream] += (uint64_t)n;
}

static int is_eos(const ds_joint *j, int32_t token) {
  for (int32_t e = 0; e < j->n_eos; ++e)
    if (token == j->eos[e]) return 1;
  return 0;
}

static int32_t write_own_law(const ds_joint *j, const float *logits, double *law) {
  const ds_joint_settings *with = &j->with;
  return ds_write_laws(logits, 1, j->vocab, with->temperature, with->top_k, with->top_p, j->memory, law);
}

static float *logits_row(const ds_joint *j, int32_t i) { return j->logits + (size_t)i * (size_t)j->vocab; }

static double *law_row(const ds_joint *j, double *laws, int32_t i) {
  return laws + (size_t)i * (size_t)j->vocab;
}

/* Let the author add to its proposals until there are `count`, or an end of text. */
static int32_t propose(ds_joint *j, int32_t count) {
  member *m = &j->members[j->author];
  while (j->pending < count && !(j->pending && is_eos(j, j->ids[j->committed + j->pending - 1]))) {
    const float *logits;
    int32_t none[1], accepted, i = j->pending, status = read_to(j, m, j->committed + i, 1, &logits);
    if (status != DS_OK) return status;
    memcpy(logits_row(j, i), logits, (size_t)j->vocab * sizeof *logits);
    double *law = law_row(j, j->proposed, i), uniforms[2];
    if ((status = write_own_law(j, logits, law)) != DS_OK) return status;
    draw_uniforms(j, PROPOSALS, 2, uniforms);
    status = j->with.verify(DS_RULE_EXACT, 0, j->vocab, law, NULL, NULL, NULL, uniforms, none, &accepted,
                            &j->ids[j->committed + i]);
    if (status != DS_OK) return status;
    j->pending += 1;
    m->stats.proposed += 1;
  }
  return DS_OK;
}

/* r of each proposal, and behind them the reader's own law; with none, r of the next token. */
static int32_t write_laws(const ds_joint *j, const float *author, const float *reader) {
  const float *first = j->author == FIRST ? author : reader, *second = j->author == FIRST ? reader : author;
  for (int32_t i = 0, n = j->pending ? j->pending : 1; i < n; ++i) {
    size_t row = (size_t)i * (size_t)j->vocab;
    int32_t status =
        write_joint_law(&j->with, j->vocab, first + row, second + row, j->memory, law_row(j, j->laws, i));
    if (status != DS_OK) return status;
  }
  return j->pending ? write_own_law(j, reader + (size_t)j->pending * (size_t)j->vocab,
                                    law_row(j, j->laws, j->pending))
                    : DS_OK;
}

/* The reader's word after a draft that stands becomes the first of its own proposals. */
static void take_turn(ds_joint *j, const float *logits, int32_t after) {
  member *reader = &j->members[!j->author];
  j->author = !j->author;
  j->pending = 1;
  reader->stats.proposed += 1;
  memcpy(logits_row(j, 0), logits + (size_t)after * (size_t)j->vocab, (size_t)j->vocab * sizeof *logits);
  memcpy(j->proposed, law_row(j, j->laws, after), (size_t)j->vocab * sizeof *j->proposed);
}

static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

/* Writes the tokens that stand behind `committed`; returns how many. */
static int32_t advance(ds_joint *j) {
  if (j->pending == 0) j->author = SECOND;
  int32_t status = propose(j, smaller(j->with.n_draft[j->author], j->left));
  if (status != DS_OK) return status;
  member *author = &j->members[j->author], *reader = &j->members[!j->author];
  const float *read, *said = j->logits;
  int32_t n = j->pending, accepted, next;
  status = read_to(j, reader, j->committed + n, n + 1, &read);
  if (status == DS_OK && n == 0) status = read_to(j, author, j->committed, 1, &said);
  if (status == DS_OK) status = write_laws(j, said, read);
  if (status != DS_OK) return status;

  double uniforms[DS_JOINT_MAX_DRAFT + 2];
  draw_uniforms(j, VERDICTS, n + 2, uniforms);
  int32_t parents[DS_JOINT_MAX_DRAFT + 1], path[DS_JOINT_MAX_DRAFT + 1]; /* a chain is a tree too */
  for (int32_t i = 0; i < n; ++i) parents[i] = i - 1;
  status =
      j->with.verify(j->with.rule == DS_RULE_TOKEN ? DS_RULE_RRS : DS_RULE_TRAVERSAL, n, j->vocab, j->laws,
                     j->proposed, j->ids + j->committed, parents, uniforms, path, &accepted, &next);
  if (status < 0) return status;
  if (accepted < 0 || accepted > n || next < 0 || next >= j->vocab)
    return ds_fail(DS_ERROR_ARGUMENT, "verify accepts %d of %d and goes on with token %d", accepted, n, next);
  author->stats.accepted += accepted;
  int whole = n > 0 && accepted == n;
  int32_t decided = accepted + !whole;
  int goes_on = whole && accepted < j->left && j->with.n_draft[!j->author] > 0;
  /* Whoever reads next needs the logits after the last token that stands. */
  int32_t stands = j->committed + accepted - (whole && !goes_on);
  for (int32_t m = 0; m < DS_JOINT_MODELS; ++m) j->members[m].kept = smaller(j->members[m].kept, stands);
  if (accepted < j->left) j->ids[j->committed + accepted] = next;
  j->pending = 0;
  if (goes_on) take_turn(j, read, n);
  for (int32_t i = 0; i < decided; ++i)
    if (is_eos(j, j->ids[j->committed + i])) return i + 1;
  return decided;
}

int32_t ds_joint_step(ds_joint *j, int32_t *tokens, int32_t room) {
  if (!j || !tokens) return ds_fail(DS_ERROR_ARGUMENT, "step wants a joint decoder and room for tokens");
  if (!j->begun) return ds_fail(DS_ERROR_ARGUMENT, "no generation is under way: begin one");
  if (room < DS_JOINT_MAX_DRAFT + 1)
    return ds_fail(DS_ERROR_ARGUMENT, "room for %d tokens; a round gives up to %d", room,
                   DS_JOINT_MAX_DRAFT + 1);
  if (j->left == 0) return 0;
  int32_t count = advance(j);
  if (count < 0) {
    j->begun = 0;
    return count;
  }
  memcpy(tokens, j->ids + j->committed, (size_t)count * sizeof *tokens);
  j->committed += count;
  j->left = is_eos(j, tokens[count - 1]) ? 0 : j->left - count;
  return count;
}

int32_t ds_joint_count(const ds_joint *j, int32_t model, ds_joint_stats *stats) {
  if (!j || !stats || model < 0 || model >= DS_JOINT_MODELS)
    return ds_fail(DS_ERROR_ARGUMENT, "model %d of a joint decoder of %d", model, DS_JOINT_MODELS);
  *stats = j->members[model].stats;
  return DS_OK;
}
