// Threads that share one piece of work after another. They spin for a moment when a piece is done, then sleep.
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

// What the threads of a piece of work share: the place where they meet, and how much of each one's part is taken.
class Team {
   public:
    explicit Team(int threads) : threads(threads), taken_(threads) {}
    const int threads;

    void begin();  // forgets what was taken in the piece of work before

   private:
    friend class Worker;
    static constexpr int COUNTS = 4;  // counts that a phase shares out by chunks; further ones are shared out by parts
    struct alignas(64) Taken {
        std::atomic<uint32_t> chunks[2][COUNTS] = {};  // in this phase and in the next one
    };
    std::vector<Taken> taken_;
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> generation_{0};
};

// One thread's place in a piece of work. A phase ends when all threads meet. What one thread writes, another reads in a
// later phase only. All threads make the same calls.
class Worker {
   public:
    Worker(Team& team, int thread) : thread(thread), threads(team.threads), team_(team) {}
    const int thread, threads;

    void wait();  // waits for all threads

    // Returns this thread's part of a count, in whole units. Parts are as even as they can be.
    Part part(size_t count, size_t unit) const { return part(count, unit, thread); }

    // Shares a count out in chunks of `size`, a multiple of `unit`. Calls f(Part, last): `last` says that the thread's
    // next chunk does not follow this one. Each thread begins with its own part and then takes chunks of the others',
    // for cores are not equally fast and other processes take time of them. Where a part has few chunks, threads keep
    // to their own, because looking costs more than it gains.
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
    // Runs the work on every thread, the caller included. One piece runs at a time. Work that is not shared runs on
    // the caller alone.
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
