/* A pool for steps of microseconds. The caller opens a job, works on it beside the threads that come, closes
 * it and waits for those who came. A thread that is late (asleep, or robbed of its core by another process)
 * is not waited for: its share is taken by the others, and it finds the job closed. Who computes an item
 * never shows in the result, so neither does any of this. */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#include "pool.h"
#include "dispatch.h"
#include "error.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
  CACHE_LINE = 64,
  /* How long an idle thread keeps looking for the next job before it sleeps: longer than the gaps between the
   * kernels of one step, shorter than what another process would be given in its place. */
  WORKER_SPIN_NS = 100000,
  /* How long the caller waits for a thread that came. Asleep it leaves its core, which that thread may need.
   */
  CALLER_SPIN_NS = 30000,
  /* A companion that keeps the caller waiting for so long has lost its core to another process for a slice of the
   * scheduler, and soon will again. For some times as long the caller does without it, where there is only the one: half
   * the speed beats losing whole slices in turn. */
  LATE_NS = 1000000,
  ALONE_TIMES = 8,
};

/* The items that a thread has left, first | end << 32. The owner takes from the front, so that it reads
 * weights in the order in which they lie; others take from the end. */
typedef struct {
  _Alignas(CACHE_LINE) _Atomic uint64_t range;
} share;

struct ds_pool {
  /* Odd generation << 32 (a job is open) or even (closed), and the number of threads at work on it. A thread
   * joins by adding one to an open generation; once closed, nobody can. */
  _Alignas(CACHE_LINE) _Atomic uint64_t state;
  _Alignas(CACHE_LINE) atomic_int n_sleeping;
  atomic_bool caller_sleeps, stopping;

  /* The job; written only while closed and nobody is at work. */
  _Alignas(CACHE_LINE) ds_task *task;
  const void *job;

  int32_t n_threads, n_started;
  int64_t alone_until; /* the caller works alone until then; 0: it does not */
  const struct ds_kernels *kernels;
  pthread_mutex_t in_use, lock;
  pthread_cond_t opened, left;
  pthread_t threads[DS_MAX_THREADS];
  share shares[DS_MAX_THREADS];
};

typedef struct {
  ds_pool *pool;
  int32_t thread;
  atomic_bool taken;
} start;

static const uint64_t GENERATION = (uint64_t)1 << 32;

static bool is_open(uint64_t state) { return state & GENERATION; }
static uint32_t count_at_work(uint64_t state) { return (uint32_t)state; }

