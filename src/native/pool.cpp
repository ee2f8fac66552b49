#include "pool.h"

#include <unistd.h>

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gemma {
namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// A thread that waits spins for about 50 microseconds, which is longer than the threads of a call wait for one another.
// Then it yields for a millisecond or more, which is longer than the host takes between two calls of many sequences:
// any thread that has no core gets this one. Then it sleeps. To wake it takes long, above all in a virtual machine.
constexpr int SPINS = 2000, YIELDS = 2000;

template <class T>
void wait_while(std::atomic<T>& value, T same) {
    for (int tries = 0; value.load(std::memory_order_acquire) == same; tries = std::min(tries + 1, SPINS + YIELDS)) {
        if (tries < SPINS) pause();
        else if (tries < SPINS + YIELDS) std::this_thread::yield();
        else value.wait(same, std::memory_order_acquire);
    }
}

}  // namespace

void Team::begin() {
    for (Taken& of_one : taken_)
        for (auto& phase : of_one.chunks)
            for (auto& chunks : phase) chunks.store(0, std::memory_order_relaxed);
}

void Worker::wait() {
    if (threads == 1) return;
    const uint32_t generation = team_.generation_.load(std::memory_order_acquire);
    if (team_.arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
        team_.arrived_.store(0, std::memory_order_relaxed);
        team_.generation_.store(generation + 1, std::memory_order_release);
        team_.generation_.notify_all();
    } else {
        wait_while(team_.generation_, generation);
    }
    // other threads look at these counts only after all have met again
    for (int i = 0; i < counts_; i++) team_.taken_[thread].chunks[phase_][i].store(0, std::memory_order_relaxed);
    phase_ ^= 1;
    counts_ = 0;
}

Pool& Pool::instance() {
    static Pool pool((int)std::max(1u, std::thread::hardware_concurrency()));
    return pool;
}

Pool::Pool(int threads) : threads_(threads) {}

Pool::~Pool() { stop(); }

void Pool::set_threads(int threads) {
    std::lock_guard<std::mutex> lock(one_at_a_time_);
    stop();
    threads_ = std::max(1, threads);
}

void Pool::start() {
    process_ = getpid();
    stopping_ = false;
    team_ = new Team(threads_);
    const uint32_t seen = generation_.load();
    for (int i = 1; i < threads_; i++) workers_.emplace_back([this, i, seen] { loop(i, seen); });
}

void Pool::stop() {
    if (!team_) return;
    if (process_ == getpid()) {
        stopping_ = true;
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        for (auto& worker : workers_) worker.join();
    } else {
        for (auto& worker : workers_) worker.detach();  // after a fork, only the caller's thread exists
    }
    workers_.clear();
    delete team_;
    team_ = nullptr;
}

void Pool::loop(int thread, uint32_t seen) {
    for (;;) {
        wait_while(generation_, seen);
        seen = generation_.load(std::memory_order_acquire);
        if (stopping_) return;
        Worker worker(*team_, thread);
        (*work_)(worker);
        if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_one();
    }
}

void Pool::run(const Work& work, bool shared) {
    if (!shared) {
        Team one(1);
        Worker alone(one, 0);
        return work(alone);
    }
    std::lock_guard<std::mutex> lock(one_at_a_time_);
    if (team_ && process_ != getpid()) stop();
    if (!team_) start();
    if (threads_ > 1) {
        team_->begin();
        work_ = &work;
        running_.store(threads_ - 1, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }
    Worker worker(*team_, 0);
    work(worker);
    for (int left; threads_ > 1 && (left = running_.load(std::memory_order_acquire)) > 0;) wait_while(running_, left);
}

}  // namespace gemma
