// A CUDA device for a torch without CUDA: tensors on it lie in host memory, and torch's CPU kernels compute on them. It
// stands for a GPU where the place of tensors matters: a tensor of the CPU beside one of the GPU is an error, as on a GPU.
// It has no streams, events, graphs, generators and no backward pass.
// See tests/support/emulated_cuda.py, which does for Python's torch.cuda what this does for the dispatcher.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr c10::DeviceType kDevice = c10::DeviceType::CUDA;
thread_local c10::DeviceIndex current = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device getDevice() const override { return {kDevice, current}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override { current = std::max<c10::DeviceIndex>(device.index(), 0); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { setDevice(device); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    return {data, data, &std::free, {kDevice, current}};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Allocator allocator;

c10::Storage storage_of(const void* data, size_t bytes, at::Tensor keeps, c10::Device device) {
  auto* context = new at::Tensor(std::move(keeps));
  const auto release = [](void* kept) { delete static_cast<at::Tensor*>(kept); };
  c10::DataPtr pointer(const_cast<void*>(data), context, release, device);
  c10::Allocator* own = device.is_cpu() ? c10::GetAllocator(c10::kCPU) : &allocator;
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, std::move(pointer), own,
                                               true);
}

// The same memory as a tensor of another device, under the same strides.
at::Tensor moved(const at::Tensor& x, c10::Device device) {
  const at::NoGradGuard no_grad;
  const c10::Storage storage = storage_of(x.storage().data(), x.storage().nbytes(), x.detach(), device);
  const auto keys = c10::DispatchKeySet(device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, x.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return result;
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kDevice)));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kDevice)));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype.value_or(at::kFloat));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  at::Tensor to = self.is_cuda() ? moved(self, c10::kCPU) : self;
  to.copy_(source.is_cuda() ? moved(source, c10::kCPU) : source);
  return self;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& self, bool non_blocking) {
  at::Tensor to = self;
  return copy_(to, source, non_blocking);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  if (stride.empty() && !size.empty()) {
    self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  } else {
    self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

// Ops in which a GPU's tensors may meet the CPU's.
bool takes_both(const std::string& name) {
  static const std::set<std::string> kNames{"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
                                            "aten::index.Tensor_out", "aten::_copy_from_and_resize"};
  return kNames.count(name) != 0;
}

// Runs the CPU's kernel of an op on the same memory.
struct Call {
  const c10::OperatorHandle& op;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors{};  // ours, the CPU's
  bool has_cpu_tensor = false;

  at::Tensor to_cpu(const at::Tensor& x) {
    if (!x.defined()) return x;
    if (!x.is_cuda()) {
      has_cpu_tensor |= x.is_cpu() && x.dim() > 0;
      return x;
    }
    for (const auto& [ours, cpu] : tensors) {
      if (ours.is_same(x)) return cpu;
    }
    tensors.emplace_back(x, moved(x, c10::kCPU));
    return tensors.back().second;
  }

  c10::IValue to_cpu(const c10::IValue& value) {
    if (value.isTensor()) return to_cpu(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& each : value.toTensorVector()) list.push_back(to_cpu(each));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& each : value.toOptionalTensorVector()) {
        list.push_back(each.has_value() ? std::optional<at::Tensor>(to_cpu(*each)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kDevice) return c10::Device(c10::kCPU);
    return value;
  }

  at::Tensor from_cpu(const at::Tensor& x) {
    if (!x.defined()) return x;
    for (auto& [ours, cpu] : tensors) {
      if (!cpu.is_same(x)) continue;
      if (cpu.data_ptr() != ours.data_ptr() || cpu.sizes() != ours.sizes() || cpu.strides() != ours.strides()) {
        const at::Tensor changed = moved(cpu, {kDevice, 0});  // the op has resized its argument
        set_storage(ours, changed.storage(), changed.storage_offset(), changed.sizes(), changed.strides());
      }
      return ours;
    }
    return moved(x, {kDevice, 0});
  }

  c10::IValue from_cpu(const c10::IValue& value) {
    if (value.isTensor()) return from_cpu(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& each : value.toTensorVector()) list.push_back(from_cpu(each));
      return list;
    }
    return value;
  }
};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size(), start = stack->size() - count;
  Call call{op};
  for (size_t i = start; i < stack->size(); ++i) (*stack)[i] = call.to_cpu((*stack)[i]);
  const std::string name = toString(op.operator_name());
  TORCH_CHECK(!call.has_cpu_tensor || call.tensors.empty() || takes_both(name), name,
              ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const size_t results = op.schema().returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) (*stack)[i] = call.from_cpu((*stack)[i]);
}

at::Scalar local_scalar(const at::Tensor& self) { return moved(self, c10::kCPU).item(); }

void record_stream(at::Tensor&, c10::Stream) {}

}  // namespace

// The same memory on the other device; Tensor.to copies.
TORCH_LIBRARY(emulated_cuda, m) {
  m.def("there(Tensor x) -> Tensor");
  m.def("back(Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(emulated_cuda, CPU, m) {
  m.impl("there", [](const at::Tensor& x) { return moved(x, {kDevice, 0}); });
}

TORCH_LIBRARY_IMPL(emulated_cuda, CUDA, m) {
  m.impl("back", [](const at::Tensor& x) { return moved(x, c10::kCPU); });
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", [](const at::Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); });
  m.impl("_reshape_alias", [](const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
    return at::native::_reshape_alias(self, size, stride);
  });
  m.impl("unfold", [](const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
    return at::native::unfold(self, dimension, size, step);
  });
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", [](at::Tensor& self, at::Storage source) -> at::Tensor& {
    const int64_t elements = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
    return set_storage(self, std::move(source), 0, {elements}, {});
  });
  m.impl("set_.source_Tensor", [](at::Tensor& self, const at::Tensor& source) -> at::Tensor& {
    return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
  });
  m.impl("record_stream", &record_stream);
  m.impl("mm.dtype", [](const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {  // which the CPU lacks
    return at::mm(a.to(dtype), b.to(dtype));
  });
  // Torch has a formula of its own for devices without a kernel, which rounds otherwise.
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  // The CPU's kernel takes no integers.
  m.impl("histc", [](const at::Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
    const at::Tensor x = moved(self, c10::kCPU);
    return moved(at::histc(x.to(at::kDouble), bins, low, high).to(x.dtype()), {kDevice, 0});
  });
}
