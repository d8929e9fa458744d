/* Shapes of proposals; see tree.h. */
#include "tree.h"
#include "error.h"

#include <stddef.h>
#include <string.h>

void ds_tree_make_chain(ds_tree *tree, int32_t n_nodes) {
  tree->n_nodes = n_nodes;
  tree->is_chain = true;
  for (int32_t i = 0; i < n_nodes; ++i) {
    tree->parents[i] = i - 1;
    tree->depths[i] = i;
  }
}

int32_t ds_tree_measure(ds_tree *tree, int32_t n_nodes, int32_t max_depth) {
  tree->n_nodes = n_nodes;
  tree->is_chain = true;
  for (int32_t i = 0; i < n_nodes; ++i) {
    int32_t parent = tree->parents[i];
    if (parent < -1 || parent >= i)
      return ds_fail(
          DS_ERROR_ARGUMENT,
          "a drafter proposes a tree whose node %d follows node %d; one before it is wanted, or -1", i,
          parent);
    tree->depths[i] = parent < 0 ? 0 : tree->depths[parent] + 1;
    if (tree->depths[i] >= max_depth)
      return ds_fail(DS_ERROR_ARGUMENT,
                     "a drafter proposes a tree of more than the %d levels that were asked for", max_depth);
    tree->is_chain &= parent == i - 1;
  }
  return DS_OK;
}

void ds_tree_cut(ds_tree *tree, int32_t n_nodes) {
  tree->n_nodes = n_nodes;
  tree->is_chain = true;
  for (int32_t i = 0; i < n_nodes; ++i) tree->is_chain &= tree->parents[i] == i - 1;
}

int32_t ds_tree_count_levels(const ds_tree *tree) {
  int32_t deepest = 0;
  for (int32_t i = 0; i < tree->n_nodes; ++i)
    if (tree->depths[i] >= deepest) deepest = tree->depths[i] + 1;
  return deepest;
}

void ds_tree_lay_out(const ds_tree *tree, int32_t start, int32_t length, int64_t *positions, uint8_t *mask) {
  int32_t end = length + tree->n_nodes;
  for (int32_t slot = start; slot < end; ++slot) {
    uint8_t *sees = mask + (size_t)(slot - start) * (size_t)end;
    int32_t node = slot - length, parent = node < 0 ? -1 : tree->parents[node];
    positions[slot - start] = node < 0 ? slot : length + tree->depths[node];
    memset(sees, 0, (size_t)end);
    if (parent < 0)
      memset(sees, 1, (size_t)(node < 0 ? slot : length));
    else /* its parent's row, which is above */
      memcpy(sees, mask + (size_t)(length + parent - start) * (size_t)end, (size_t)end);
    sees[slot] = 1;
  }
}
