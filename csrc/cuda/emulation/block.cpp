// One block at a time: its fibers, its shared memory, who waits where.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda/device.h"
#include "cuda/emulation/fiber.h"
#include "cuda/emulation/launch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simsd::emulation {

Place here;
Counters counters;
bool counting = false;

namespace {

constexpr int GAP = 128;  // bytes around every shared array that nobody may touch
constexpr int MOST_ARRAYS = 64;
constexpr int POISON = 0xff;  // NaN, whatever the type

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool valid;
    int group;
};

struct Thread {
    bool done;
    const char* waits_at;  // the collective, nullptr while it runs
    std::vector<Copy> copies;
    int group;  // the one that is being filled
};

struct Warp {
    const char* name;
    int arrived;
    void* operands[WARP];
};

uint64_t schedule_seed = 0;
int multiprocessor_count = 4;
bool noting = false;
int64_t most_blocks = 0;
std::string notes;

// Which 16 bytes of memory were copied to shared memory in this launch.
class Touched {
  public:
    void clear() { regions_.clear(), last_ = nullptr; }

    // Whether `address` is the first of its 16 bytes.
    bool is_new(const void* address) {
        const uintptr_t chunk = reinterpret_cast<uintptr_t>(address) / 16, number = chunk / CHUNKS;
        if (last_ == nullptr || number != last_number_) {
            last_ = &regions_.try_emplace(number, CHUNKS).first->second;
            last_number_ = number;
        }
        auto bit = (*last_)[chunk % CHUNKS];
        return !bit && (bit = true);
    }

  private:
    static constexpr uintptr_t CHUNKS = 1 << 18;
    std::unordered_map<uintptr_t, std::vector<bool>> regions_;
    std::vector<bool>* last_ = nullptr;
    uintptr_t last_number_ = 0;
};
Touched touched;
int64_t new_bytes = 0;

