// Threads that share one piece of work after another. They spin for a moment when it is done, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gemma {

// All threads of a piece of work meet here; nothing is written by one and read by another without it.
class Barrier {
   public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

   private:
    const int threads_;
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> generation_{0};
};

class Pool {
   public:
    using Work = std::function<void(int thread, int threads, Barrier&)>;

    static Pool& instance();
    // Run the work on every thread, the caller's included, one piece at a time; what is too small to share, on the
    // caller alone.
    void run(const Work& work, bool shared = true);
    void set_threads(int threads);
    int threads() const { return threads_; }

   private:
    explicit Pool(int threads);
    ~Pool();
    void start();
    void stop();
    void loop(int thread, uint32_t seen);

    int threads_;
    int process_ = 0;
    std::mutex one_at_a_time_;
    std::vector<std::thread> workers_;
    Barrier* barrier_ = nullptr;
    const Work* work_ = nullptr;
    std::atomic<uint32_t> generation_{0};
    std::atomic<int> running_{0};
    std::atomic<bool> stopping_{false};
};

}  // namespace gemma
