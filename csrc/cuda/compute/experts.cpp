// A mixture of experts: quantize the tokens; then, for as many tokens at a time as there is room for,
//   sort their slots by expert; gate and up of all experts in one launch; activate and quantize; down; each token's weighted
//   sum in the order of its slots.
// That is six launches. Nothing waits for the device, and no size depends on its values, so that a graph can capture it.
// Rows between the products are those of slots, not sorted: only the products look at the order. Slots without an expert have
// rows too, of whatever was there; nobody reads what the activation makes of them.
#include "cuda/compute/experts.h"

#include "cuda/compute/experts_plan.h"
#include "cuda/compute/quantize.h"
#include "cuda/compute/tile_product.h"

namespace sq {
namespace {

// The slots of some tokens, sorted by expert.
struct Routing {
  Tensor order, tiles;
  int64_t tile_count;
};

class Experts {
 public:
  Experts(const char* op, const ExpertsInputs& inputs) : op_(op), in_(inputs), shapes_(inputs.shapes) {}

  Tensor run() const {
    const Tensor& x = in_.x;
    const auto [q, scale] = quantize_rows_cuda(op_, x, std::nullopt, nullptr, in_.layers.weight[0].scalar_type(),
                                               element_of(in_.rotate, 0));
    Tensor y = empty_like_device(x, replace_last(x, shapes_.layers.back().n), x.scalar_type());
    if (y.numel() == 0) return y;
    const int64_t together = tokens_together(shapes_.tokens, shapes_.top_k * slot_bytes());
    for (int64_t token = 0; token < shapes_.tokens; token += together) {
      run_tokens(token, std::min(together, shapes_.tokens - token), q, scale, y);
    }
    return y;
  }

 private:
  int64_t slot_bytes() const {
    const int64_t inner = shapes_.layers[0].n, element = element_size(kernel_dtype(in_.x.scalar_type()));
    return inner * element * static_cast<int64_t>(in_.layers.size() - 1) + inner + 4 * shapes_.layers.back().n;
  }

  // Of `tokens` tokens from `token` on; q [tokens, K] and scale [tokens] of all.
  void run_tokens(int64_t token, int64_t tokens, const Tensor& q, const Tensor& scale, Tensor& y) const {
    const Tensor& x = in_.x;
    const size_t down = in_.layers.size() - 1;
    const int64_t slots = tokens * shapes_.top_k, inner = shapes_.layers[0].n, n = shapes_.layers[down].n;
    check_rows(op_, slots);
    const ExpertsPlan plan = plan_of(slots, q);
    const Routing routing = route(token, slots, plan.tile_rows);

    GroupedJob job{};
    job.slots_per_row = static_cast<int>(shapes_.top_k);
    job.order = pointer<int32_t>(routing.order);
    job.tiles = pointer<RowTile>(routing.tiles);
    job.tile_count = routing.tile_count;
    job.a = pointer<uint8_t>(q) + token * shapes_.layers[0].k;
    job.a_scale = pointer<float>(scale) + token;
    job.y_dtype = kernel_dtype(x.scalar_type());
    std::vector<Tensor> planes;
    for (size_t i = 0; i < down; ++i) {
      planes.push_back(empty_like_device(x, {slots, inner}, x.scalar_type()));
      add_layer(job, i, planes[i]);
    }
    multiply(job, plan);
    const OptionalTensor up = down == 2 ? OptionalTensor(planes[1]) : std::nullopt;
    const auto [hidden, hidden_scale] = activate_quantize_cuda(
        op_, in_.activation, planes[0], up, in_.layers.weight[down].scalar_type(), nullptr, element_of(in_.rotate, 1));

    Tensor outputs = empty_like_device(x, {slots, n}, ScalarType::Float);
    job.a = pointer<uint8_t>(hidden);
    job.a_scale = pointer<float>(hidden_scale);
    job.slots_per_row = 1;
    job.y_dtype = DType::kFloat32;
    job.layer_count = 0;
    add_layer(job, down, outputs);
    multiply(job, plan);
    combine(token, tokens, outputs, y);
  }

