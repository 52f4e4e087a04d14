#pragma once
#include <cstdint>
#include <cstring>

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(static_cast<_Float16>(x)) {}
  explicit operator float() const { return static_cast<float>(value); }
};
inline __half __ushort_as_half(std::uint16_t bits) {
  __half x;
  std::memcpy(&x, &bits, 2);
  return x;
}
