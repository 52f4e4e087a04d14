// contrast: what turns tiles of similarities S = x y^T into the loss and into its gradient with respect to them.
//
// A tile holds some rows of S in the type that is computed in, f32 or f64; the products are the caller's. Softmaxes of
// rows and columns are exp((S - top) scale) / sum with a top of each: its maximum, or 0 for all where the caller knows
// that no exponent leaves [-kContrastBound, kContrastBound] (`bounded`): then one exponential serves both.
//
// Rows are taken in chunks of fixed size whose sums are added up in order: the same bits for any number of threads.
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

inline constexpr double kContrastBound = 60;

struct ContrastTile {
  DType dtype;
  std::int64_t rows, columns;
  void* data;
  std::int64_t stride;  // from row to row
  std::int64_t first;   // the row of S that the tile begins with
  double scale;         // 1 / temperature
  bool bounded;
  int threads;
};

// Arrays of one value per row (or column) of the whole S.
struct ContrastStatistics {
  double *row_top, *row_sum, *column_top, *column_sum;
  double* own;  // S's diagonal; its exponentials where bounded, whose rounding then cancels against the sums'
};

struct ContrastTable {
  // Fills the tile's rows of `row_*` and `own`, and takes its columns into `column_*` (tops of -inf and sums of 0 at first).
  // `keep`: leaves the exponentials in the tile; only where bounded.
  void (*sums)(const ContrastTile&, bool keep, const ContrastStatistics&);
  // Turns the tile into factor (softmax of rows + softmax of columns - 2 I). `kept`: it holds the exponentials.
  // sums: [4, columns] of the tile's type: row tops, row sums, column tops, column sums.
  void (*gradient)(const ContrastTile&, bool kept, double factor, const void* sums);
  // The largest squared norm of contiguous rows; NaN or infinite where an element is.
  double (*largest_square)(DType, std::int64_t rows, std::int64_t columns, const void* data);
  // The sum of products.
  double (*dot)(DType, std::int64_t count, const void* a, const void* b);
};

FEDKERN_DECLARE_TABLE(ContrastTable, contrast)

}  // namespace fedkern
