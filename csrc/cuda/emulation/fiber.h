// Stackful coroutines for the threads of a block: a switch is a handful of instructions.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace simsd::emulation {

class Fibers {
  public:
    // `entry` runs on every fiber's own stack and must not return: it ends by `switch_to`.
    explicit Fibers(void (*entry)()) : entry_(entry) {}
    ~Fibers();
    Fibers(const Fibers&) = delete;
    Fibers& operator=(const Fibers&) = delete;

    static constexpr int MAIN = -1;

    // Makes fibers 0 .. count - 1 start anew.
    void reset(int count);
    // Leaves the running fiber (MAIN at first) for another; returns when somebody switches back.
    void switch_to(int fiber);
    int current() const { return current_; }
    // To be called first thing in `entry`.
    void arrived();

  private:
    struct Context {
        void* stack = nullptr;       // lowest address
        void* pointer = nullptr;     // saved stack pointer, or a ucontext_t
        void* fake_stack = nullptr;  // AddressSanitizer's
        const void* bottom = nullptr;
        size_t size = 0;
    };
    Context& context(int fiber) { return fiber == MAIN ? main_ : contexts_[fiber]; }
    void prepare(Context& context);

    void (*entry_)();
    Context main_;
    std::vector<Context> contexts_;
    int current_ = MAIN, previous_ = MAIN;
};

}  // namespace simsd::emulation