uint64_t next_random(uint64_t& state) {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

void enter();

class Block {
  public:
    Block() : fibers_(enter) {}

    void run(const std::function<void()>& kernel, int threads, int shared_bytes, uint64_t& random) {
        kernel_ = &kernel;
        random_ = next_random(random);
        error_.clear();
        threads_.resize(threads);
        for (Thread& thread : threads_) {
            thread.done = false;
            thread.waits_at = nullptr;
            thread.copies.clear();
            thread.group = 0;
        }
        warps_.assign(threads / WARP, Warp{});
        barrier_name_ = nullptr;
        barrier_arrived_ = barrier_votes_ = barrier_result_ = 0;
        unpoison();
        shared_bytes_ = shared_bytes;
        arrays_.clear();
        shared_.assign(shared_bytes + (MOST_ARRAYS + 1) * GAP + 128, POISON);
        fibers_.reset(threads);
        alive_ = threads;

        std::vector<int> order(threads / WARP);
        std::iota(order.begin(), order.end(), 0);
        shuffle_order(order);
        ready_.clear();
        for (int warp : order) wake_warp(warp, Fibers::MAIN, false);
        resume_next();

        unpoison();
        if (error_.empty()) check_gaps();
        if (!error_.empty()) throw std::runtime_error(error_);
    }

    // On a fiber of its own.
    void run_thread() {
        fibers_.arrived();
        (*kernel_)();
        const int self = fibers_.current();
        threads_[self].done = true;
        --alive_;
        if (alive_ > 0 && barrier_arrived_ == alive_) fail("a thread ended while the others wait at a block barrier");
        resume_next();
    }

    void warp_collective(const char* name, void* operands, void (*perform)(void* const*)) {
        const int self = fibers_.current();
        Warp& warp = warps_[self / WARP];
        if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0) {
            fail((std::string("lanes of one warp are at ") + warp.name + " and at " + name).c_str());
        }
        warp.name = name;
        warp.operands[self % WARP] = operands;
        if (++warp.arrived < WARP) {
            wait(name);
            return;
        }
        perform(warp.operands);
        warp.arrived = 0;
        wake_warp(self / WARP, self, next_random(random_) & 1);
    }

    int block_collective(const char* name, bool value) {
        if (barrier_arrived_ > 0 && std::strcmp(barrier_name_, name) != 0) {
            fail((std::string("threads of one block are at ") + barrier_name_ + " and at " + name).c_str());
        }
        barrier_name_ = name;
        barrier_votes_ += value;
        if (++barrier_arrived_ < static_cast<int>(threads_.size())) {
            if (barrier_arrived_ == alive_) fail("threads have ended, the others wait at a block barrier");
            wait(name);
            return barrier_result_;
        }
        barrier_result_ = barrier_votes_;
        barrier_arrived_ = barrier_votes_ = 0;
        const int self = fibers_.current();
        std::vector<int> order(warps_.size());
        std::iota(order.begin(), order.end(), 0);
        shuffle_order(order);
        for (int warp : order) wake_warp(warp, self, false);
        // The last to come is not the first to go on.
        threads_[self].waits_at = nullptr;
        ready_.push_back(self);
        resume_next();
        return barrier_result_;
    }

    void* take_shared(int index, int offset, int bytes) {
        if (offset + bytes > shared_bytes_) {
            fail(("takes " + std::to_string(offset + bytes) + " bytes of shared memory, was launched with " +
                  std::to_string(shared_bytes_))
                     .c_str());
        }
        if (index >= MOST_ARRAYS) fail("takes more shared arrays than the emulation has room for");
        if (index < static_cast<int>(arrays_.size())) {
            if (arrays_[index] != std::make_pair(offset, bytes)) fail("threads disagree about shared memory");
        } else {
            arrays_.emplace_back(offset, bytes);
            poison(place(index) + bytes, GAP);
            if (index == 0) poison(place(0) - GAP, GAP);
        }
        return place(index);
    }

    void copy_async(void* to, const void* from, int bytes, bool valid) {
        check_aligned(to, bytes);
        if (valid) check_aligned(from, bytes);
        if (valid) counters.async_bytes += bytes;
        if (counting && valid && touched.is_new(from)) new_bytes += bytes;
        if (counting && bytes == 16) return;
        Thread& thread = threads_[fibers_.current()];
        std::memset(to, POISON, bytes);
        thread.copies.push_back({to, from, bytes, valid, thread.group});
    }

    void copy_commit() { ++threads_[fibers_.current()].group; }

    void copy_wait(int pending) {
        Thread& thread = threads_[fibers_.current()];
        size_t done = 0;
        for (; done < thread.copies.size() && thread.copies[done].group < thread.group - pending; ++done) {
            const Copy& copy = thread.copies[done];
            if (copy.valid) {
                std::memcpy(copy.to, copy.from, copy.bytes);
            } else {
                std::memset(copy.to, 0, copy.bytes);
            }
        }
        thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
    }

    [[noreturn]] void fail(const char* message) {
        if (error_.empty()) {
            error_ = "block (" + std::to_string(here.block_x) + ", " + std::to_string(here.block_y) + ", " +
                     std::to_string(here.block_z) + "), thread " + std::to_string(fibers_.current()) + ": " + message;
        }
        fibers_.switch_to(Fibers::MAIN);
        std::abort();  // nobody comes back to a fiber that failed
    }

  private:
    char* place(int index) {
        const auto start = reinterpret_cast<uintptr_t>(shared_.data());
        return reinterpret_cast<char*>((start + 127) / 128 * 128) + arrays_[index].first + (index + 1) * GAP;
    }

    static void poison([[maybe_unused]] void* from, [[maybe_unused]] int bytes) {
#if defined(__SANITIZE_ADDRESS__)
        ASAN_POISON_MEMORY_REGION(from, bytes);
#endif
    }

    void unpoison() {
#if defined(__SANITIZE_ADDRESS__)
        if (!shared_.empty()) ASAN_UNPOISON_MEMORY_REGION(shared_.data(), shared_.size());
#endif
    }

    void check_gaps() {
        for (int index = 0; index < static_cast<int>(arrays_.size()); ++index) {
            const char* gap = place(index) + arrays_[index].second;
            for (int i = 0; i < GAP; ++i) {
                if (static_cast<unsigned char>(gap[i]) != POISON) {
                    error_ = "wrote " + std::to_string(i) + " bytes past shared array " + std::to_string(index);
                    return;
                }
            }
        }
    }

    void shuffle_order(std::vector<int>& order) {
        if (schedule_seed == 0) return;
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(random_) % i]);
    }

    // Makes the lanes of a warp ready, all but `running`; at the front of the queue if they are to go on at once.
    void wake_warp(int warp, int running, bool at_once) {
        const bool backwards = schedule_seed != 0 && (next_random(random_) & 1);
        for (int i = 0; i < WARP; ++i) {
            const int thread = warp * WARP + (backwards != at_once ? WARP - 1 - i : i);
            if (thread == running) continue;
            threads_[thread].waits_at = nullptr;
            at_once ? ready_.push_front(thread) : ready_.push_back(thread);
        }
    }

    void wait(const char* name) {
        threads_[fibers_.current()].waits_at = name;
        resume_next();
    }

    void resume_next() {
        int next = Fibers::MAIN;
        if (!ready_.empty()) {
            next = ready_.front();
            ready_.pop_front();
        } else if (alive_ > 0) {
            std::string message = "threads wait for each other:";
            for (size_t i = 0; i < threads_.size(); ++i) {
                const char* where = threads_[i].done ? "its end" : threads_[i].waits_at ? threads_[i].waits_at : "?";
                if (i == 0 || where != last_place(i - 1)) message += " " + std::to_string(i) + " at " + where + ",";
            }
            message.pop_back();
            fail(message.c_str());
        }
        here.thread = next;
        fibers_.switch_to(next);
        here.thread = fibers_.current();
    }

    std::string last_place(size_t i) const {
        return threads_[i].done ? "its end" : threads_[i].waits_at ? threads_[i].waits_at : "?";
    }

    Fibers fibers_;
    const std::function<void()>* kernel_ = nullptr;
    uint64_t random_ = 0;
    std::string error_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::deque<int> ready_;
    int alive_ = 0;
    const char* barrier_name_ = nullptr;
    int barrier_arrived_ = 0, barrier_votes_ = 0, barrier_result_ = 0;
    int shared_bytes_ = 0;
    std::vector<std::pair<int, int>> arrays_;  // offset and bytes
    std::vector<char> shared_;
};

