#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

constexpr int kMost = 64;                               // threads of a team
constexpr auto kSpin = std::chrono::microseconds(200);  // longer than what lies between two kernels of a step

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A share is a stretch of pieces beside each other: one stream of memory for its owner, taken over by others who are done.
struct alignas(64) Share {
  std::atomic<long> next{0};
  long end = 0;
};

struct Pool {
  std::mutex callers;           // held during a job
  std::atomic<long> ticket{0};  // odd while a job is open
  std::atomic<int> inside{0};   // helpers that may touch the job
  std::atomic<int> asleep{0};
  std::mutex sleep;
  std::condition_variable wake;
  v4::Piece piece = nullptr;
  const void* data = nullptr;
  int team = 0, helpers = 0;
  Share shares[kMost];

  void work(int id) {
    for (int i = 0; i < team; ++i) {
      Share& from = shares[(id + i) % team];
      for (long p; from.next.load(std::memory_order_relaxed) < from.end && (p = from.next.fetch_add(1)) < from.end;)
        piece(data, p);
    }
  }

  // Waits for a ticket other than `seen` that is odd; returns it.
  long await(long seen) {
    const auto open = [&] {
      const long now = ticket.load();
      return now != seen && now % 2;
    };
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        if (open()) return ticket.load();
        pause();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(sleep);
    asleep.fetch_add(1);
    wake.wait(lock, open);
    asleep.fetch_sub(1);
    return ticket.load();
  }

  void help(int id) {
    for (long seen = 0;;) {
      seen = await(seen);
      inside.fetch_add(1);
      // the owner closes the ticket before it looks at `inside`, so one of the two sees the other
      if (seen % 2 && ticket.load() == seen && id < team) work(id);
      inside.fetch_sub(1);
    }
  }

  void run(int threads, long pieces, v4::Piece what, const void* with) {
    team = static_cast<int>(std::min<long>(std::min(threads, kMost), pieces));
    try {
      for (; helpers < team - 1; ++helpers) std::thread([this, id = helpers + 1] { help(id); }).detach();
    } catch (const std::system_error&) {
      // no more threads to be had: the shares of those that are missing are taken over
    }
    piece = what, data = with;
    for (int i = 0; i < team; ++i) {
      shares[i].next.store(pieces * i / team, std::memory_order_relaxed);
      shares[i].end = pieces * (i + 1) / team;
    }
    ticket.fetch_add(1);
    if (asleep.load()) {
      {
        const std::lock_guard<std::mutex> lock(sleep);
      }
      wake.notify_all();
    }
    work(0);
    ticket.fetch_add(1);
    while (inside.load()) pause();
  }
};

// Never freed: helpers outlive static objects. A forked child has none of the helpers and starts with a pool of its own.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static const bool watched = [] {
    the_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
    return true;
  }();
  (void)watched;
  return *the_pool;
}

}  // namespace

namespace v4 {

void share(int threads, long pieces, Piece piece, const void* data) {
  Pool& with = pool();
  if (with.callers.try_lock()) {
    with.run(threads, pieces, piece, data);
    with.callers.unlock();
  } else {
    for (long i = 0; i < pieces; ++i) piece(data, i);
  }
}

}  // namespace v4