  ExpertsPlan plan_of(int64_t slots, const Tensor& q) const {
    ExpertsProblem problem{slots, shapes_.experts, {}};
    for (size_t i = 0; i < in_.layers.size(); ++i) {
      const Tensor& weight = in_.layers.weight[i];
      TileProblem product = problem_of_device(in_.x.get_device_index());
      product.n = shapes_.layers[i].n;
      product.k = shapes_.layers[i].k;
      product.a = product.b = kernel_dtype(weight.scalar_type());
      product.is_aligned = is_aligned(weight.const_data_ptr()) && is_aligned(q.const_data_ptr());
      problem.products.push_back(product);
    }
    return plan_experts(problem);
  }

  Routing route(int64_t token, int64_t slots, int tile_rows) const {
    const int64_t tiles = first_row_tile(slots, shapes_.experts, tile_rows);
    constexpr int64_t kWords = sizeof(RowTile) / sizeof(int32_t);
    Routing routing{empty_like_device(in_.x, {slots}, ScalarType::Int),
                    empty_like_device(in_.x, {tiles * kWords}, ScalarType::Int), tiles};
    if (slots == 0) return routing;
    RouteJob job{};
    job.index = pointer<int64_t>(in_.index) + token * shapes_.top_k;
    job.slots = slots;
    job.experts = static_cast<int>(shapes_.experts);
    job.tile_rows = tile_rows;
    job.order = static_cast<int32_t*>(routing.order.mutable_data_ptr());
    job.tiles = static_cast<RowTile*>(routing.tiles.mutable_data_ptr());
    job.tile_count = tiles;
    launch_route(job, current_stream(in_.x));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return routing;
  }

  void add_layer(GroupedJob& job, size_t index, Tensor& y) const {
    const LayerTensors layer = in_.layers[index];
    job.dtype = kernel_dtype(layer.weight.scalar_type());
    job.n = shapes_.layers[index].n;
    job.k = shapes_.layers[index].k;
    GroupedLayer& own = job.layers[job.layer_count++];
    own.b = pointer<uint8_t>(layer.weight);
    own.b_scale = pointer<float>(layer.scale);
    own.b_scale_step = layer.scale.numel() == shapes_.experts ? 0 : 1;
    own.bias = layer.bias.has_value() ? layer.bias->const_data_ptr() : nullptr;
    own.bias_dtype = layer.bias.has_value() ? kernel_dtype(layer.bias->scalar_type()) : DType::kFloat32;
    own.y = y.mutable_data_ptr();
  }

  void multiply(const GroupedJob& job, const ExpertsPlan& plan) const {
    constexpr int64_t kBand = 8;  // of tile_place, which computes in 32 bits
    const int64_t tiles = std::max(kBand, job.tile_count);
    SQ_CHECK(grouped_blocks(tiles, job.n, job.layer_count, kSkinnyColumns) <= kMaxBlocks, op_, ": ", job.tile_count,
             " tiles of rows and N=", job.n, " are too many for one launch");
    void* stream = current_stream(in_.x);
    plan.is_mma ? launch_grouped_mma(job, plan.tile_rows, stream) : launch_grouped_skinny(job, plan.tile_rows, stream);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void combine(int64_t token, int64_t tokens, const Tensor& outputs, Tensor& y) const {
    CombineJob job{};
    job.weights_dtype = kernel_dtype(in_.weights.scalar_type());
    job.y_dtype = kernel_dtype(y.scalar_type());
    job.columns = shapes_.layers.back().n;
    job.tokens = tokens;
    job.top_k = static_cast<int>(shapes_.top_k);
    job.experts = static_cast<int>(shapes_.experts);
    const int64_t slot = token * shapes_.top_k;
    job.x = pointer<float>(outputs);
    job.index = pointer<int64_t>(in_.index) + slot;
    job.weights = pointer<uint8_t>(in_.weights) + slot * element_size(job.weights_dtype);
    job.y = static_cast<uint8_t*>(y.mutable_data_ptr()) + token * job.columns * element_size(job.y_dtype);
    check_rows(op_, combine_blocks(tokens, job.columns));
    launch_combine(job, current_stream(in_.x));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  const char* op_;
  const ExpertsInputs& in_;
  const ExpertsShapes& shapes_;
};

}  // namespace

Tensor run_experts(const char* op, const ExpertsInputs& inputs) { return Experts(op, inputs).run(); }

}  // namespace sq
