// What stands between the products of a decoder layer and its attention, run on the CPU: heads against the CPU kernels bit
// for bit, masks and copies of caches against plain loops.
#include "native/cuda/cuda_shim.h"

// After the shim.
#include <vector>

#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/norm_activation.h"
#include "cpu/kernels/quantize.h"
#include "cuda/kernels/decoder_layer.cuh"
#include "native/testing.h"

namespace {

using namespace sq;

constexpr uint8_t kGuard = 0xa5;
constexpr float kOffset = 1.0f, kEps = 1e-3f;

struct Sizes {
  int64_t batch, time, heads, kv_heads, d, room;
  int64_t rows() const { return batch * time; }
};

template <class T>
void run_append(const AppendJob& job) {
  const int64_t of_heads = head_blocks(job.batch * job.time * (job.heads + 2 * job.kv_heads));
  shim::run_grid(append_kernel<T>, static_cast<unsigned>(of_heads + mask_blocks(job.mask, job.time)),
                 static_cast<unsigned>(kAppendThreads), size_t{0}, job, static_cast<unsigned>(of_heads));
}

// Heads [rows, count, d] normed and rotated by the CPU kernels.
template <class T>
Buffer<T> prepared(const T* x, int64_t step, int64_t count, const Sizes& sizes, const float* weight, const T* cos,
                   const T* sin, int64_t angle_batch) {
  const int64_t d = sizes.d, of_row = count * d;
  Buffer<T> heads(sizes.rows() * of_row), y(sizes.rows() * of_row);
  for (int64_t row = 0; row < sizes.rows(); ++row) {
    std::copy(x + row * step, x + row * step + of_row, heads.data() + row * of_row);
  }
  if (weight != nullptr) {
    NormArgs args{};
    args.norm = Norm::kRms;
    args.k = d;
    args.x = heads.data();
    args.y = heads.data();
    args.x_dtype = args.y_dtype = kDType<T>;
    args.weight = weight;
    args.eps = kEps;
    kNormActivationPortable.norm(args, {0, sizes.rows() * count});
  }
  RotateArgs args{};
  args.dtype = kDType<T>;
  args.time = sizes.time;
  args.heads = count;
  args.d = d;
  args.x = heads.data();
  args.cos = cos;
  args.sin = sin;
  args.angle_batch = angle_batch;
  args.y = y.data();
  args.y_batch = sizes.time * of_row;
  args.y_head = d;
  args.y_time = of_row;
  kNormActivationPortable.rotate(args, {0, sizes.rows()});
  return y;
}

// A cache full of guards, int8 or T.
struct Cache {
  bool is_int8;
  Buffer<uint8_t> data;
  Buffer<float> scale;
  int64_t room;
  Cache(const Sizes& sizes, bool is_int8, int64_t element, int64_t room)
      : is_int8(is_int8),
        data(sizes.batch * sizes.kv_heads * room * sizes.d * element),
        scale(sizes.batch * sizes.kv_heads * room),
        room(room) {
    std::fill(data.data(), data.data() + data.size(), kGuard);
    std::fill(scale.data(), scale.data() + scale.size(), -1.0f);
  }
  CacheRows rows() const { return {data.data(), is_int8 ? scale.data() : nullptr, room}; }
};

// That exactly the slots of `positions` were written, with what the CPU makes of heads x [rows, step].
template <class T>
void expect_cache(const Cache& got, const T* x, int64_t step, const Sizes& sizes, const std::vector<int64_t>& slots,
                  const char* what) {
  const int64_t d = sizes.d, element = got.is_int8 ? 1 : static_cast<int64_t>(sizeof(T));
  Cache expected(sizes, got.is_int8, element, got.room);
  for (int64_t row = 0; row < sizes.rows(); ++row) {
    const int64_t slot = slots[row % sizes.time];
    if (slot < 0 || slot >= sizes.room) continue;
    for (int64_t head = 0; head < sizes.kv_heads; ++head) {
      const int64_t at = (row / sizes.time * sizes.kv_heads + head) * got.room + slot;
      const T* own = x + row * step + head * d;
      if (!got.is_int8) {
        std::memcpy(expected.data.data() + at * d * element, own, d * element);
        continue;
      }
      QuantizeArgs args{};
      args.k = args.q_stride = d;
      args.x = own;
      args.x_dtype = kDType<T>;
      args.q = expected.data.data() + at * d;
      args.q_dtype = DType::kInt8;
      args.scale = expected.scale.data() + at;
      kQuantizePortable.run(args, {0, 1});
    }
  }
  // NaN have several bits: a head that has one is compared by its values.
  for (int64_t i = 0; i < got.data.size() / element; ++i) {
    const auto* one = got.data.data() + i * element;
    const auto* other = expected.data.data() + i * element;
    const bool is_same = std::memcmp(one, other, element) == 0;
    const bool are_nan = !got.is_int8 && std::isnan(to_float(*reinterpret_cast<const T*>(one))) &&
                         std::isnan(to_float(*reinterpret_cast<const T*>(other)));
    CHECK(is_same || are_nan, "%s, d %" PRId64 ", element %" PRId64, what, d, i);
  }
  for (int64_t i = 0; i < got.scale.size(); ++i) {
    CHECK(same(got.scale[i], expected.scale[i]), "%s, scale %" PRId64 ": %g, not %g", what, i, got.scale[i],
          expected.scale[i]);
  }
}

template <class T>
void test_append(const Sizes& sizes, bool is_int8, bool has_norms, std::vector<int64_t> positions, bool one_angle) {
  const int64_t d = sizes.d, total = (sizes.heads + 2 * sizes.kv_heads) * d, step = total + 3;
  const Buffer<T> x = random_values<T>(sizes.rows() * step);
  const Buffer<float> angles = random_values<float>((one_angle ? 1 : sizes.batch) * sizes.time * d);
  Buffer<T> cos(angles.size()), sin(angles.size());
  for (int64_t i = 0; i < angles.size(); ++i) {
    from_float(std::cos(angles[i]), &cos[i]);
    from_float(std::sin(angles[i]), &sin[i]);
  }
  if (sizes.rows() > 2) {  // of the last row, a head of zeros and one with a NaN
    T* last = x.data() + (sizes.rows() - 1) * step;
    for (int64_t i = 0; i < d; ++i) from_float(0.0f, &last[sizes.heads * d + i]);
    from_float(NAN, &last[total - 1]);
  }
  const Buffer<float> q_weight = random_values<float>(d);
  const Buffer<Float16> k_weight = random_values<Float16>(d);
  Buffer<float> wide_q(d), wide_k(d);
  widen(q_weight.data(), kOffset, d, wide_q.data());
  widen(k_weight.data(), kOffset, d, wide_k.data());
  constexpr int64_t kPast = 2;
  const bool has_positions = !positions.empty();
  const int64_t element = is_int8 ? 1 : static_cast<int64_t>(sizeof(T));
  const Cache keys(sizes, is_int8, element, sizes.room), values(sizes, is_int8, element, sizes.room + 1);
  const Buffer<T> rotated(sizes.rows() * sizes.heads * d);

  AppendJob job{};
  job.dtype = kDType<T>;
  job.batch = sizes.batch;
  job.time = sizes.time;
  job.heads = sizes.heads;
  job.kv_heads = sizes.kv_heads;
  job.d = d;
  const T *q = x.data(), *k = q + sizes.heads * d, *v = k + sizes.kv_heads * d;
  job.q = {q, step};
  job.k = {k, step};
  job.v = {v, step};
  job.q_norm = {has_norms ? q_weight.data() : nullptr, DType::kFloat32};
  job.k_norm = {has_norms ? k_weight.data() : nullptr, DType::kFloat16};
  job.norm_offset = kOffset;
  job.eps = kEps;
  job.cos = cos.data();
  job.sin = sin.data();
  job.angle_batch = one_angle ? 0 : sizes.time * d;
  job.past = kPast;
  job.positions = has_positions ? positions.data() : nullptr;
  job.rotated_q = rotated.data();
  job.keys = keys.rows();
  job.values = values.rows();
  run_append<T>(job);

  for (int64_t i = 0; !has_positions && i < sizes.time; ++i) positions.push_back(kPast + i);
  const float *q_norm = has_norms ? wide_q.data() : nullptr, *k_norm = has_norms ? wide_k.data() : nullptr;
  const Buffer<T> expected_q = prepared(q, step, sizes.heads, sizes, q_norm, cos.data(), sin.data(), job.angle_batch);
  const Buffer<T> expected_k =
      prepared(k, step, sizes.kv_heads, sizes, k_norm, cos.data(), sin.data(), job.angle_batch);
  expect_cache(keys, expected_k.data(), sizes.kv_heads * d, sizes, positions, "keys");
  expect_cache(values, v, step, sizes, positions, "values");
  for (int64_t i = 0; i < rotated.size(); ++i) {
    const int64_t slot = positions[i / (sizes.heads * d) % sizes.time];
    const float expected = slot < 0 || slot >= sizes.room ? NAN : to_float(expected_q[i]);
    CHECK(same(to_float(rotated[i]), expected), "q, d %" PRId64 ", element %" PRId64 ": %g, not %g", d, i,
          to_float(rotated[i]), expected);
  }
}

// visible [mask_batches, mask_heads, time, length], of which 1 stands for all; see MaskJob for `group`.
template <class T>
void test_mask(int64_t batches, int64_t heads, int64_t time, int64_t length, bool causal, bool has_visible,
               bool has_positions) {
  constexpr int64_t kPast = 3;
  const std::vector<int64_t> positions{7, 1, 20, 0, 5, 2};
  const int64_t count = batches * heads * time * length;
  const Buffer<uint8_t> visible(count);
  for (int64_t i = 0; i < count; ++i) visible[i] = static_cast<uint8_t>(random_int(0, 1));
  AppendJob job{};
  job.dtype = kDType<T>;
  job.time = time;
  job.past = kPast;
  job.positions = has_positions ? positions.data() : nullptr;
  MaskJob& mask = job.mask;
  mask.visible = has_visible ? visible.data() : nullptr;
  // Two batches are one of two groups, to try the strides of both.
  mask.group = batches % 2 == 0 ? 2 : 1;
  mask.strides[1] = heads * time * length;
  mask.strides[0] = mask.group * mask.strides[1];
  mask.strides[2] = time * length;
  mask.strides[3] = length;
  mask.strides[4] = 1;
  mask.batches = batches;
  mask.heads = heads;
  mask.length = length;
  mask.step = (length + kMaskColumns - 1) / kMaskColumns * kMaskColumns;
  mask.causal = causal;
  const Buffer<T> y(batches * heads * time * mask.step);
  mask.y = y.data();
  run_append<T>(job);
  for (int64_t row = 0; row < batches * heads * time; ++row) {
    const int64_t last = has_positions ? positions[row % time] : kPast + row % time;
    for (int64_t key = 0; key < mask.step; ++key) {
      const bool is_seen = key < length && (!causal || key <= last) && (!has_visible || visible[row * length + key]);
      const float got = to_float(y[row * mask.step + key]);
      CHECK(got == (is_seen ? 0.0f : -INFINITY), "mask, row %" PRId64 ", key %" PRId64 ": %g", row, key, got);
    }
  }
}

template <class T>
void test_copy(const Sizes& sizes, int64_t copies, int64_t length, bool is_int8, bool wide) {
  const int64_t d = sizes.d, rows = sizes.batch * sizes.kv_heads;
  const int64_t rooms[] = {sizes.room, sizes.room + 2};
  std::vector<Buffer<T>> floats;
  std::vector<Buffer<int8_t>> integers;
  std::vector<Buffer<float>> scales;
  std::vector<Buffer<T>> y;
  for (int64_t room : rooms) {
    floats.push_back(random_values<T>(rows * room * d));
    integers.emplace_back(rows * room * d);
    for (int64_t i = 0; i < integers.back().size(); ++i)
      integers.back()[i] = static_cast<int8_t>(random_int(-127, 127));
    scales.push_back(random_values<float>(rows * room));
    y.emplace_back(rows * copies * length * d);
  }
  const auto cache = [&](int which) -> CacheRows {
    if (is_int8) return {integers[which].data(), scales[which].data(), rooms[which]};
    return {floats[which].data(), nullptr, rooms[which]};
  };
  const CacheCopyJob job{kDType<T>, sizes.batch, sizes.kv_heads, length,      d,
                         copies,    cache(0),    cache(1),       y[0].data(), y[1].data()};
  shim::run_grid(cache_copy_kernel<T>, 3u, 64u, size_t{0}, job, wide);
  for (int which = 0; which < 2; ++which) {
    for (int64_t i = 0; i < y[which].size(); ++i) {
      const int64_t head = i / (copies * length * d), token = i / d % length;
      const int64_t row = head * rooms[which] + token, from = row * d + i % d;
      T expected = floats[which][from];
      if (is_int8) from_float(static_cast<float>(integers[which][from]) * scales[which][row], &expected);
      CHECK(same(to_float(y[which][i]), to_float(expected)), "copy %d, element %" PRId64 ": %g, not %g", which, i,
            to_float(y[which][i]), to_float(expected));
    }
  }
}

template <class T>
void test_type() {
  for (int64_t d : {2, 10, 64, 66, 128, 200}) {
    for (bool is_int8 : {false, true}) {
      for (bool has_norms : {false, true}) {
        test_append<T>({1, 1, 4, 2, d, 3}, is_int8, has_norms, {}, true);
        test_append<T>({2, 3, 3, 3, d, 9}, is_int8, has_norms, {}, false);
        test_append<T>({2, 4, 4, 1, d, 8}, is_int8, has_norms, {7, 0, 3, 5}, true);
        test_append<T>({1, 4, 2, 1, d, 8}, is_int8, has_norms, {8, -1, 0, int64_t{1} << 40}, false);
      }
    }
  }
  for (bool causal : {false, true}) {
    for (bool has_visible : {false, true}) {
      for (bool has_positions : {false, true}) {
        test_mask<T>(1, 1, 1, 1, causal, has_visible, has_positions);
        test_mask<T>(4, 3, 6, 21, causal, has_visible, has_positions);
        test_mask<T>(1, 2, 5, 32, causal, has_visible, has_positions);
      }
    }
  }
  for (bool is_int8 : {false, true}) {
    test_copy<T>({2, 0, 0, 3, 10, 7}, 2, 5, is_int8, false);
    test_copy<T>({1, 0, 0, 2, 64, 4}, 1, 4, is_int8, true);
    test_copy<T>({1, 0, 0, 2, 8, 40}, 3, 33, is_int8, true);
  }
}

}  // namespace

int main() {
  test_type<float>();
  test_type<BFloat16>();
  test_type<Float16>();
}
