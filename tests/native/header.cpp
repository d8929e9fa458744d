// The public header and the acceptance rules as C++ and CUDA compilers see them. CUDA's keywords are empty
// here, so that the rules' device form is compiled though no CUDA compiler is at hand.
#define __host__
#define __device__
#define __forceinline__ inline
#include "draftsmith.h"
#include "joint.h"
#include "verify.h"

#include <cmath>

int main() {
  bool right = ds_accept_ratio(0.2, 0.4) == 0.5 && ds_accept_ratio(0.4, 0.2) == 1 &&
               ds_accept_ratio(0.0, 0.0) == 0 && ds_accept_ratio(0.1, 0.0) == 1 &&
               ds_accept_ratio(NAN, 0.5) == 0 && !ds_accepts(0.0, 0.0) && ds_accepts(0.0, 0.1) &&
               ds_block_prefix(0.5, 0.2, 0.4) == 0.25 && ds_block_prefix(0.0, 0.4, 0.0) == 0 &&
               ds_block_accept(1.0, 0.0) == 1 && ds_block_accept(0.5, 0.5) == 0.5 &&
               ds_block_accept(0.0, 0.0) == 0 && ds_residual(0.5, 0.4, 0.3) == 0;
  ds_cdf cdf = {0.0, 0.0, -1};
  right = right && !ds_cdf_pass(&cdf, 0, 0.0) && ds_cdf_pass(&cdf, 1, 0.25) && cdf.drawn == 1;
  ds_rest rest = ds_rest_normalize(ds_rest_without(ds_rest{1, 1, 0}, 1), 0.5);
  right =
      right && ds_rest_mass(rest, 0.75, 0.25) == 1 && ds_rest_mass(rest, 0.25, 0.75) == 0 && rest.keep == 1;
  right = right && ds_kseq_share(0.5, 0.5, 0.5) == 0.25 && ds_kseq_residual(0.5, 0.5, 0.5, 1) == 0.25;
  return right ? 0 : 1;
}
