/* Runs CUDA kernels on the CPU, one block after another: the threads of a block are fibers that give way to each
 * other at barriers and shuffles. Compile a .cu file as C++ with this header before everything else.
 *
 * Shared memory is what a block shares, and stays what the last block left. In between two barriers threads run
 * one by one, a warp as far as it can, in an order that `emulator_order` chooses, so that what a missing barrier
 * lets happen does happen in one order or the other. A barrier or shuffle that some threads never reach, or at which they stand at
 * different lines, ends the launch with an error instead of hanging it.
 */
#ifndef DRAFTSMITH_CUDA_EMULATOR_H
#define DRAFTSMITH_CUDA_EMULATOR_H

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static

struct emulated_index {
  unsigned x;
};

namespace emulator {

constexpr int WARP = 32;
constexpr size_t STACK = (1 << 15) + 13 * 64; /* no power of two, so that stacks do not share cache sets */

enum state { READY, AT_WARP, AT_BLOCK, DONE };

struct fiber {
  jmp_buf where;
  bool started;
  state at;
  int line;
  unsigned parity;    /* of its shuffles: who is one ahead writes the other buffer */
  char offers[2][40]; /* what it gives to the others of its warp */
};

inline std::vector<fiber> fibers;
inline std::vector<char> stacks;
inline std::function<void()> body;
inline jmp_buf scheduler;
inline ucontext_t entry;
inline int current, num_threads;
inline char error[200];
inline unsigned order;
inline std::mt19937 shuffler;

inline void give_way() {
  if (!_setjmp(fibers[current].where)) _longjmp(scheduler, 1);
}

inline void wait(state at, int line) {
  fibers[current].at = at;
  fibers[current].line = line;
  give_way();
}

inline void begin() {
  body();
  fibers[current].at = DONE;
  _longjmp(scheduler, 1);
}

/* Let a thread run to its next barrier, shuffle or end. */
inline void resume(int thread) {
  current = thread;
  fiber &f = fibers[thread];
  if (_setjmp(scheduler)) return;
  if (f.started) _longjmp(f.where, 1);
  f.started = true;
  getcontext(&entry);
  entry.uc_stack.ss_sp = stacks.data() + static_cast<size_t>(thread) * STACK;
  entry.uc_stack.ss_size = STACK;
  entry.uc_link = nullptr;
  makecontext(&entry, begin, 0);
  setcontext(&entry);
}

/* Threads first .. end go on if all of them wait at the same place. */
inline bool release(int first, int end, state at) {
  for (int t = first; t < end; ++t)
    if (fibers[t].at != at || fibers[t].line != fibers[first].line) return false;
  for (int t = first; t < end; ++t) fibers[t].at = READY;
  return true;
}

inline void fail() {
  if (error[0]) return;
  static const char *const names[] = {"ready", "waits at a shuffle in line", "waits at a barrier in line",
                                      "has ended"};
  for (int t = 1; t < num_threads; ++t) {
    const fiber &a = fibers[0], &b = fibers[t];
    if (a.at == b.at && a.line == b.line) continue;
    snprintf(error, sizeof error, "threads part: 0 %s %d, %d %s %d", names[a.at], a.line, t, names[b.at],
             b.line);
    return;
  }
}

inline std::vector<int> turns(int n) {
  std::vector<int> numbers(n);
  for (int i = 0; i < n; ++i) numbers[i] = order == 1 ? n - 1 - i : i;
  return numbers;
}

inline void shake(std::vector<int> &numbers) {
  if (order > 1) std::shuffle(numbers.begin(), numbers.end(), shuffler);
}

inline bool run_block() {
  for (int t = 0; t < num_threads; ++t) {
    fibers[t].started = false;
    fibers[t].at = READY;
    fibers[t].line = 0;
    fibers[t].parity = 0;
  }
  std::vector<int> warps = turns(num_threads / WARP), lanes = turns(WARP);
  for (;;) {
    shake(warps);
    for (int w : warps) { /* each as far ahead of the others as a barrier lets it */
      shake(lanes);
      do
        for (int lane : lanes)
          if (fibers[w * WARP + lane].at == READY) resume(w * WARP + lane);
      while (release(w * WARP, w * WARP + WARP, AT_WARP));
    }
    if (release(0, num_threads, AT_BLOCK)) continue;
    for (int t = 0; t < num_threads; ++t)
      if (fibers[t].at != DONE) return false;
    return true;
  }
}

} // namespace emulator

