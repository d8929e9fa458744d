/* Huge pages as Linux gives them on request, and the process's map, which says what mirrors a file. */
#define _DEFAULT_SOURCE /* madvise, MAP_ANONYMOUS */
#include "pages.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#if defined(MADV_HUGEPAGE)

enum { HUGE_PAGE = 2 << 20, FEW_PARTS = 64 };

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static int are_given(void) {
  const char *wanted = getenv("DRAFTSMITH_HUGE_PAGES");
  if (wanted && !strcmp(wanted, "0")) return 0;
  char words[64] = "";
  FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (!file) return 0;
  int given = fgets(words, sizeof words, file) && !strstr(words, "[never]");
  fclose(file);
  return given;
}

/* The number behind `name` in a file, in any column, or the file's own for "". SIZE_MAX: none, so no limit. */
static size_t read_number(const char *path, const char *name) {
  size_t n = strlen(name), value = SIZE_MAX;
  char line[256];
  FILE *file = fopen(path, "r");
  if (!file) return value;
  while (fgets(line, sizeof line, file))
    if (!strncmp(line, name, n) && sscanf(line + n, "%zu", &value) == 1) break;
  fclose(file);
  return value;
}

/* The least limit of the group at `path` and of those around it. */
static size_t find_limit(const char *root, const char *path, const char *name) {
  size_t least = SIZE_MAX, n = strcspn(path, "\n");
  for (;; --n) {
    char file[512];
    snprintf(file, sizeof file, "%s%.*s/%s", root, (int)n, path, name);
    size_t limit = read_number(file, "");
    if (limit < least) least = limit;
    while (n > 0 && path[n - 1] != '/') --n;
    if (n == 0) return least;
  }
}

/* Bytes that are free, or that this process's control groups, of either version, allow. */
static size_t find_allowed(void) {
  size_t least = read_number("/proc/meminfo", "MemAvailable:");
  least = least < SIZE_MAX >> 10 ? least << 10 : SIZE_MAX;
  char line[512];
  FILE *groups = fopen("/proc/self/cgroup", "r");
  while (groups && fgets(line, sizeof line, groups)) {
    const char *list = strchr(line, ':'), *path = list ? strchr(list + 1, ':') : NULL;
    size_t limit = SIZE_MAX;
    if (path && !strncmp(list, "::", 2)) limit = find_limit("/sys/fs/cgroup", path + 1, "memory.max");
    if (path && !strncmp(list, ":memory:", 8))
      limit = find_limit("/sys/fs/cgroup/memory", path + 1, "memory.limit_in_bytes");
    if (limit < least) least = limit;
  }
  if (groups) fclose(groups);
  return least;
}

void *ds_take_pages(size_t n_bytes) {
  if (!n_bytes || n_bytes > find_allowed() / 2 || !are_given()) return NULL;
  size_t size = round_up(n_bytes, HUGE_PAGE);
  char *all = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return NULL;
  size_t before = round_up((uintptr_t)all, HUGE_PAGE) - (uintptr_t)all;
  if (before) munmap(all, before);
  if (before < HUGE_PAGE) munmap(all + before + size, HUGE_PAGE - before);
  if (madvise(all + before, size, MADV_HUGEPAGE) == 0) return all + before;
  munmap(all + before, size);
  return NULL;
}

void ds_return_pages(void *pages, size_t n_bytes) {
  if (pages) munmap(pages, round_up(n_bytes, HUGE_PAGE));
}

/* The next part of the process's map that mirrors a file. Some that have a path are memory all the same: what is
 * forgotten of those is lost. */
static bool next_file(FILE *map, ds_file_part *part) {
  char line[512];
  while (fgets(line, sizeof line, map)) { /* the rest of a long line is none of its own */
    char path[16];
    int n = sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %*s %*s %*s %*s %15s", &part->first, &part->end, path);
    if (n == 3 && path[0] == '/' && strncmp(path, "/dev/", 5) && strncmp(path, "/anon_hugepage", 14) &&
        strncmp(path, "/memfd:", 7))
      return true;
  }
  return false;
}

void ds_list_files(ds_file_map *files) {
  *files = (ds_file_map){NULL, 0};
  FILE *map = fopen("/proc/self/maps", "r");
  ds_file_part part;
  while (map && next_file(map, &part)) {
    if (files->n_parts % FEW_PARTS == 0) {
      void *more = realloc(files->parts, (files->n_parts + FEW_PARTS) * sizeof part);
      if (!more) break;
      files->parts = more;
    }
    files->parts[files->n_parts++] = part;
  }
  if (map) fclose(map);
}

ds_span ds_find_file_pages(const ds_file_map *files, ds_span span) {
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  for (size_t i = 0; i < files->n_parts; ++i) {
    uintptr_t from = (uintptr_t)span.start, to = from + span.n_bytes;
    if (from < files->parts[i].first) from = files->parts[i].first;
    if (to > files->parts[i].end) to = files->parts[i].end;
    from = round_up(from, page);
    to = to / page * page;
    if (from < to) return (ds_span){(const char *)from, to - from};
  }
  return (ds_span){span.start, 0};
}

void ds_forget_pages(ds_span span) {
  if (span.n_bytes) madvise((void *)(uintptr_t)span.start, span.n_bytes, MADV_DONTNEED);
}

#else

void *ds_take_pages(size_t n_bytes) {
  (void)n_bytes;
  return NULL;
}
void ds_return_pages(void *pages, size_t n_bytes) { (void)pages, (void)n_bytes; }
void ds_list_files(ds_file_map *files) { *files = (ds_file_map){NULL, 0}; }
ds_span ds_find_file_pages(const ds_file_map *files, ds_span span) {
  (void)files;
  return (ds_span){span.start, 0};
}
void ds_forget_pages(ds_span span) { (void)span; }

#endif

void ds_forget_freed(void) {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}
