/* A datastore: much text on disk, indexed, to draft from what followed wherever it goes on as the output
 * does (REST, arXiv 2311.08252). Memory-mapped: it is open at once, whatever its size, and shared between
 * processes.
 *
 * Files      One file, for one byte order, written once. A file that is cut short, is no datastore or was
 *            built with another tokenizer is refused when it is opened. Damage inside makes drafts poor and is
 *            never a crash; a file that is cut short while it is open is beyond help.
 * Threads    A datastore may be read by many threads; a writer belongs to one.
 */
#ifndef DRAFTSMITH_DATASTORE_H
#define DRAFTSMITH_DATASTORE_H

#include "drafter.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  DS_TOKENIZER_BYTES = 32,      /* what tells tokenizers apart: the SHA-256 of tokenizer.json, or zeros */
  DS_DATASTORE_MAX_MATCH = 32,  /* tokens of context that are compared */
  DS_DATASTORE_MAX_DRAFT = 256, /* tokens of one draft */
};

typedef struct ds_datastore ds_datastore;

/* Open for drafting to a model with `vocab` ids whose tokenizer is tokenizer [DS_TOKENIZER_BYTES]. NULL on
 * failure. */
DS_API ds_datastore *ds_datastore_open(const char *path, int32_t vocab, const uint8_t *tokenizer);
DS_API void ds_datastore_free(ds_datastore *datastore);
DS_API int64_t ds_datastore_n_tokens(const ds_datastore *datastore);

/* Take the largest L in [2, DS_DATASTORE_MAX_MATCH] for which the last L tokens of context [n_context]
 * occur in the datastore, and at most 64 of the places where they do, evenly. The draft goes on as most of
 * these do, token by token, and ends where all have ended. Writes up to max_draft tokens and returns how
 * many; support as in drafter.h: the tokens that match and were drafted, times the share of the places
 * that still agree. */
DS_API int32_t ds_datastore_draft(const ds_datastore *datastore, const int32_t *context, int32_t n_context,
                                  int32_t max_draft, int32_t *draft, int32_t *support);

/* The datastore, borrowed, as a drafter. NULL on failure. */
DS_API ds_drafter *ds_datastore_drafter_create(const ds_datastore *datastore);

/* Write a datastore: create, append as often as one likes, finish, free. Memory is bounded: 4 bytes for
 * each of chunk_tokens (0: 2^24), at most 4 MiB for kinds of token and 256 KiB a thread, however long the text,
 * and what the system lends to mapped files. Sorting takes all processors, at most 8. A second
 * file of 4 bytes a token lies beside it until it is freed. */
typedef struct ds_datastore_writer ds_datastore_writer;
DS_API ds_datastore_writer *ds_datastore_writer_create(const char *path, const uint8_t *tokenizer,
                                                       int32_t chunk_tokens);
DS_API void ds_datastore_writer_free(ds_datastore_writer *writer);

/* Tokens that follow the ones before; DS_END_OF_REFERENCE ends a text. */
DS_API int32_t ds_datastore_writer_append(ds_datastore_writer *writer, const int32_t *tokens,
                                          int32_t n_tokens);

/* Index all that was appended. `progress`, if not NULL, is called now and then with tokens done and to do. */
DS_API int32_t ds_datastore_writer_finish(ds_datastore_writer *writer,
                                          void (*progress)(int64_t done, int64_t total));

#ifdef __cplusplus
}
#endif
#endif
