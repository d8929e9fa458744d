/* Memory in huge pages, and memory that nobody needs any more: a file's pages that were copied, and what was freed. */
#ifndef DRAFTSMITH_PAGES_H
#define DRAFTSMITH_PAGES_H

#include <stddef.h>
#include <stdint.h>

/* Zeros, in huge pages where the system has some free. NULL where it gives none to anybody, where the environment
 * variable DRAFTSMITH_HUGE_PAGES is 0, or where they would be more than half of the memory that is free or, in a
 * control group, allowed: what mirrors a file can be read again, these stay. */
void *ds_take_pages(size_t n_bytes);
void ds_return_pages(void *pages, size_t n_bytes);

typedef struct {
  const char *start;
  size_t n_bytes;
} ds_span;

/* Where the process mirrors files. */
typedef struct {
  uintptr_t first, end;
} ds_file_part;

typedef struct {
  ds_file_part *parts; /* [n_parts], to be freed */
  size_t n_parts;
} ds_file_map;

void ds_list_files(ds_file_map *files);

/* The whole pages of a span that mirror a file, or none. */
ds_span ds_find_file_pages(const ds_file_map *files, ds_span span);

/* The process lets go of these: whoever reads them gets them from the file again, or from the system's cache, and what
 * was written to them is lost. */
void ds_forget_pages(ds_span file_pages);

/* What the process has freed goes back to the system where its allocator would keep it. */
void ds_forget_freed(void);

#endif
