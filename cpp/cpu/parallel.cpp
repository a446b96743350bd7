#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>

#include <statescan/dispatch.h>

namespace statescan {
namespace cpu {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSpins = 2000;  // about 20 us

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int default_threads() {
  if (const char* text = std::getenv("STATESCAN_NUM_THREADS")) {
    const int asked = std::atoi(text);
    if (asked >= 1) return std::min(asked, kMaxThreads);
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::clamp(CPU_COUNT(&set), 1, kMaxThreads);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

std::atomic<int> thread_limit{0};  // 0: not asked for yet
thread_local int frozen_threads = 0;  // 0: not frozen

// One loop at a time; a second caller meanwhile runs its tasks on its own thread. Waiting is std::atomic's, on a futex: no
// condition variable, whose symbol would ask for a newer C++ library.
class Pool {
 public:
  bool try_run(std::int64_t tasks, int threads, void (*body)(void*, std::int64_t, int), void* context) {
    std::unique_lock only(busy_, std::try_to_lock);
    if (!only.owns_lock()) return false;
    for (; workers_ < threads - 1; ++workers_) std::thread([this, index = workers_ + 1] { work(index); }).detach();
    body_ = body, context_ = context, tasks_ = tasks;
    next_.store(0, std::memory_order_relaxed);
    error_ = nullptr;
    pending_.store(threads - 1, std::memory_order_relaxed);
    const std::uint64_t generation = (job_.load(std::memory_order_relaxed) >> kThreadBits) + 1;
    job_.store(generation << kThreadBits | static_cast<std::uint64_t>(threads), std::memory_order_release);
    job_.notify_all();
    take_tasks(0);
    // The helpers finish soon after the last task is taken: spin briefly, then sleep.
    for (int i = 0; i < kSpins && pending_.load(std::memory_order_acquire) > 0; ++i) pause();
    for (int left; (left = pending_.load(std::memory_order_acquire)) > 0;) pending_.wait(left, std::memory_order_acquire);
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  static constexpr int kThreadBits = 16;

  void take_tasks(int thread) {
    try {
      for (;;) {
        const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
        if (task >= tasks_) return;
        body_(context_, task, thread);
      }
    } catch (...) {
      std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(tasks_, std::memory_order_relaxed);
    }
  }

  // Only the threads of a job, which the caller waits for, look at more of it than the one word that tells who they are.
  void work(int index) {
    inside_task = true;
    for (std::uint64_t seen = 0;;) {
      for (int i = 0; i < kSpins && job_.load(std::memory_order_acquire) == seen; ++i) pause();
      job_.wait(seen, std::memory_order_acquire);
      seen = job_.load(std::memory_order_acquire);
      if (index >= static_cast<int>(seen & ((1u << kThreadBits) - 1))) continue;
      take_tasks(index);
      if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
    }
  }

 public:
  static thread_local bool inside_task;

 private:
  std::mutex busy_, error_mutex_;
  int workers_ = 0;
  std::atomic<std::uint64_t> job_{0};  // generation and number of threads, in one word
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> pending_{0};
  void (*body_)(void*, std::int64_t, int) = nullptr;
  void* context_ = nullptr;
  std::int64_t tasks_ = 0;
  std::exception_ptr error_;
};

thread_local bool Pool::inside_task = false;

// A forked child has none of the parent's threads: it drops the pool it inherited and makes its own. The pool is never
// destroyed: its threads sleep until the process ends.
std::atomic<Pool*> the_pool{nullptr};
std::mutex creation;

Pool& pool() {
  if (Pool* existing = the_pool.load(std::memory_order_acquire)) return *existing;
  std::lock_guard lock(creation);
  if (!the_pool.load(std::memory_order_relaxed)) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_relaxed); });
    (void)registered;
    the_pool.store(new Pool, std::memory_order_release);
  }
  return *the_pool.load(std::memory_order_relaxed);
}

}  // namespace

int max_threads() {
  if (frozen_threads > 0) return frozen_threads;
  const int limit = thread_limit.load(std::memory_order_relaxed);
  if (limit > 0) return limit;
  const int found = default_threads();
  int unset = 0;
  thread_limit.compare_exchange_strong(unset, found, std::memory_order_relaxed);
  return thread_limit.load(std::memory_order_relaxed);
}

FrozenThreads::FrozenThreads() : former_(frozen_threads) { frozen_threads = max_threads(); }
FrozenThreads::~FrozenThreads() { frozen_threads = former_; }

void parallel_for_impl(std::int64_t tasks, void (*body)(void*, std::int64_t, int), void* context) {
  const int threads = static_cast<int>(std::min<std::int64_t>(tasks, max_threads()));
  if (threads > 1 && !Pool::inside_task) {
    Pool::inside_task = true;
    struct Leave {
      ~Leave() { Pool::inside_task = false; }
    } leave;
    if (pool().try_run(tasks, threads, body, context)) return;
  }
  for (std::int64_t task = 0; task < tasks; ++task) body(context, task, 0);
}

void wait_for(const int& counter, int value) {
  const std::atomic_ref shared(const_cast<int&>(counter));
  for (int i = 0; i < kSpins && shared.load(std::memory_order_acquire) < value; ++i) pause();
  for (int seen; (seen = shared.load(std::memory_order_acquire)) < value;) shared.wait(seen, std::memory_order_acquire);
}

void advance_to(int& counter, int value) {
  const std::atomic_ref shared(counter);
  shared.store(value, std::memory_order_release);
  shared.notify_all();
}

}  // namespace cpu

int num_threads() { return cpu::max_threads(); }

void set_num_threads(int count) {
  if (count < 1 || count > cpu::kMaxThreads)
    fail<ValueError>("set_num_threads: ", count, " must lie in 1..", cpu::kMaxThreads);
  cpu::thread_limit.store(count, std::memory_order_relaxed);
}

}  // namespace statescan