static void rest(void) {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* The arithmetic of every thread is IEEE's, subnormals included, whatever the host program has set. */
static uint32_t enter_ieee_mode(void) {
#if defined(__x86_64__)
  uint32_t previous = _mm_getcsr();
  if (previous != 0x1f80) _mm_setcsr(0x1f80);
  return previous;
#else
  return 0;
#endif
}

static void leave_ieee_mode(uint32_t previous) {
#if defined(__x86_64__)
  if (previous != 0x1f80) _mm_setcsr(previous);
#else
  (void)previous;
#endif
}

/* ---- Taking items -------------------------------------------------------------------------------------- */

static uint64_t make_range(int32_t first, int32_t end) {
  return (uint32_t)first | (uint64_t)(uint32_t)end << 32;
}
static int32_t first_of(uint64_t range) { return (int32_t)(uint32_t)range; }
static int32_t end_of(uint64_t range) { return (int32_t)(range >> 32); }

static int32_t take_own(share *own, int32_t *next) {
  uint64_t range = atomic_load_explicit(&own->range, memory_order_relaxed);
  while (first_of(range) < end_of(range)) {
    int32_t item = first_of(range), end = end_of(range);
    if (atomic_compare_exchange_weak(&own->range, &range, make_range(item + 1, end))) {
      *next = item + 1 < end ? item + 1 : -1;
      return item;
    }
  }
  return -1;
}

static int32_t take_from(share *other) {
  uint64_t range = atomic_load_explicit(&other->range, memory_order_relaxed);
  while (first_of(range) < end_of(range)) {
    int32_t first = first_of(range), item = end_of(range) - 1;
    if (atomic_compare_exchange_weak(&other->range, &range, make_range(first, item))) return item;
  }
  return -1;
}

static void work(ds_pool *pool, int32_t thread) {
  int32_t item, next;
  while ((item = take_own(&pool->shares[thread], &next)) >= 0) pool->task(pool->job, item, next, thread);
  for (int32_t i = 1; i < pool->n_threads; ++i) {
    share *other = &pool->shares[(thread + i) % pool->n_threads];
    while ((item = take_from(other)) >= 0) pool->task(pool->job, item, -1, thread);
  }
}

/* ---- Threads ------------------------------------------------------------------------------------------- */

/* Become one of those at work on a job that is open and not `done`, the last one worked on. */
static bool join(ds_pool *pool, uint64_t *done) {
  uint64_t state = atomic_load(&pool->state);
  while (is_open(state) && state / GENERATION != *done) {
    if (atomic_compare_exchange_weak(&pool->state, &state, state + 1)) {
      *done = state / GENERATION;
      return true;
    }
  }
  return false;
}

static void leave(ds_pool *pool) {
  uint64_t state = atomic_fetch_sub(&pool->state, 1) - 1;
  if (count_at_work(state) == 0 && !is_open(state) && atomic_load(&pool->caller_sleeps)) {
    pthread_mutex_lock(&pool->lock);
    pthread_cond_signal(&pool->left);
    pthread_mutex_unlock(&pool->lock);
  }
}

static bool find_job(ds_pool *pool, uint64_t *done) {
  int64_t limit = now_ns() + WORKER_SPIN_NS;
  do {
    for (int i = 0; i < 32; ++i) {
      if (join(pool, done)) return true;
      if (atomic_load_explicit(&pool->stopping, memory_order_relaxed)) return false;
      rest();
    }
  } while (now_ns() < limit);

  bool joined = false;
  pthread_mutex_lock(&pool->lock);
  atomic_fetch_add(&pool->n_sleeping, 1); /* before looking: who opens a job looks here after opening */
  while (!atomic_load(&pool->stopping) && !(joined = join(pool, done)))
    pthread_cond_wait(&pool->opened, &pool->lock);
  atomic_fetch_sub(&pool->n_sleeping, 1);
  pthread_mutex_unlock(&pool->lock);
  return joined;
}

static void *run_thread(void *argument) {
  start *begin = argument;
  ds_pool *pool = begin->pool;
  int32_t thread = begin->thread;
  atomic_store(&begin->taken, true);
  enter_ieee_mode();
  uint64_t done = 0;
  while (find_job(pool, &done)) {
    work(pool, thread);
    leave(pool);
  }
  return NULL;
}

/* ---- The caller ---------------------------------------------------------------------------------------- */

static void open_job(ds_pool *pool, ds_task *task, const void *job, int32_t n_items) {
  int64_t n_threads = pool->n_threads;
  pool->task = task;
  pool->job = job;
  for (int32_t t = 0; t < n_threads; ++t) {
    int32_t first = (int32_t)(t * (int64_t)n_items / n_threads);
    int32_t end = (int32_t)((t + 1) * (int64_t)n_items / n_threads);
    atomic_store_explicit(&pool->shares[t].range, make_range(first, end), memory_order_relaxed);
  }
  atomic_fetch_add(&pool->state, GENERATION);
  if (atomic_load(&pool->n_sleeping) > 0) {
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->opened);
    pthread_mutex_unlock(&pool->lock);
  }
}

