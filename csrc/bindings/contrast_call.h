// Tensors of contrast's cores as Python passes them: what is computed in is f32 or f64.
#pragma once

#include "exchange.h"

namespace fedkern {

// A tensor of the type that is computed in; which one.
inline TensorView computed(py::handle tensor, DType& dtype) {
  const TensorView seen = checked_view(tensor.ptr());
  if (!seen.floating(dtype) || (dtype != DType::f32 && dtype != DType::f64)) throw py::type_error("contrast is computed in float32 or float64");
  return seen;
}

// The data of a contiguous tensor of so many elements of the dtype; one without elements may have any strides.
inline void* contiguous(py::handle tensor, DType dtype, std::int64_t elements) {
  DType own;
  const TensorView seen = computed(tensor, own);
  if (!seen.contiguous() || own != dtype) throw py::type_error("contrast's cores take contiguous memory of the dtype that is computed in");
  std::int64_t size = 1;
  for (int d = 0; d < seen.dims; ++d) size *= seen.shape[d];
  require(size == elements, "a tensor of contrast has another size than its batch");
  return seen.data;
}

// A matrix whose rows are contiguous: a tile of similarities [rows, columns], or embeddings.
struct Matrix {
  DType dtype;
  std::int64_t rows, columns;
  void* data;
  std::int64_t stride;  // from row to row
  int gpu;

  explicit Matrix(py::handle tensor) {
    const TensorView seen = computed(tensor, dtype);
    if (seen.dims != 2 || (!seen.empty() && seen.shape[1] > 1 && seen.strides[1] != 1)) throw py::type_error("contrast's cores take matrices of contiguous rows");
    rows = seen.shape[0], columns = seen.shape[1], data = seen.data, gpu = seen.gpu();
    stride = rows > 1 ? seen.strides[0] : columns;
  }

  // Embeddings are walked as one long vector.
  const Matrix& dense() const {
    require(stride == columns || !columns, "contrast's cores take contiguous embeddings");
    return *this;
  }
  bool alike(const Matrix& other) const { return dtype == other.dtype && rows == other.rows && columns == other.columns; }
  // A tile of similarities of `count` pairs, whose first row is the pair `first`.
  void check_tile(std::int64_t first, std::int64_t count) const {
    require(columns == count && first >= 0 && first <= count - rows, "a tile's similarities are those of some x with every y");
  }
};

}  // namespace fedkern
