// A small pool of threads for the CPU kernels. Work is split into tasks by shape alone; which thread takes a task changes
// nothing in the result.
#pragma once

#include <cstdint>
#include <type_traits>

namespace statescan::cpu {

// The most threads that a parallel_for may use now; the `thread` index that tasks see is below it.
int max_threads();

// Holds max_threads() at its value, for this thread, while an op runs: its workspace was measured by it, and another thread may
// call set_num_threads() meanwhile.
class FrozenThreads {
 public:
  FrozenThreads();
  ~FrozenThreads();
  FrozenThreads(const FrozenThreads&) = delete;
  FrozenThreads& operator=(const FrozenThreads&) = delete;

 private:
  int former_;
};

// The pool's entry point: calls body(context, task, thread) for every task in 0..tasks-1, which start in this order and may end
// in any, and returns when all are done. The first exception of a task is rethrown here. Nested calls run on the calling thread.
void parallel_for_impl(std::int64_t tasks, void (*body)(void*, std::int64_t, int), void* context);

template <class Body>
void parallel_for(std::int64_t tasks, Body&& body) {
  parallel_for_impl(
      tasks,
      [](void* context, std::int64_t task, int thread) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(task, thread);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// The same over units of work, `group` of them a task: for units too small to be worth waking a thread each.
template <class Body>
void parallel_for_groups(std::int64_t units, std::int64_t group, Body&& body) {
  if (group < 1) group = 1;
  parallel_for((units + group - 1) / group, [&](std::int64_t task, int thread) {
    const std::int64_t end = (task + 1) * group < units ? (task + 1) * group : units;
    for (std::int64_t unit = task * group; unit < end; ++unit) body(unit, thread);
  });
}

// For tasks of one parallel_for that add to the same memory in the order of their indices, which fixes the order of the sum: a
// counter says how far a task has come. A task may only wait for one of a lower index: that one runs already, or is done.
void wait_for(const int& counter, int value);  // until the counter is at least `value`
void advance_to(int& counter, int value);

}  // namespace statescan::cpu
