// What both directions of mamba2_scan share: scratch memory, how y lies before the norm, and where the packed tokens end.
#pragma once

#include <statescan/mamba2_scan.h>

#include "../../cpp/ops/backend.h"
#include "../../cpp/ops/mamba2_stages.h"
#include "../common/scaled.h"
#include "../gated_rms_norm/policy.h"
#include "../ssd_scan/scaled_output.h"

namespace statescan::mamba2_scan {

// The workspace, handed out from its front. Without memory behind it only the sizes count.
class Scratch {
 public:
  explicit Scratch(const Workspace& workspace) : workspace_(workspace) {}

  // A [b,l,channels] of the dtype of `like`, its tokens aligned to 128 bytes: what every kernel's fastest row takes.
  Tensor tokens(const Tensor& like, const Dims& d, std::int64_t channels) {
    const std::int64_t pitch = rounded(channels * size_of(like.dtype), 128) / size_of(like.dtype);
    void* const data = static_cast<char*>(workspace_.data) + used_;
    used_ += rounded(d.batch * d.seqlen * pitch * size_of(like.dtype), 256);
    return Tensor::strided(data, like.dtype, {d.batch, d.seqlen, channels}, {d.seqlen * pitch, pitch, 1}, like.device);
  }

  void* bytes(std::size_t count) {
    void* const data = static_cast<char*>(workspace_.data) + used_;
    used_ += rounded(static_cast<std::int64_t>(count), 256);
    return data;
  }

  std::size_t used() const { return used_; }

  // What is left, for the kernels, which run one after the other.
  Workspace rest() const { return {static_cast<char*>(workspace_.data) + used_, workspace_.bytes - used_}; }

 private:
  static std::int64_t rounded(std::int64_t bytes, std::int64_t to) { return (bytes + to - 1) / to * to; }

  const Workspace& workspace_;
  std::size_t used_ = 0;
};

// The scan before a norm: y as halves with shared exponents, where it can leave them and the norm can read them, else as
// elements.
class ScanBeforeNorm {
 public:
  ScanBeforeNorm() = default;
  ScanBeforeNorm(const ssd_scan::Args& scan, const Dims& d, Scratch& scratch) {
    const std::size_t bytes = d.norm_group_size % cuda::kScaledTogether == 0 ? exponent_bytes(scan, ssd_dims(d)) : 0;
    if (bytes == 0) return;
    is_scaled_ = true;
    exponents_ = static_cast<std::uint8_t*>(scratch.bytes(bytes));
  }

  std::uint8_t* exponents() const { return exponents_; }  // for the norm; null: elements, or no workspace yet

  void run(const ssd_scan::Args& scan, const Dims& d, Stream stream) const {
    if (is_scaled_) run_scaled(scan, ssd_dims(d), exponents_, stream);
    else run_cuda(scan, ssd_dims(d), stream);
  }

 private:
  bool is_scaled_ = false;
  std::uint8_t* exponents_ = nullptr;
};

// Past the last packed token y and the gradients are zero, whatever z and dy hold: those rows are padding to the norm.
inline gated_rms_norm::End end_of_packing(const Inputs& in, const Dims& d) {
  const Tensor& cu = in.cu_seqlens;
  if (!cu) return {};
  return {static_cast<const char*>(cu.data) + d.num_sequences * cu.stride[0] * size_of(cu.dtype), cu.dtype == DType::int64};
}

}  // namespace statescan::mamba2_scan