static void close_job(ds_pool *pool) {
  if (count_at_work(atomic_fetch_add(&pool->state, GENERATION)) == 0) return;
  int64_t limit = now_ns() + CALLER_SPIN_NS;
  do {
    for (int i = 0; i < 32; ++i) {
      if (count_at_work(atomic_load(&pool->state)) == 0) return;
      rest();
    }
  } while (now_ns() < limit);
  pthread_mutex_lock(&pool->lock);
  atomic_store(&pool->caller_sleeps, true); /* before looking: who leaves looks here after leaving */
  while (count_at_work(atomic_load(&pool->state)) != 0) pthread_cond_wait(&pool->left, &pool->lock);
  atomic_store(&pool->caller_sleeps, false);
  pthread_mutex_unlock(&pool->lock);
  int64_t now = now_ns(), waited = now - limit;
  if (waited > LATE_NS && pool->n_threads == 2) pool->alone_until = now + ALONE_TIMES * waited;
}

static bool is_alone(ds_pool *pool) {
  if (pool->alone_until && now_ns() >= pool->alone_until) pool->alone_until = 0;
  return pool->n_threads == 1 || pool->alone_until;
}

void ds_pool_run(ds_pool *pool, ds_task *task, const void *job, int32_t n_items) {
  pthread_mutex_lock(&pool->in_use);
  uint32_t mode = enter_ieee_mode();
  if (n_items == 1 || is_alone(pool)) {
    for (int32_t i = 0; i < n_items; ++i) task(job, i, i + 1 < n_items ? i + 1 : -1, 0);
  } else if (n_items > 0) {
    open_job(pool, task, job, n_items);
    work(pool, 0);
    close_job(pool);
  }
  leave_ieee_mode(mode);
  pthread_mutex_unlock(&pool->in_use);
}

int32_t ds_pool_threads(const ds_pool *pool) { return pool->n_threads; }
const struct ds_kernels *ds_pool_kernels(const ds_pool *pool) { return pool->kernels; }
void ds_pool_set_kernels(ds_pool *pool, const struct ds_kernels *kernels) { pool->kernels = kernels; }

void ds_pool_free(ds_pool *pool) {
  if (!pool) return;
  pthread_mutex_lock(&pool->lock);
  atomic_store(&pool->stopping, true);
  pthread_cond_broadcast(&pool->opened);
  pthread_mutex_unlock(&pool->lock);
  for (int32_t t = 1; t <= pool->n_started; ++t) pthread_join(pool->threads[t], NULL);
  pthread_cond_destroy(&pool->left);
  pthread_cond_destroy(&pool->opened);
  pthread_mutex_destroy(&pool->lock);
  pthread_mutex_destroy(&pool->in_use);
  free(pool);
}

ds_pool *ds_pool_create(int32_t n_threads) {
  if (n_threads < 1 || n_threads > DS_MAX_THREADS) {
    ds_fail(DS_ERROR_ARGUMENT, "n_threads is %d, not 1 to %d", (int)n_threads, DS_MAX_THREADS);
    return NULL;
  }
  const struct ds_kernels *kernels = ds_choose_kernels();
  if (!kernels) return NULL;
  ds_pool *pool = aligned_alloc(CACHE_LINE, sizeof *pool); /* a multiple of its own alignment */
  if (!pool) {
    ds_fail(DS_ERROR_MEMORY, "no memory for a thread pool");
    return NULL;
  }
  *pool = (ds_pool){.n_threads = n_threads, .kernels = kernels};
  pthread_mutex_init(&pool->in_use, NULL);
  pthread_mutex_init(&pool->lock, NULL);
  pthread_cond_init(&pool->opened, NULL);
  pthread_cond_init(&pool->left, NULL);
  for (int32_t t = 1; t < n_threads; ++t) {
    start begin = {.pool = pool, .thread = t};
    if (pthread_create(&pool->threads[t], NULL, run_thread, &begin)) {
      ds_fail(DS_ERROR_MEMORY, "cannot start thread %d of %d", (int)t + 1, (int)n_threads);
      ds_pool_free(pool);
      return NULL;
    }
    pool->n_started = t;
    while (!atomic_load(&begin.taken)) rest();
  }
  return pool;
}