inline emulated_index emulated_block, emulated_block_size, emulated_grid;

#define threadIdx (emulated_index{static_cast<unsigned>(emulator::current)})
#define blockIdx emulated_block
#define blockDim emulated_block_size
#define gridDim emulated_grid

namespace emulator {

inline void launch(int blocks, int threads, std::function<void()> kernel) {
  fibers.resize(static_cast<size_t>(threads));
  stacks.resize(static_cast<size_t>(threads) * STACK);
  body = std::move(kernel);
  num_threads = threads;
  shuffler.seed(order);
  emulated_block_size.x = static_cast<unsigned>(threads);
  emulated_grid.x = static_cast<unsigned>(blocks);
  for (int b = 0; b < blocks && !error[0]; ++b) {
    emulated_block.x = static_cast<unsigned>(b);
    if (!run_block()) fail();
  }
}

/* Give `value` to the warp and wait for the others'; returns the buffer in which all of them lie. */
template <typename T> unsigned offer(T value, int line) {
  fiber &f = fibers[current];
  unsigned buffer = f.parity++ % 2;
  static_assert(sizeof value <= sizeof f.offers[0], "no room for it");
  memcpy(f.offers[buffer], &value, sizeof value);
  wait(AT_WARP, line);
  return buffer;
}

template <typename T> T take(int lane, unsigned buffer) {
  T value;
  memcpy(&value, fibers[current / WARP * WARP + lane].offers[buffer], sizeof value);
  return value;
}

template <typename T> T shuffle(T value, int lane, int line) {
  return take<T>(lane < 0 || lane >= WARP ? current % WARP : lane, offer(value, line));
}

inline uint32_t ballot(bool vote, int line) {
  unsigned buffer = offer(vote, line);
  uint32_t votes = 0;
  for (int lane = 0; lane < WARP; ++lane) votes |= static_cast<uint32_t>(take<bool>(lane, buffer)) << lane;
  return votes;
}

} // namespace emulator

#define __syncthreads() emulator::wait(emulator::AT_BLOCK, __LINE__)
#define __shfl_sync(mask, value, lane) emulator::shuffle(value, lane, __LINE__)
#define __shfl_up_sync(mask, value, by) emulator::shuffle(value, emulator::current % 32 - (by), __LINE__)
#define __shfl_xor_sync(mask, value, bits) emulator::shuffle(value, emulator::current % 32 ^ (bits), __LINE__)
#define __ballot_sync(mask, vote) emulator::ballot(vote, __LINE__)
#define __ffs(x) __builtin_ffs(x)

#include "emulated_mma.h"

#define LAUNCH(kernel, blocks, threads, stream, ...)                                                         \
  ((void)(stream), emulator::launch((blocks), (threads), [&] { kernel(__VA_ARGS__); }))
#define LAUNCH_STATUS() (emulator::error[0] ? 1 : 0)

/* 0: ascending, 1: descending, else a shuffled order of that seed. */
extern "C" __attribute__((visibility("default"))) void emulator_order(unsigned order) {
  emulator::order = order;
}

/* What went wrong since the last call, or "". */
extern "C" __attribute__((visibility("default"))) const char *emulator_error() {
  static char words[sizeof emulator::error];
  memcpy(words, emulator::error, sizeof words);
  emulator::error[0] = 0;
  return words;
}

#endif
