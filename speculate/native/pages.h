/* Memory in huge pages, and what becomes of the file's pages once they are copied. */
#ifndef DRAFTSMITH_PAGES_H
#define DRAFTSMITH_PAGES_H

#include <stddef.h>

/* Zeros, in huge pages where the system has some free. NULL where it gives none to anybody, where the environment
 * variable DRAFTSMITH_HUGE_PAGES is 0, or where memory is short. */
void *ds_take_pages(size_t n_bytes);
void ds_return_pages(void *pages, size_t n_bytes);

typedef struct {
  const char *start;
  size_t n_bytes;
} ds_span;

/* Pages of these spans that only mirror a file leave memory; whoever reads them gets them from the file again. Other
 * memory is left alone. */
void ds_forget_file_pages(const ds_span *spans, size_t n_spans);

#endif
