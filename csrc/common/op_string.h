// A str argument of an op. torch's own conversion to std::string (2.13: stableivalue_conversions.h) never frees the copy
// that it makes: 50 bytes a call, and worse, they keep freed memory between them from being joined and used again.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace sq {

struct OpString {
  std::string value;
  operator const std::string&() const { return value; }
};

}  // namespace sq

namespace torch::stable::detail {

template <>
struct ToImpl<sq::OpString> {
  static sq::OpString call(StableIValue boxed, uint64_t, bool) {
    StringHandle handle = to<StringHandle>(boxed);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    sq::OpString copy{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return copy;
  }
};

}  // namespace torch::stable::detail
