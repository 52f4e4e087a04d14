// contrast on CUDA: the launches around the products that make tiles of similarities S = x y^T.
#pragma once

#include "fedkern/types.h"

namespace fedkern::cuda {

// Rows and columns of the blocks that a tile is looked at in.
inline constexpr int kContrastBlock = 64;

// Device pointers; tiles, own, pieces, sums and the temperature have the type that is computed in, f32 or f64.
struct ContrastTile {
  DType dtype;
  std::int64_t rows, count;  // of the tile; pairs in all
  void* data;
  std::int64_t stride;      // from row to row
  std::int64_t first;       // the row of S that the tile begins with, a multiple of kContrastBlock
  Optional<const void> temperature;  // absent: `value`
  double value;
};

// own [count]: S's diagonal. pieces [2, blocks, 2 count]: maxima and sums of exponentials of blocks, of the rows' and,
// behind them, of the columns'.
void contrast_look(const ContrastTile& tile, void* pieces, void* own, int device, void* stream);

// sums [4, count]: tops and sums of rows, of columns; losses [2 count] is memory. The tile's data is not looked at.
void contrast_join(const ContrastTile& tile, const void* pieces, const void* own, void* sums, double* losses, DType loss_dtype,
                   void* loss, int device, void* stream);

// (softmax of rows + softmax of columns - 2 I) / (temperature count), in place.
void contrast_gradient(const ContrastTile& tile, const void* sums, int device, void* stream);

}  // namespace fedkern::cuda