// Never destroyed: a process that ends does not care, and fibers that failed have frames on their stacks.
Block& block() {
    static Block* only = new Block;
    return *only;
}

void enter() { block().run_thread(); }

}  // namespace

void warp_collective(const char* name, void* operands, void (*perform)(void* const*)) {
    block().warp_collective(name, operands, perform);
}
int block_collective(const char* name, bool value) { return block().block_collective(name, value); }
void* take_shared(int index, int offset, int bytes) { return block().take_shared(index, offset, bytes); }
void copy_async(void* to, const void* from, int bytes, bool valid) { block().copy_async(to, from, bytes, valid); }
void copy_commit() { block().copy_commit(); }
void copy_wait(int pending_groups) { block().copy_wait(pending_groups); }
void fail(const char* message) { block().fail(message); }

void set_schedule(uint64_t seed) { schedule_seed = seed; }

int multiprocessors() { return multiprocessor_count; }

void set_multiprocessors(int count) { multiprocessor_count = count; }

void set_noting(bool on) { noting = on; }

void set_counting(int64_t most) {
    most_blocks = most;
    counting = most > 0;
}

std::string take_notes() { return std::exchange(notes, ""); }

void launch(const char* op, const void* kernel, int64_t blocks_x, int64_t blocks_y, int64_t blocks_z, int threads,
            int shared_bytes, const std::function<void()>& run) {
    const auto refuse = [&](const std::string& why) { throw std::runtime_error(std::string(op) + ": " + why); };
    if (threads < WARP || threads > 1024 || threads % WARP) refuse(std::to_string(threads) + " threads in a block");
    if (shared_bytes > 99 * 1024) refuse(std::to_string(shared_bytes) + " bytes of shared memory; sm_120 has 101376");
    const int64_t blocks = blocks_x * blocks_y * blocks_z;
    if (noting || counting) {
        Dl_info library{};
        dladdr(kernel, &library);
        const auto address = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
        notes += std::to_string(address) + " " + std::to_string(shared_bytes) + " " + std::to_string(blocks);
        if (noting) {
            notes += "\n";
            return;
        }
        touched.clear();
    }
    std::vector<int64_t> order(counting ? std::min(blocks, most_blocks) : blocks);
    const int64_t count = static_cast<int64_t>(order.size());
    for (int64_t i = 0; i < count; ++i) order[i] = (2 * i + 1) * blocks / (2 * count);  // i, where all blocks run
    const Counters before = counters;
    const int64_t new_before = new_bytes;
    int64_t busy = 0;
    uint64_t random = schedule_seed;
    if (schedule_seed != 0) {
        for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(random) % i]);
    }
    ++counters.launches;
    counters.blocks += static_cast<int64_t>(order.size());
    for (int64_t index : order) {
        here = {0,
                threads,
                static_cast<int>(index % blocks_x),
                static_cast<int>(index / blocks_x % blocks_y),
                static_cast<int>(index / blocks_x / blocks_y),
                static_cast<int>(blocks_x),
                static_cast<int>(blocks_y)};
        const int64_t copied = counters.async_bytes;
        try {
            block().run(run, threads, shared_bytes, random);
        } catch (const std::runtime_error& error) {
            refuse(error.what());
        }
        busy += counters.async_bytes > copied;
    }
    if (counting) {
        for (const int64_t number :
             {count, busy, counters.async_bytes - before.async_bytes, new_bytes - new_before,
              counters.loaded_bytes - before.loaded_bytes, counters.stored_bytes - before.stored_bytes,
              counters.matrix_products - before.matrix_products}) {
            notes += " " + std::to_string(number);
        }
        notes += "\n";
    }
}

}  // namespace simsd::emulation
