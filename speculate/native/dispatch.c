/* Which instruction set to use: the best one that both this build and this machine have. */
#define _DEFAULT_SOURCE /* syscall */
#include "dispatch.h"
#include "error.h"

#include <stdlib.h>
#include <string.h>

#ifdef DS_HAVE_X86
#include <cpuid.h>
#endif
#if defined(DS_HAVE_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const ds_kernels ds_kernels_portable;
#ifdef DS_HAVE_X86
extern const ds_kernels ds_kernels_avx2, ds_kernels_avx2_vnni, ds_kernels_avx512_vnni,
    ds_kernels_avx512_vbmi2, ds_kernels_avx512_bf16, ds_kernels_amx_int8;
#endif

enum { MAX_SETS = 7 };

#ifdef DS_HAVE_X86
/* Compilers differ in what they can say of these features, hence cpuid. */
static int has_amx(void) {
  enum { TILES = 1 << 24, INT8 = 1 << 25 };
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) && (d & INT8);
}
#endif

/* Whether the kernels may be used. The registers of AMX are large, so Linux gives them to processes that ask:
 * arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), from Linux 5.16 on. */
static int are_allowed(const ds_kernels *kernels) {
#ifdef DS_HAVE_X86
  if (kernels != &ds_kernels_amx_int8) return 1;
#if defined(__linux__) && defined(SYS_arch_prctl)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return 0;
#endif
#else
  (void)kernels;
  return 1;
#endif
}

/* Best first, ending in NULL; only what runs here. */
static const ds_kernels **list_kernels(const ds_kernels *list[MAX_SETS + 1]) {
  int n = 0;
#ifdef DS_HAVE_X86
  __builtin_cpu_init();
  int avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
  int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
  int vbmi2 = avx512 && __builtin_cpu_supports("avx512vbmi2");
  int bf16 = vbmi2 && __builtin_cpu_supports("avx512bf16");
  if (avx2 && bf16 && has_amx()) list[n++] = &ds_kernels_amx_int8;
  if (avx2 && bf16) list[n++] = &ds_kernels_avx512_bf16;
  if (avx2 && vbmi2) list[n++] = &ds_kernels_avx512_vbmi2;
  if (avx2 && avx512) list[n++] = &ds_kernels_avx512_vnni;
  if (avx2 && __builtin_cpu_supports("avxvnni")) list[n++] = &ds_kernels_avx2_vnni;
  if (avx2) list[n++] = &ds_kernels_avx2;
#endif
  list[n++] = &ds_kernels_portable;
  list[n] = NULL;
  return list;
}

static const ds_kernels *choose_best(void) {
  const ds_kernels *list[MAX_SETS + 1], **kernels = list_kernels(list);
  while (!are_allowed(*kernels)) ++kernels;
  return *kernels;
}

const ds_kernels *ds_find_kernels(const char *isa) {
  const ds_kernels *list[MAX_SETS + 1];
  for (const ds_kernels **kernels = list_kernels(list); *kernels; ++kernels)
    if (!strcmp((*kernels)->isa, isa) && are_allowed(*kernels)) return *kernels;
  ds_fail(DS_ERROR_ARGUMENT,
          "this machine, or this build, has no kernels named '%.40s'; the best here is '%s'", isa,
          choose_best()->isa);
  return NULL;
}

const ds_kernels *ds_choose_kernels(void) {
  const char *wanted = getenv("DRAFTSMITH_ISA");
  return wanted && *wanted ? ds_find_kernels(wanted) : choose_best();
}
