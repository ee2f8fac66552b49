// Threads that share one piece of work after another. They spin for a moment when it is done, then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace gemma {

// A part of a count.
struct Part {
    size_t begin, end;
};

// What the threads of a piece of work share: where they meet, and what has been taken of each one's parts.
class Team {
   public:
    explicit Team(int threads) : threads(threads), taken_(threads) {}
    const int threads;

    void begin();  // a piece of work

   private:
    friend class Worker;
    static constexpr int COUNTS = 4;  // that a phase shares out by chunks; what is more is shared out by parts
    struct alignas(64) Taken {
        std::atomic<uint32_t> chunks[2][COUNTS] = {};  // in this phase and in the next one
    };
    std::vector<Taken> taken_;
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> generation_{0};
};

// One thread's place in a piece of work. Work goes on in phases that end when all threads meet; nothing is written by
// one thread and read by another without that. All threads make the same calls.
class Worker {
   public:
    Worker(Team& team, int thread) : thread(thread), threads(team.threads), team_(team) {}
    const int thread, threads;

    void wait();  // for all threads

    Part part(size_t count, size_t unit) const { return part(count, unit, thread); }

    // Shares a count out in chunks of `size`, a multiple of `unit`, and calls f(Part, whether the thread's next one does
    // not follow it). Each thread begins with its own part; who is done takes of the others', as cores are not equally
    // fast and other processes take time of them. Where a part has few chunks, looking costs more than it gains.
    template <class F>
    void each(size_t count, size_t unit, size_t size, F f) {
        const Part own = part(count, unit);
        if (threads == 1 || count <= 2 * size * threads || counts_ == Team::COUNTS) {
            if (own.begin < own.end) f(own, true);
            return;
        }
        const int at = counts_++;
        for (int i = 0; i < threads; i++) {
            const int whose = (thread + i) % threads;
            const Part p = part(count, unit, whose);
            auto& taken = team_.taken_[whose].chunks[phase_][at];
            for (size_t begin; (begin = p.begin + size * taken.fetch_add(1, std::memory_order_relaxed)) < p.end;) {
                const size_t end = std::min(begin + size, p.end);
                f(Part{begin, end}, i > 0 || end == p.end);
            }
        }
    }

   private:
    // In whole units, the parts as even as they allow.
    Part part(size_t count, size_t unit, int whose) const {
        const size_t units = (count + unit - 1) / unit;
        const size_t begin = units * whose / threads, end = units * (whose + 1) / threads;
        return {std::min(begin * unit, count), std::min(end * unit, count)};
    }

    Team& team_;
    int phase_ = 0, counts_ = 0;
};

class Pool {
   public:
    using Work = std::function<void(Worker&)>;

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
    Team* team_ = nullptr;
    const Work* work_ = nullptr;
    std::atomic<uint32_t> generation_{0};
    std::atomic<int> running_{0};
    std::atomic<bool> stopping_{false};
};

}  // namespace gemma
