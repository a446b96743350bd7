// The positions of one sequence at which a scan leaves its state.
#pragma once

#include <limits>

#include "simd.h"
#include "../ops/contract.h"

namespace statescan::cpu::STATESCAN_ISA_NAMESPACE {

// Walks along state_positions [s,k], which ascend, past those that lie outside of the sequence.
class Positions {
 public:
  Positions(const Tensor& positions, std::int64_t sequence, std::int64_t length)
      : positions_(positions), sequence_(sequence), length_(length), count_(positions ? positions.shape[1] : 0) {
    skip();
  }

  // How many tokens come before the next state that is wanted; more than there are when none is left.
  std::int64_t next() const { return index_ < count_ ? at(index_) : std::numeric_limits<std::int64_t>::max(); }
  // Its place in position_states.
  std::int64_t index() const { return index_; }
  void pop() {
    ++index_;
    skip();
  }

  // body(place) for those outside, whose states are zero.
  template <class Body>
  void for_outside(Body&& body) const {
    for (std::int64_t k = 0; k < count_; ++k)
      if (is_outside(at(k))) body(k);
  }

 private:
  std::int64_t at(std::int64_t k) const { return index_at(positions_, sequence_, k); }
  bool is_outside(std::int64_t position) const { return position < 0 || position > length_; }
  void skip() {
    while (index_ < count_ && is_outside(at(index_))) ++index_;
  }

  const Tensor& positions_;
  std::int64_t sequence_, length_, count_, index_ = 0;
};

}  // namespace statescan::cpu::STATESCAN_ISA_NAMESPACE
